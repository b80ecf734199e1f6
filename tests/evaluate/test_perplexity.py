"""Scores against Hugging Face, mixtures and their summaries by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from cbtm_ray.cluster.partition import SCHEMA
from cbtm_ray.config import EvaluateConfig
from cbtm_ray.corpus.documents import unit_hash
from cbtm_ray.evaluate import perplexity
from cbtm_ray.evaluate.perplexity import mixture_logprobs, nested_mixtures, score_documents, summarize, tune
from cbtm_ray.evaluate.scoring import held_out_documents
from cbtm_ray.load_config import build_config
from cbtm_ray.merge.routers import ROUTERS, Route
from cbtm_ray.merge.scores import ScoredHalf
from cbtm_ray.run import Run
from tests.support.tiny import tiny_tree

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


def test_batches_hold_no_more_tokens_than_asked_for(model: LlamaForCausalLM) -> None:
    shapes: list[torch.Size] = []
    hook = model.model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    documents = [np.full(length, 7, np.int32) for length in (5, 8, 8, 7, 30, 6)]
    score_documents(model, documents, sequence_length=8, end_of_text=0, batch_tokens=20)
    hook.remove()
    scored = shapes[4:]  # the first four try the model
    assert sum(rows for rows, _ in scored) == 9
    assert max(rows * (width + 1) for rows, width in scored) <= 20
    assert max(rows for rows, _ in scored) > 1


def test_held_out_documents_are_chosen_by_their_ids_before_any_tokens_are_read(tmp_path: Path) -> None:
    """The documents with the smallest hash, in the order of the shards; memory holds little of the rest."""
    tree = tiny_tree(tmp_path / "run", tmp_path)
    tree["evaluate"]["max_documents"] = 20
    run, random = Run(build_config(tree)), np.random.default_rng(0)
    Path(run.uri("shards", "valid")).mkdir(parents=True)
    rows = [
        {"id": f"d{n}", "domain": "sea", "cluster": 0, "text_bytes": n, "tokens": np.full(4000 + n, n, np.int32)}
        for n in random.permutation(400)
    ]
    for part in range(20):
        table = pa.Table.from_pylist(rows[20 * part : 20 * (part + 1)], SCHEMA)
        pq.write_table(table, run.uri("shards", "valid", f"part-{part:05d}.parquet"), row_group_size=10)
    hashes = sorted(unit_hash(1, row["id"]) for row in rows)[:20]
    expected = [row for row in rows if unit_hash(1, row["id"]) in hashes]
    pool, before = pa.system_memory_pool(), pa.default_memory_pool()
    pa.set_memory_pool(pool)
    documents = held_out_documents(run)
    pa.set_memory_pool(before)
    assert documents.text_bytes.tolist() == [row["text_bytes"] for row in expected]
    assert all(np.array_equal(ours, row["tokens"]) for ours, row in zip(documents.tokens, expected, strict=True))
    ranks = [hashes.index(unit_hash(1, row["id"])) for row in expected]
    assert documents.for_tuning.tolist() == [rank % 2 == 0 for rank in ranks]
    assert pool.max_memory() < 4 * sum(len(row["tokens"]) for row in rows) / 2


def test_dropout_takes_no_part_in_scores() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, resid_pdrop=0.5)).train()
    documents = [np.arange(1, 40, dtype=np.int32)]
    first, second = (
        score_documents(model, documents, sequence_length=16, end_of_text=0, batch_tokens=100) for _ in range(2)
    )
    np.testing.assert_array_equal(first, second)


def held_out(n_experts: int = 3, lengths: tuple[int, ...] = (5, 9)) -> ScoredHalf:
    random = np.random.default_rng(1)
    total = sum(lengths)
    logprobs_TK = np.log(random.uniform(0.05, 0.9, (total, n_experts))).astype(np.float32)
    return ScoredHalf(np.array(lengths), logprobs_TK, random.uniform(0, 2, (total, n_experts)).astype(np.float32))


SETTINGS = {"temperature": 0.3, "beta": 1.0, "gamma": 0.9}


def route(routing: str, top_k: int, *, settings: dict[str, float] = SETTINGS, prefix_tokens: int = 3) -> Route:
    return Route(routing=routing, top_k=top_k, settings=settings, prefix_tokens=prefix_tokens)


@pytest.mark.parametrize("routing", ["embedding", "posterior", "prefix"])
def test_a_mixture_of_one_expert_is_that_expert(routing: str) -> None:
    alone = held_out(n_experts=1)
    found = mixture_logprobs(alone, route(routing, 1))
    np.testing.assert_allclose(found, alone.logprobs_TK[:, 0], atol=1e-6)


@pytest.mark.parametrize("routing", ["embedding", "posterior", "prefix"])
def test_permuting_the_experts_changes_nothing(routing: str) -> None:
    given, order = held_out(), [2, 0, 1]
    permuted = ScoredHalf(given.lengths, given.logprobs_TK[:, order], given.squared_distances_TK[:, order])
    results = [mixture_logprobs(h, route(routing, 2)) for h in (given, permuted)]
    np.testing.assert_allclose(results[0], results[1], atol=1e-5)


def test_evidence_starts_anew_with_every_document() -> None:
    evidence_TK = ROUTERS["posterior"].evidence_TK(held_out(), 0.9)
    assert (evidence_TK[[0, 5]] == 0).all()
    np.testing.assert_allclose(evidence_TK[6], held_out().logprobs_TK[5])


def test_tuning_finds_the_temperature_that_trusts_a_good_embedding() -> None:
    near = np.tile([0.0, 1.0], (40, 1)).astype(np.float32)
    logprobs_TK = np.log(np.tile([0.9, 0.01], (40, 1))).astype(np.float32)
    lengths = np.array([20, 20])
    assert tune(ScoredHalf(lengths, logprobs_TK, near), CONFIG, "embedding")[2].settings == {"temperature": 0.01}
    misled = ScoredHalf(lengths, logprobs_TK, 1 - near)
    assert tune(misled, CONFIG, "embedding")[2].settings == {"temperature": 1.0}


def test_summary_by_hand() -> None:
    """Two documents of 1 and 3 tokens, each token of probability 1/4 here and 1/2 under dense, 8 bytes of text."""
    ours, dense = np.log(np.full(4, 0.25)), np.log(np.full(4, 0.5))
    found = summarize(ours, np.array([1, 3]), 8, dense)
    assert found["ppl"] == found["ppl_low"] == found["ppl_high"] == pytest.approx(4)
    assert found["ratio_to_dense"] == found["ratio_low"] == found["ratio_high"] == pytest.approx(2)
    assert found["loss_nats"] == pytest.approx(math.log(4))
    assert found["bpb"] == pytest.approx(4 * 2 / 8)


def test_intervals_cover_documents_that_differ() -> None:
    random = np.random.default_rng(0)
    losses = np.repeat(random.normal(3, 0.5, 200), 10)
    found = summarize(-losses, np.full(200, 10), 8000, -np.full(2000, 3.0))
    standard_error = losses.reshape(200, 10)[:, 0].std() / math.sqrt(200)
    assert math.log(found["ppl_high"] / found["ppl_low"]) == pytest.approx(2 * 1.96 * standard_error, rel=0.15)
    assert found["ppl_low"] < found["ppl"] < found["ppl_high"]


def test_experts_that_run_by_hand() -> None:
    given = held_out(n_experts=8, lengths=(10, 30))
    runs = {name: route(name, 2, prefix_tokens=16).experts_run(given) for name in ("posterior", "bayes")}
    assert runs == {"posterior": 8, "bayes": 8}
    assert route("prefix", 2, prefix_tokens=16).experts_run(given) == pytest.approx((26 * 8 + 14 * 2) / 40)
    assert route("uniform", 8, settings={}).experts_run(given) == 8


@pytest.mark.parametrize("end_of_text", [0, 7])
def test_a_model_that_scales_its_logits_is_scored_as_by_hugging_face(end_of_text: int) -> None:
    """Its embedding of token 0, the padding, is zero, and so are all logits after it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = CohereConfig(**sizes, vocab_size=50, intermediate_size=32, logit_scale=4.0, pad_token_id=0)
    model = CohereForCausalLM(config).eval()
    document = np.random.default_rng(0).integers(1, 50, 8).astype(np.int32)
    with torch.no_grad():
        logprobs = model(torch.tensor([[end_of_text, *document[:-1]]])).logits[0].log_softmax(-1)
    found = score_documents(model, [document], sequence_length=8, end_of_text=end_of_text, batch_tokens=100)
    np.testing.assert_allclose(found, logprobs[np.arange(8), document], atol=1e-5)


