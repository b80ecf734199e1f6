"""The training loop: schedule by hand, Hugging Face's loss, exact resumption, clear refusals."""

from __future__ import annotations

import copy
import dataclasses
import io
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from cbtm_ray.tokens import PackedSequences
from cbtm_ray.train import Trainer, TrainSpec, learning_rate, loss_function, make_optimizer, train_model

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=32, num_key_value_heads=2)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, intermediate_size=32, num_key_value_heads=2)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=64)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(**SIZES, ffn_dim=32, word_embed_proj_dim=8, max_position_embeddings=64, pad_token_id=1)
    ),
    "cohere, which scales its logits": lambda: CohereForCausalLM(
        CohereConfig(**SIZES, intermediate_size=32, num_key_value_heads=2, logit_scale=0.25, pad_token_id=1)
    ),
}
SPEC = TrainSpec(
    name="test", steps=20, batch_size=4, sequence_length=16, learning_rate=1e-2, final_lr_fraction=0.1,
    schedule="linear", warmup_steps=4, betas=(0.9, 0.95), weight_decay=0.1, clip_norm=1.0, precision="fp32",
    log_every=3, checkpoint_every=5,
)  # fmt: skip


def make_model(name: str = "llama") -> Any:
    torch.manual_seed(0)
    return MODELS[name]()


def make_sequences(highest: int = 49) -> PackedSequences:
    random = np.random.default_rng(0)
    documents = [np.sort(random.integers(1, highest + 1, 40)) for _ in range(30)]
    return PackedSequences(documents, sequence_length=16, end_of_text=0, seed=0)


def train(model: Any, spec: TrainSpec = SPEC, state: Any = None) -> tuple[list[dict], list[bytes]]:
    """Curve and saved states, as a checkpoint holds them."""
    saved: list[bytes] = []

    def save(state: dict) -> None:
        torch.save(state, buffer := io.BytesIO())
        saved.append(buffer.getvalue())

    curve = train_model(model, make_sequences(), spec, state=state, save=save, log=lambda point: None)
    return curve, saved


def without_speed(curve: list[dict]) -> list[dict]:
    return [{key: value for key, value in point.items() if key != "tokens_per_s"} for point in curve]


def test_learning_rate_by_hand() -> None:
    rates = [learning_rate(SPEC, step) for step in (0, 3, 4, 12, 20)]
    assert rates == pytest.approx([0.0025, 0.01, 0.01, 0.0055, 0.001])
    cosine = dataclasses.replace(SPEC, schedule="cosine")
    assert [learning_rate(cosine, step) for step in (4, 8, 12)] == pytest.approx(
        [0.01, 0.001 + 0.009 * (1 + np.sqrt(0.5)) / 2, 0.0055]
    )


@pytest.mark.parametrize("name", MODELS)
def test_loss_is_that_of_hugging_face(name: str) -> None:
    model = make_model(name).eval()
    batch = torch.from_numpy(make_sequences().batch(0, 4))
    with torch.no_grad():
        expected = model(input_ids=batch, labels=batch).loss
    token_loss = loss_function(model, batch[:1])
    assert token_loss(batch).mean().item() == pytest.approx(expected.item(), rel=1e-5)
    assert token_loss.__name__ == ("plain" if name.startswith("cohere") else "chunked")


def test_gradients_are_those_of_hugging_face() -> None:
    model = make_model().eval()
    batch = torch.from_numpy(make_sequences().batch(0, 4))
    loss_function(model, batch[:1])(batch).mean().backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(input_ids=batch, labels=batch).loss.backward()
    for ours, theirs in zip(found, (p.grad for p in model.parameters()), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_training_lowers_the_loss() -> None:
    curve, _ = train(make_model(), dataclasses.replace(SPEC, steps=60))
    assert curve[-1]["loss_nats"] < curve[0]["loss_nats"] - 0.5
    assert [point["step"] for point in curve] == list(range(3, 61, 3))
    assert curve[-1]["tokens"] == 60 * 64


@pytest.mark.parametrize("checkpoint", [0, 1, 2])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(checkpoint: int) -> None:
    whole = make_model()
    curve, saved = train(whole)
    assert len(saved) == 3
    resumed = make_model()
    state = torch.load(io.BytesIO(saved[checkpoint]), weights_only=True)
    resumed_curve, _ = train(resumed, state=state)
    assert without_speed(resumed_curve) == without_speed(curve)
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_no_steps_leave_the_model_alone() -> None:
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    assert train(model, dataclasses.replace(SPEC, steps=0)) == ([], [])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_only_matrices_decay() -> None:
    decayed, others = make_optimizer(make_model(), SPEC).param_groups
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in others["params"]} == {1}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)


def test_a_loss_that_is_no_number_stops_the_run_with_its_step() -> None:
    model = make_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[:] = float("nan")
    with pytest.raises(ValueError, match=r"test: the loss is nan at step 3\. Lower the learning rate"):
        train(model)


def test_a_token_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="token id 60 is not below the model's vocabulary of 50"):
        Trainer(make_model(), make_sequences(highest=60), SPEC)
