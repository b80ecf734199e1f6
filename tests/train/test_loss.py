"""The loss: Hugging Face's own, whatever the architecture, and documents that share a sequence kept apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
)

from cbtm_ray.errors import UserError
from cbtm_ray.train import loss
from cbtm_ray.train.loss import TokenLoss, positions_in_document
from tests.support.tiny_models import MODELS, SIZES, make_model, make_sequences


@pytest.mark.parametrize("name", MODELS)
def test_loss_is_that_of_hugging_face(name: str) -> None:
    model = make_model(name).eval()
    batch = torch.from_numpy(make_sequences().batch(0, 4))
    with torch.no_grad():
        expected = model(input_ids=batch, labels=batch).loss
    token_loss = TokenLoss(model, batch[:1])
    assert token_loss(batch).mean().item() == pytest.approx(expected.item(), rel=1e-5)
    assert token_loss.chunkable != name.startswith("cohere")


def test_a_change_of_the_logits_is_seen_whatever_a_configuration_calls_it() -> None:
    """However small the logits are, and where the end of text is padding, whose embedding is zero."""
    batch = torch.from_numpy(make_sequences().batch(0, 1))

    def chunkable(change: Callable[[torch.Tensor], torch.Tensor]) -> bool:
        model = make_model().eval()
        model.register_forward_hook(lambda _, args, outputs: setattr(outputs, "logits", change(outputs.logits)))
        return TokenLoss(model, batch).chunkable

    assert chunkable(lambda logits: logits.float())
    assert not chunkable(lambda logits: logits * 1.01)
    assert not chunkable(lambda logits: 100 * torch.tanh(logits / 100))
    assert not chunkable(lambda logits: logits.index_fill(-1, torch.tensor([49]), -1e9))
    model = make_model().eval()
    model.lm_head.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    assert not TokenLoss(model, batch).chunkable
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = 0
    assert not TokenLoss(model, torch.zeros_like(batch)).chunkable, "nothing but zeros tells nothing"


@pytest.mark.parametrize(
    "model",
    [
        lambda: RobertaForCausalLM(RobertaConfig(**SIZES, intermediate_size=32)),
        lambda: LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=32, is_causal=False)),
    ],
    ids=["an encoder", "a decoder by its configuration"],
)
def test_a_model_that_sees_the_future_is_refused(model: Any) -> None:
    batch = torch.from_numpy(make_sequences().batch(0, 1))
    with pytest.raises(UserError, match=r"(Roberta|Llama)ForCausalLM of '' is no causal language model as it is conf"):
        TokenLoss(model(), batch)
    TokenLoss(RobertaForCausalLM(RobertaConfig(**SIZES, intermediate_size=32, is_decoder=True)), batch)


def test_chunks_are_for_many_logits_and_what_has_no_gradient() -> None:
    few, many = torch.zeros(2, 9, dtype=torch.int64), torch.zeros(8, 1025, dtype=torch.int64)
    assert not loss._chunks_are_cheaper(few, 49_152)
    assert loss._chunks_are_cheaper(many, 49_152)
    with torch.no_grad():
        assert loss._chunks_are_cheaper(few, 49_152)


@pytest.mark.parametrize("most_bytes", [loss._MOST_LOGITS_BYTES, 0])
def test_gradients_are_those_of_hugging_face(most_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By all logits at once as by chunks of them."""
    monkeypatch.setattr(loss, "_MOST_LOGITS_BYTES", most_bytes)
    model = make_model().eval()
    batch = torch.from_numpy(make_sequences().batch(0, 4))
    TokenLoss(model, batch[:1])(batch).mean().backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(input_ids=batch, labels=batch).loss.backward()
    for ours, theirs in zip(found, (p.grad for p in model.parameters()), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def make_capped() -> Gemma2ForCausalLM:
    torch.manual_seed(0)
    sizes = {**SIZES, "intermediate_size": 32, "num_key_value_heads": 2, "head_dim": 8}
    return Gemma2ForCausalLM(Gemma2Config(**sizes, final_logit_softcapping=5.0)).eval()


@pytest.mark.parametrize("growth", [1, 100])
def test_a_model_that_caps_its_logits_keeps_its_own_loss_as_they_grow(growth: float) -> None:
    """A new model's logits are far below the cap, where capping changes nothing yet."""
    model, batch = make_capped(), torch.from_numpy(make_sequences().batch(0, 4))
    token_loss = TokenLoss(model, batch[:1])
    with torch.no_grad():
        model.get_input_embeddings().weight *= growth
        expected = model(input_ids=batch, labels=batch).loss
        assert token_loss(batch).mean().item() == pytest.approx(expected.item(), rel=1e-4)


def test_positions_by_hand() -> None:
    tokens = torch.tensor([[5, 5, 0, 5, 0, 0, 5], [0, 5, 5, 5, 5, 5, 5]])
    assert positions_in_document(tokens, 0).tolist() == [[0, 1, 0, 1, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6]]


BORDERS = torch.tensor([[0, 4, 9, 2, 0, 7, 7, 3, 1, 0, 0, 8, 6], [5, 6, 0, 7, 4, 4, 9, 9, 2, 3, 8, 1, 0]])
PIECES = [(0, 0, 4), (0, 4, 9), (0, 9, 10), (0, 10, 12), (1, 0, 2), (1, 2, 12)]
"""Row, first input, end of inputs of every document or part of one in BORDERS, whose last column is a target alone."""


def losses_alone(model: Any) -> torch.Tensor:
    """The loss of every target of BORDERS from a forward pass of its document and nothing else."""
    losses = torch.zeros(2, 12)
    for row, first, end in PIECES:
        logits = model(input_ids=BORDERS[row : row + 1, first:end]).logits[0]
        losses[row, first:end] = F.cross_entropy(logits, BORDERS[row, first + 1 : end + 1], reduction="none")
    return losses.flatten()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_documents_kept_apart_are_documents_trained_alone(name: str, attention: str) -> None:
    model = make_model(name).eval()
    model.set_attn_implementation(attention)
    gradients = []
    losses = [losses_alone(model), TokenLoss(model, BORDERS[:1], border=0)(BORDERS)]
    for losses_N in losses:
        model.zero_grad()
        losses_N.mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*losses, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)
    crossing = TokenLoss(model, BORDERS[:1])(BORDERS)
    assert (crossing - losses[0]).abs().max() > 1e-4


@pytest.mark.parametrize(
    "model",
    [
        lambda: BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2)),
        lambda: MistralForCausalLM(
            MistralConfig(**SIZES, intermediate_size=32, num_key_value_heads=2, sliding_window=2)
        ),
    ],
    ids=["positions by distance", "a window beside the mask"],
)
def test_a_model_that_cannot_keep_documents_apart_is_refused(model: Any) -> None:
    with pytest.raises(UserError, match=r"train\.cross_documents=False does not work with (Bloom|Mistral)ForCausalLM"):
        TokenLoss(model(), BORDERS[:1], border=0)