def test_a_multiplier_that_no_list_knows_is_scored_as_by_hugging_face() -> None:
    """Falcon-H1's, where the end of text is the padding too, whose embedding is zero."""
    torch.manual_seed(0)
    config = FalconH1Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=50,
        intermediate_size=16, mamba_d_ssm=16, mamba_n_heads=2, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=4,
        lm_head_multiplier=0.25, pad_token_id=0,
    )  # fmt: skip
    model = FalconH1ForCausalLM(config).eval()
    document = np.random.default_rng(0).integers(1, 50, 8).astype(np.int32)
    with torch.no_grad():
        model.lm_head.weight *= 30  # to the size of a trained one's logits
        logprobs = model(torch.tensor([[0, *document[:-1]]])).logits[0].log_softmax(-1)
    found = score_documents(model, [document], sequence_length=8, end_of_text=0, batch_tokens=100)
    np.testing.assert_allclose(found, logprobs[np.arange(8), document], atol=1e-5)


def test_no_documents_have_no_scores(model: LlamaForCausalLM) -> None:
    assert score_documents(model, [], sequence_length=8, end_of_text=0, batch_tokens=9).shape == (0,)


@pytest.mark.parametrize(
    "fields",
    [{"temperatures": (1e-6,)}, {"temperatures": (1e6,)}, {"betas": (1e6,)}, {"gammas": (0.0,)}, {"gammas": (1.0,)}],
)
@pytest.mark.parametrize("routing", ["embedding", "posterior", "prefix"])
def test_settings_at_their_bounds_give_probabilities(routing: str, fields: dict[str, tuple[float]]) -> None:
    given = held_out(lengths=(20, 30))
    for found in tune(given, EvaluateConfig(**fields), routing).values():
        assert np.isfinite(mixture_logprobs(given, found)).all()


