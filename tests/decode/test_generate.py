"""The ensemble decodes as evaluation measures it, and every strategy draws from the same mixture."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from cbtm_ray.cluster.shard_steps import squared_distances
from cbtm_ray.decode.engine import Engine, generate
from cbtm_ray.decode.sampling import Sampling, token_probabilities
from cbtm_ray.decode.speculative import drafts_that_pay
from cbtm_ray.errors import UserError
from cbtm_ray.evaluate import perplexity
from cbtm_ray.merge.ensemble import Ensemble, load_ensemble
from cbtm_ray.merge.routers import ROUTERS
from cbtm_ray.merge.scores import ScoredHalf
from cbtm_ray.run import Run
from tests.support.tiny_ensemble import drain, make_ensemble, make_request, text_logprobs, tokens_of, with_experts

TEXT = [7, 3, 3, 9, 21, 14, 8, 8, 30, 2, 41, 5, 6, 17, 19, 1, 44, 12, 12, 27]
GREEDY = Sampling(temperature=0)


PREFIX = 6


def evaluated_logprobs(ensemble: Ensemble, tokens: list[int], top_k: int) -> np.ndarray:
    """Log-probability of every token as the evaluation gives it."""
    tokens_T = np.array(tokens)
    logprobs_TK = np.stack(
        [
            perplexity.score_documents(model, [tokens_T], sequence_length=60, end_of_text=0, batch_tokens=1000)
            for model in ensemble.experts.values()
        ],
        axis=1,
    )
    embeddings_TD = torch.from_numpy(ensemble.embedder.prefix_embeddings(tokens_T))
    distances_TK = squared_distances(embeddings_TD, ensemble.centers_KD).numpy()
    assert ensemble.ngrams is not None
    ngrams_TK = ensemble.ngrams.evidence(tokens_T)
    scored = ScoredHalf(np.array([len(tokens)]), logprobs_TK, distances_TK, ngrams_TK)
    return perplexity.mixture_logprobs(scored, ensemble.routes[top_k])


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "opt", "cohere, which scales its logits"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_text_has_the_probability_that_evaluation_gives_it(architecture: str, top_k: int) -> None:
    """Read as a prompt, and token by token after prompts that end before, at and after the end of the prefix."""
    ensemble = make_ensemble(architecture=architecture)
    expected_T = evaluated_logprobs(ensemble, TEXT, top_k)
    np.testing.assert_allclose(text_logprobs(ensemble, TEXT, top_k=top_k), expected_T, atol=1e-4)
    for length in (0, 4, PREFIX, 11):
        request = make_request(TEXT[:length], top_k=top_k, sampling=GREEDY, refresh_tokens=1, strategy="lockstep")
        steps = list(generate(ensemble, request))
        text = TEXT[:length] + [step.token for step in steps]
        given_T = evaluated_logprobs(ensemble, text, top_k)[length:]
        np.testing.assert_allclose([step.logprob for step in steps], given_T, atol=1e-4)


@pytest.mark.parametrize("routing", list(ROUTERS))
@pytest.mark.parametrize("strategy", ["lockstep", "speculative"])
def test_every_router_decodes_as_it_is_evaluated(routing: str, strategy: str) -> None:
    """Read as a prompt, and token by token; with this many tokens a round of drafts sees experts come and go."""
    ensemble = make_ensemble(routing=routing)
    top_k = max(ensemble.routes) if routing == "uniform" else 2
    expected_T = evaluated_logprobs(ensemble, TEXT, top_k)
    np.testing.assert_allclose(text_logprobs(ensemble, TEXT, top_k=top_k), expected_T, atol=1e-4)
    for length in (0, 4, PREFIX, 11):
        request = make_request(TEXT[:length], top_k=top_k, sampling=GREEDY, refresh_tokens=1, strategy=strategy)
        steps = list(generate(ensemble, request))
        text = TEXT[:length] + [step.token for step in steps]
        given_T = evaluated_logprobs(ensemble, text, top_k)[length:]
        np.testing.assert_allclose([step.logprob for step in steps], given_T, atol=1e-4)


def test_only_the_chosen_experts_have_weight_after_the_prefix() -> None:
    ensemble = make_ensemble()
    steps = list(generate(ensemble, make_request(TEXT, max_tokens=0, echo_logprobs=True)))
    weights_TK = np.stack([step.weights_K for step in steps])
    np.testing.assert_allclose(weights_TK.sum(axis=1), 1)
    chosen = set(np.flatnonzero(weights_TK[PREFIX]))
    assert len(chosen) == 2
    assert all(set(np.flatnonzero(weights_K)) == chosen for weights_K in weights_TK[PREFIX:])
    assert [step.expert for step in steps] == weights_TK.argmax(axis=1).tolist()


def next_two(ensemble: Ensemble, sampling: Sampling, prompt: list[int], top_k: int) -> np.ndarray:
    """The exact probability of every pair of tokens after a prompt, (V, V), whose weights stay those of the prompt's evidence.

    The pairs' probability is w(x) p(y1 | x) w(x, y1) p(y2 | x, y1), where only the embedding sees y1.
    """
    vocabulary, route = len(ensemble.embedder.table_VD), ensemble.routes[top_k]
    settings, beta = route.settings, route.settings["beta"] if route.router.evidence else 0
    pairs_VV = np.zeros((vocabulary, vocabulary))

    def after(tokens: list[int]) -> np.ndarray:
        with torch.inference_mode():
            rows = [
                model(input_ids=torch.tensor([[0, *tokens]])).logits[0].log_softmax(-1)
                for model in ensemble.experts.values()
            ]
        return torch.stack(rows, dim=-1).double().numpy()  # (T, V, K)

    def weights(tokens: list[int], evidence_K: np.ndarray) -> np.ndarray:
        h_D = ensemble.embedder.prefix_embeddings(np.array([*tokens, 0]))[-1]
        scores_K = -((h_D - ensemble.centers_KD.numpy()) ** 2).sum(1) / settings["temperature"]
        scores_K = scores_K + beta * evidence_K
        scores_K[np.argsort(-scores_K)[top_k:]] = -np.inf
        return np.exp(scores_K) / np.exp(scores_K).sum()

    rows_TVK = after(prompt)
    evidence_K = np.zeros(len(ensemble.experts))
    for position, token in enumerate(prompt):
        evidence_K = settings["gamma"] * evidence_K + rows_TVK[position, token]
    first_V = token_probabilities(np.log(np.exp(rows_TVK[-1]) @ weights(prompt, evidence_K)), sampling, prompt, [])
    for token in range(vocabulary):
        mixture_V = np.exp(after([*prompt, token])[-1]) @ weights([*prompt, token], evidence_K)
        pairs_VV[token] = first_V[token] * token_probabilities(np.log(mixture_V), sampling, prompt, [token])
    return pairs_VV


@pytest.mark.parametrize(
    ("strategy", "sampling", "routing"),
    [
        ("lockstep", {}, "prefix"),
        ("ancestral", {}, "prefix"),
        ("speculative", {}, "prefix"),
        ("speculative", {"temperature": 0.7, "top_k_tokens": 4, "frequency_penalty": 0.8}, "prefix"),
        ("ancestral", {}, "embedding"),
        ("speculative", {}, "embedding"),
    ],
)
def test_draws_are_from_the_exact_mixture(strategy: str, sampling: dict[str, Any], routing: str) -> None:
    """Chi-square over pairs of tokens, since the second depends on caches, weights and penalties that the first changed."""
    ensemble = make_ensemble(vocab_size=6, prefix_tokens=20, routing=routing)
    prompt, draws = [3, 1, 5], 1000
    requests = [
        make_request(prompt, max_tokens=2, top_k=3, strategy=strategy, sampling=Sampling(seed=seed, **sampling))
        for seed in range(draws)
    ]
    counts_VV = np.zeros((6, 6))
    for steps in drain(Engine(ensemble, max_sequences=300, cache_tokens=2000), requests):
        counts_VV[steps[0].token, steps[1].token if len(steps) > 1 else 0] += 1
    expected_VV = next_two(ensemble, Sampling(**sampling), prompt, top_k=3)
    expected_VV[0] = [expected_VV[0].sum(), *[0] * 5]  # nothing follows the end of the text
    possible = expected_VV * draws >= 5
    assert counts_VV[expected_VV == 0].sum() == 0
    rest = [counts_VV[~possible].sum()], [draws * expected_VV[~possible].sum()]
    observed = np.concatenate([counts_VV[possible], *([rest[0]] if rest[1][0] > 0 else [])])
    expected = np.concatenate([draws * expected_VV[possible], *([rest[1]] if rest[1][0] > 0 else [])])
    assert chisquare(observed, expected).pvalue > 1e-3


@pytest.mark.parametrize("refresh_tokens", [1, 5])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0, repetition_penalty=1.3, presence_penalty=0.5)])
def test_greedy_speculation_gives_the_greedy_text(refresh_tokens: int, sampling: Sampling) -> None:
    ensemble = make_ensemble()
    for prompt, top_k in itertools.product(([], [4, 9], TEXT), (2, 4)):
        texts = [
            tokens_of(
                ensemble, prompt, top_k=top_k, max_tokens=16, sampling=sampling, strategy=strategy,
                refresh_tokens=refresh_tokens,
            )
            for strategy in ("lockstep", "speculative")
        ]  # fmt: skip
        assert texts[0] == texts[1]


def passes(ensemble: Ensemble, strategy: str) -> list[int]:
    """How many tokens each pass gave, of 40 after a prompt."""
    request = make_request([5], max_tokens=40, sampling=GREEDY, strategy=strategy)
    engine, found = Engine(ensemble, max_sequences=1, cache_tokens=60), list[int]()
    engine.add(request)
    while engine.running or engine.waiting:
        found.append(len(engine.step()))
    return found


def test_speculation_drafts_more_where_experts_agree() -> None:
    """Equal experts accept every draft: up to 9 tokens a round."""
    ensemble = dataclasses.replace(with_experts(make_ensemble(), [0, 0]), end_of_text=25)  # it does not come for long
    rounds = [tokens for tokens in passes(ensemble, "speculative") if tokens]
    assert sum(rounds) == 40
    assert rounds[:-1] == sorted(rounds[:-1])
    assert (rounds[0], max(rounds)) == (3, 9)


@pytest.mark.parametrize("routing", ["embedding", "nearest_prefix"])
@pytest.mark.parametrize("refresh_tokens", [1, 5])
def test_speculation_goes_on_where_experts_come_and_go(routing: str, refresh_tokens: int) -> None:
    """Equal experts accept every draft, and which two of them run changes with the tokens."""
    ensemble = dataclasses.replace(make_ensemble(routing=routing, prefix_tokens=30), end_of_text=25)
    alike, alone = with_experts(ensemble, [0, 0, 0, 0]), with_experts(ensemble, [0])
    alike = dataclasses.replace(alike, centers_KD=ensemble.centers_KD)
    request = {"prompt": TEXT[:2], "max_tokens": 40, "sampling": GREEDY, "refresh_tokens": refresh_tokens}
    steps = list(generate(alike, make_request(**request, strategy="speculative")))
    assert (
        len({tuple(np.flatnonzero(step.weights_K)) for step in steps[: 28 if routing == "nearest_prefix" else 40]}) > 1
    )
    assert [step.token for step in steps] == tokens_of(alone, **request, top_k=1, strategy="lockstep")


def test_speculation_becomes_lockstep_where_experts_disagree() -> None:
    ensemble = dataclasses.replace(make_ensemble(), end_of_text=25)
    rounds = [tokens for tokens in passes(ensemble, "speculative") if tokens]
    assert rounds[10:] == [1] * len(rounds[10:])
    assert len(passes(ensemble, "speculative")) < 1.2 * len(passes(ensemble, "lockstep"))


def test_as_many_drafts_as_pay() -> None:
    """By hand, for 0.45, tokens a pass without drafts, with one and two: 1/2 and 1.45/3 of two experts, 1/4, 1.45/5 and
    1.65/6 of four."""
    assert [drafts_that_pay(agreement, 2) for agreement in (0.0, 0.45, 1.0)] == [0, 0, 8]
    assert drafts_that_pay(0.45, 4) == 1
    assert drafts_that_pay(1.0, 1) == 0


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("strategy", ["lockstep", "speculative"])
def test_one_expert_is_itself(architecture: str, strategy: str) -> None:
    """Greedy text is that of Hugging Face's generate."""
    ensemble = make_ensemble(1, architecture=architecture)
    model, prompt = ensemble.experts[0], torch.tensor([[0, *TEXT[:9]]])
    expected = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, eos_token_id=0,
        pad_token_id=0,
    )[0, 10:].tolist()  # fmt: skip
    assert tokens_of(ensemble, TEXT[:9], top_k=1, sampling=GREEDY, strategy=strategy) == expected


