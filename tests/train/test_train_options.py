"""What a user may switch on in training: each does what it says, and changes the outcome only where it says so."""

from __future__ import annotations

import io
import shutil
from typing import Any

import numpy as np
import pytest
import torch

from cbtm_ray.errors import UserError
from cbtm_ray.train.loss import TokenLoss
from cbtm_ray.train.packed_sequences import PackedSequences
from cbtm_ray.train.trainer import Trainer
from tests.support.tiny_models import SPEC, changed, make_model, make_sequences, make_valid, train, without_speed


def weights(model: Any) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def gradient_and_loss(spec_changes: dict[str, Any], name: str = "llama") -> tuple[torch.Tensor, float]:
    trainer = Trainer(make_model(name), make_sequences(), changed(SPEC, clip_norm=1e9, **spec_changes))
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters())  # so that a step is the gradient
    before = weights(trainer.model)
    trainer.train_step()
    return before - weights(trainer.model), trainer.loss_sum.item()


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_step_in_parts_has_the_gradient_and_loss_of_the_whole_batch(name: str, size: int) -> None:
    whole, whole_loss = gradient_and_loss({}, name)
    parts, loss = gradient_and_loss({"micro_batch_size": size}, name)
    torch.testing.assert_close(parts, whole, atol=1e-7, rtol=1e-3)
    assert loss == pytest.approx(whole_loss, rel=1e-6)


def test_no_more_sequences_go_through_the_model_at_once_than_allowed() -> None:
    trainer = Trainer(make_model(), make_sequences(), changed(SPEC, micro_batch_size=3))
    seen: list[int] = []
    trainer.model.model.embed_tokens.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    trainer.train_step()
    assert seen == [3, 1]


def kept_bytes(spec: Any, name: str) -> int:
    """Bytes that one step's forward pass keeps for its backward pass."""
    trainer, sizes = Trainer(make_model(name), make_sequences(), spec), []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trainer.token_loss(torch.from_numpy(make_sequences().batch(0, 4)))
    return sum(sizes)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "qwen2"])
def test_activation_checkpointing_keeps_less_and_trains_the_same(name: str) -> None:
    less = changed(SPEC, activation_checkpointing=True)
    assert kept_bytes(less, name) < 0.8 * kept_bytes(SPEC, name)
    usual, checkpointed = make_model(name), make_model(name)
    train(usual, SPEC)
    train(checkpointed, less)
    assert torch.equal(weights(checkpointed), weights(usual))


def test_a_model_without_activation_checkpointing_is_refused() -> None:
    model = make_model()
    model.supports_gradient_checkpointing = False
    with pytest.raises(UserError, match=r"train\.activation_checkpointing=True does not work with LlamaForCausalLM"):
        train(model, changed(SPEC, activation_checkpointing=True))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
def test_compiled_training_is_the_same_up_to_rounding_and_resumes() -> None:
    compiled = changed(SPEC, compile=True)
    trainer = Trainer(make_model(), make_sequences(), compiled)
    trainer.train_step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    plain, whole, resumed = make_model(), make_model(), make_model()
    expected, _ = train(plain)
    curve, saved = train(whole, compiled)
    losses = [[point["loss_nats"] for point in points] for points in (curve, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    train(resumed, compiled, state=torch.load(io.BytesIO(saved[1]), weights_only=True))
    assert torch.equal(weights(resumed), weights(whole))


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        UserError, match=r"train\.compile=True needs a C\+\+ compiler, and there is no no-such-compiler"
    ):
        train(make_model(), changed(SPEC, compile=True))


def test_documents_kept_apart_train_to_other_weights_and_resume_bit_for_bit() -> None:
    apart = changed(SPEC, cross_documents=False)
    joined, whole, resumed = make_model(), make_model(), make_model()
    train(joined)
    curve, saved = train(whole, apart)
    resumed_curve, _ = train(resumed, apart, state=torch.load(io.BytesIO(saved[1]), weights_only=True))
    assert without_speed(resumed_curve) == without_speed(curve)
    assert torch.equal(weights(resumed), weights(whole))
    assert not torch.equal(weights(joined), weights(whole))


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_evaluation_changes_neither_weights_nor_training_losses(name: str) -> None:
    without, with_it = make_model(name), make_model(name)
    plain, _ = train(without, changed(SPEC, log_every=5))
    spec = changed(SPEC, log_every=5, evaluate_every=5)
    curve, _ = train(with_it, spec, valid=make_valid())
    assert torch.equal(weights(with_it), weights(without))
    assert [point["loss_nats"] for point in curve] == [point["loss_nats"] for point in plain]
    assert all(point["valid_loss_nats"] > 0 for point in curve)
    assert [point.get("valid_loss_nats") for point in plain] == [None] * 4


def test_the_held_out_loss_is_that_of_the_first_sequences_at_the_weights_of_its_step() -> None:
    model, valid = make_model("opt"), make_valid()
    spec = changed(SPEC, evaluate_every=8, evaluate_sequences=5, micro_batch_size=2)
    curve, _ = train(model, spec, valid=valid)
    assert [point["step"] for point in curve if "valid_loss_nats" in point] == [8, 16, 20]
    assert [point["step"] for point in curve] == [3, 6, 8, 9, 12, 15, 16, 18, 20]
    batch = torch.from_numpy(valid.batch(0, 5))
    with torch.no_grad():
        expected = TokenLoss(model.eval(), batch[:1])(batch).mean().item()
    assert curve[-1]["valid_loss_nats"] == pytest.approx(expected, rel=1e-6)


def test_few_held_out_sequences_are_all_read() -> None:
    valid = make_valid(documents=2)
    assert valid.per_epoch == 3
    trainer = Trainer(make_model(), make_sequences(), SPEC, valid)
    batch = torch.from_numpy(valid.batch(0, 3))
    with torch.no_grad():
        assert trainer.evaluate() == pytest.approx(trainer.token_loss(batch).mean().item(), rel=1e-6)
    assert trainer.model.training


def test_a_held_out_token_outside_the_vocabulary_is_refused() -> None:
    valid = PackedSequences([np.array([60] * 20)], sequence_length=16, end_of_text=0, seed=0)
    with pytest.raises(UserError, match="token id 60 is not below the model's vocabulary of 50"):
        Trainer(make_model(), make_sequences(), SPEC, valid)
