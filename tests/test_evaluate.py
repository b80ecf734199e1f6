"""Scores against Hugging Face, mixtures and their summaries by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cbtm_ray.config import EvaluateConfig
from cbtm_ray.evaluate import HeldOut, experts_run, mixture_logprobs, score_documents, summarise, tune

CONFIG = EvaluateConfig()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=50, intermediate_size=32)).eval()


def test_every_token_is_scored_once_as_hugging_face_does(model: LlamaForCausalLM) -> None:
    random = np.random.default_rng(0)
    documents = [random.integers(1, 50, length).astype(np.int32) for length in (3, 0, 8, 21, 1, 16)]
    expected = []
    for document in documents:
        stream = [0, *document.tolist()]
        for first in range(0, len(document), 8):
            window = torch.tensor([stream[first : first + 9]])
            with torch.no_grad():
                logprobs = model(window[:, :-1]).logits.log_softmax(-1)
            expected += logprobs.gather(2, window[:, 1:, None])[0, :, 0].tolist()
    for batch_tokens in (1, 20, 1000):
        found = score_documents(model, documents, sequence_length=8, end_of_text=0, batch_tokens=batch_tokens)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def held_out(n_experts: int = 3, lengths: tuple[int, ...] = (5, 9)) -> HeldOut:
    random = np.random.default_rng(1)
    total = sum(lengths)
    logprobs_TK = np.log(random.uniform(0.05, 0.9, (total, n_experts))).astype(np.float32)
    return HeldOut(np.array(lengths), logprobs_TK, random.uniform(0, 2, (total, n_experts)).astype(np.float32))


SETTINGS = {"temperature": 0.3, "beta": 1.0, "gamma": 0.9}


@pytest.mark.parametrize("routing", ["embedding", "posterior", "prefix"])
def test_a_mixture_of_one_expert_is_that_expert(routing: str) -> None:
    alone = held_out(n_experts=1)
    found = mixture_logprobs(alone, routing=routing, top_k=1, settings=SETTINGS, prefix_tokens=3)
    np.testing.assert_allclose(found, alone.logprobs_TK[:, 0], atol=1e-6)


@pytest.mark.parametrize("routing", ["embedding", "posterior", "prefix"])
def test_permuting_the_experts_changes_nothing(routing: str) -> None:
    given, order = held_out(), [2, 0, 1]
    permuted = HeldOut(given.lengths, given.logprobs_TK[:, order], given.squared_distances_TK[:, order])
    results = [
        mixture_logprobs(h, routing=routing, top_k=2, settings=SETTINGS, prefix_tokens=3) for h in (given, permuted)
    ]
    np.testing.assert_allclose(results[0], results[1], atol=1e-5)


def test_evidence_starts_anew_with_every_document() -> None:
    evidence_TK = held_out().evidence(0.9)
    assert (evidence_TK[[0, 5]] == 0).all()
    np.testing.assert_allclose(evidence_TK[6], held_out().logprobs_TK[5])


def test_tuning_finds_the_temperature_that_trusts_a_good_embedding() -> None:
    near = np.tile([0.0, 1.0], (40, 1)).astype(np.float32)
    logprobs_TK = np.log(np.tile([0.9, 0.01], (40, 1))).astype(np.float32)
    lengths = np.array([20, 20])
    assert tune(HeldOut(lengths, logprobs_TK, near), CONFIG, routing="embedding", top_k=2) == {"temperature": 0.01}
    misled = HeldOut(lengths, logprobs_TK, 1 - near)
    assert tune(misled, CONFIG, routing="embedding", top_k=2) == {"temperature": 1.0}


def test_summary_by_hand() -> None:
    """Two documents of 1 and 3 tokens, each token of probability 1/4 here and 1/2 under dense, 8 bytes of text."""
    ours, dense = np.log(np.full(4, 0.25)), np.log(np.full(4, 0.5))
    found = summarise(ours, np.array([1, 3]), 8, dense)
    assert found["ppl"] == found["ppl_low"] == found["ppl_high"] == pytest.approx(4)
    assert found["ratio_to_dense"] == found["ratio_low"] == found["ratio_high"] == pytest.approx(2)
    assert found["loss_nats"] == pytest.approx(math.log(4))
    assert found["bpb"] == pytest.approx(4 * 2 / 8)


def test_intervals_cover_documents_that_differ() -> None:
    random = np.random.default_rng(0)
    losses = np.repeat(random.normal(3, 0.5, 200), 10)
    found = summarise(-losses, np.full(200, 10), 8000, -np.full(2000, 3.0))
    standard_error = losses.reshape(200, 10)[:, 0].std() / math.sqrt(200)
    assert math.log(found["ppl_high"] / found["ppl_low"]) == pytest.approx(2 * 1.96 * standard_error, rel=0.15)
    assert found["ppl_low"] < found["ppl"] < found["ppl_high"]


def test_experts_that_run_by_hand() -> None:
    lengths = np.array([10, 30])
    assert experts_run("embedding", 2, 8, lengths, 16) == 2
    assert experts_run("posterior", 2, 8, lengths, 16) == 8
    assert experts_run("prefix", 2, 8, lengths, 16) == pytest.approx((26 * 8 + 14 * 2) / 40)