def test_equal_experts_are_the_expert_whatever_the_weights() -> None:
    ensemble = make_ensemble()
    alike, alone = with_experts(ensemble, [0, 0, 0]), with_experts(ensemble, [0])
    np.testing.assert_allclose(text_logprobs(alike, TEXT, top_k=3), text_logprobs(alone, TEXT, top_k=1), atol=1e-5)


def test_the_order_of_experts_does_not_matter() -> None:
    ensemble, order = make_ensemble(), [2, 0, 3, 1]
    np.testing.assert_allclose(
        text_logprobs(ensemble, TEXT), text_logprobs(with_experts(ensemble, order), TEXT), atol=1e-5
    )
    steps = [
        list(generate(either, make_request(TEXT, sampling=GREEDY)))
        for either in (ensemble, with_experts(ensemble, order))
    ]
    assert [step.token for step in steps[0]] == [step.token for step in steps[1]]
    assert [step.expert for step in steps[0]] == [order[step.expert] for step in steps[1]]


@pytest.mark.parametrize("strategy", ["lockstep", "ancestral", "speculative"])
def test_seeds_repeat(strategy: str) -> None:
    texts = [tuple(tokens_of(make_ensemble(), TEXT, sampling=Sampling(seed=s), strategy=strategy)) for s in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.ray
def test_a_finished_run_decodes(finished_run: Run, tmp_path: object) -> None:
    ensemble, tokenizer = load_ensemble(finished_run.dir)
    steps = list(generate(ensemble, make_request([60, 61], sampling=GREEDY)))
    assert 1 <= len(steps) <= 12
    assert all(0 <= step.token < len(tokenizer) for step in steps)
    with pytest.raises(UserError, match=r"is not a finished run. Run first: python -m jobs\.run_all"):
        load_ensemble(str(tmp_path))