def test_candidates_by_hand() -> None:
    config = EvaluateConfig(temperatures=(0.1, 1.0), betas=(0.5,), gammas=(0.9, 0.8))
    assert ROUTERS["embedding"].candidates(config) == [{"temperature": 0.1}, {"temperature": 1.0}]
    expected = [{"gamma": g, "temperature": t, "beta": 0.5} for g in (0.9, 0.8) for t in (0.1, 1.0)]
    for routing in ("posterior", "prefix"):
        assert ROUTERS[routing].candidates(config) == expected


@pytest.mark.parametrize("routing", ["embedding", "posterior", "prefix"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_tuning_finds_the_best_of_all_candidates(routing: str, top_k: int) -> None:
    given = held_out(lengths=(20, 30))
    config = EvaluateConfig(prefix_tokens=4)
    losses = [
        -mixture_logprobs(given, Route(routing=routing, top_k=top_k, settings=settings, prefix_tokens=4)).mean()
        for settings in ROUTERS[routing].candidates(config)
    ]
    assert len(set(losses)) > 1 or (routing, top_k) == ("embedding", 1)
    best = ROUTERS[routing].candidates(config)[int(np.argmin(losses))]
    routes = tune(given, config, routing)
    assert [(top_k, found.top_k) for top_k, found in routes.items()] == [(1, 1), (2, 2), (3, 3)]
    assert routes[top_k].settings == best


@pytest.mark.parametrize("routing", ["embedding", "posterior", "prefix"])
def test_one_pass_gives_the_mixture_of_every_top_k(routing: str) -> None:
    given = held_out(n_experts=4, lengths=(12, 3, 0, 7))
    config = EvaluateConfig(prefix_tokens=4, temperatures=(0.3,), betas=(1.0,), gammas=(0.9,))
    expected = [-mixture_logprobs(given, route(routing, k, prefix_tokens=4)).mean() for k in range(1, 5)]
    losses: list[float] = []

    def spy(*args: np.ndarray) -> np.ndarray:
        found = nested_mixtures(*args)
        losses.extend(-found.mean(axis=0))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perplexity, "nested_mixtures", spy)
        tune(given, config, routing)
    np.testing.assert_allclose(losses, expected, rtol=1e-6)


def test_posterior_routing_turns_to_the_expert_that_explains_the_past() -> None:
    """The embedding is undecided; expert 1 gave token 0 probability 1/2 and expert 0 only 1/8: weights 1/5 and 4/5."""
    logprobs_TK = np.log([[1 / 8, 1 / 2], [1 / 10, 1 / 5]]).astype(np.float32)
    given = ScoredHalf(np.array([2]), logprobs_TK, np.ones((2, 2), np.float32))
    weights = route("posterior", 2, prefix_tokens=9).weights(given)
    np.testing.assert_allclose(weights, [[0.5, 0.5], [0.2, 0.8]], rtol=1e-5)
    mixed = mixture_logprobs(given, route("posterior", 2, prefix_tokens=9))
    np.testing.assert_allclose(np.exp(mixed), [0.5 / 8 + 0.5 / 2, 0.2 / 10 + 0.8 / 5], rtol=1e-5)


def test_without_centers_all_weigh_alike_or_by_their_likelihood_of_the_whole_past() -> None:
    """Probabilities 1/8 and 3/8, then 1/3 and 2/3: the posterior of expert 0 is 1/4, then (1/24) / (1/24 + 1/4) = 1/7."""
    logprobs_TK = np.log([[1 / 8, 3 / 8], [1 / 3, 2 / 3], [1, 1], [1 / 2, 1 / 2]]).astype(np.float32)
    given = ScoredHalf(np.array([3, 1]), logprobs_TK, np.zeros((4, 0), np.float32))
    uniform = Route(routing="uniform", top_k=2, settings={}, prefix_tokens=9).weights(given)
    np.testing.assert_array_equal(uniform, np.full((4, 2), 0.5))
    bayes = Route(routing="bayes", top_k=2, settings={}, prefix_tokens=9).weights(given)
    np.testing.assert_allclose(bayes, [[1 / 2, 1 / 2], [1 / 4, 3 / 4], [1 / 7, 6 / 7], [1 / 2, 1 / 2]], rtol=1e-5)


@pytest.mark.parametrize(("routing", "sizes"), [("uniform", [3]), ("bayes", [1, 2, 3])])
def test_routing_without_centers_has_nothing_to_tune(routing: str, sizes: list[int]) -> None:
    """Of experts that weigh alike none is better than another: only all of them are a mixture worth a row."""
    given = held_out()
    bare = ScoredHalf(given.lengths, given.logprobs_TK, np.zeros((14, 0), np.float32))
    assert {top_k: found.settings for top_k, found in tune(bare, CONFIG, routing).items()} == {k: {} for k in sizes}


def test_legacy_distances_are_for_embedding_routing_alone_and_are_kept_in_its_settings() -> None:
    given = held_out()
    legacy = tune(given, EvaluateConfig(legacy_d4=True, temperatures=(0.3,)), "embedding")[3]
    assert legacy.settings == {"temperature": 0.3, "legacy_d4": True}
    squared = ScoredHalf(given.lengths, given.logprobs_TK, given.squared_distances_TK**2)
    plain = Route(routing="embedding", top_k=3, settings={"temperature": 0.3}, prefix_tokens=32)
    np.testing.assert_allclose(legacy.weights(given), plain.weights(squared), rtol=1e-6)
    assert not np.allclose(legacy.weights(given), plain.weights(given))
    for routing in ("posterior", "prefix"):
        assert ROUTERS[routing].candidates(EvaluateConfig(legacy_d4=True)) == ROUTERS[routing].candidates(CONFIG)


def test_prefix_routing_is_held_in_each_document_by_itself() -> None:
    given = held_out(n_experts=4, lengths=(6, 2, 12))
    weights = route("prefix", 2).weights(given)
    posterior = route("posterior", 2).weights(given)
    for rows in given.documents():
        np.testing.assert_allclose(weights[rows][:4], posterior[rows][:4])
        assert len({tuple(np.flatnonzero(row)) for row in weights[rows][3:]}) <= 1
    assert not np.allclose(weights, posterior)


def test_a_summary_weighs_by_tokens_and_compares_with_itself_as_one() -> None:
    """Losses 1, 1, 1 and 5 nats in 12 bytes: perplexity e^2, though the mean over documents would be e^3."""
    logprobs, lengths = np.array([-1.0, -1.0, -1.0, -5.0], np.float32), np.array([3, 1])
    found = summarize(logprobs, lengths, 12, logprobs)
    assert found["ppl"] == pytest.approx(math.e**2)
    assert found["bpb"] == pytest.approx(8 / math.log(2) / 12)
    assert (found["ratio_to_dense"], found["ratio_low"], found["ratio_high"]) == (1, 1, 1)
    assert found["ppl_low"] == pytest.approx(math.e)
    assert found["ppl_high"] == pytest.approx(math.e**5)


@pytest.mark.parametrize("lengths", [(3, 0, 1), (0, 3, 1), (3, 1, 0)])
def test_a_document_without_tokens_adds_nothing_to_a_summary(lengths: tuple[int, ...]) -> None:
    logprobs = np.array([-1.0, -1.0, -1.0, -5.0])
    found = summarize(logprobs, np.array(lengths), 12, logprobs - 1)
    assert found["loss_nats"] == pytest.approx(2)
    assert found["ratio_to_dense"] == pytest.approx(1 / math.e)


def test_all_experts_run_where_all_are_mixed() -> None:
    given = held_out(n_experts=8, lengths=(10, 30))
    runs = [route("prefix", k, prefix_tokens=tokens).experts_run(given) for k, tokens in ((8, 16), (1, 100), (1, 0))]
    assert runs == [8, 8, 1]


def test_ngram_routes_read_no_more_than_they_may_and_gain_by_reading() -> None:
    """Evidence that names the better expert of each half of a document: following it costs reading."""
    random, lengths = np.random.default_rng(0), np.full(30, 40)
    better_T = np.concatenate([np.repeat(random.permutation(3)[:2], 20) for _ in lengths])
    ngrams_TK = (better_T[:, None] == np.arange(3)) + random.normal(0, 0.5, (1200, 3))
    logprobs_TK = np.where(better_T[:, None] == np.arange(3), -1.0, -3.0).astype(np.float32)
    given = ScoredHalf(lengths, logprobs_TK, random.random((1200, 3)), ngrams_TK.astype(np.float32))
    losses = {}
    for share in (0.02, 0.3, 9.0):
        config = EvaluateConfig(top_k=(1,), reread_costs=(0.0, 0.05, 0.2, 99.0), reread_share=share)
        routes = tune(given, config, "ngram")
        assert list(routes) == [1, 2, 3]
        assert routes[1].experts_run(given) <= 1 + share
        losses[share] = -mixture_logprobs(given, routes[1]).mean()
    assert losses[9.0] < losses[0.3] < losses[0.02]
