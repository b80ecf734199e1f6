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


SERVABLE = [name for name, router in ROUTERS.items() if router.servable]


def scored(ensemble: Ensemble, tokens: list[int]) -> ScoredHalf:
    """A text as the evaluation scores it."""
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
    return ScoredHalf(np.array([len(tokens)]), logprobs_TK, distances_TK, ensemble.ngrams.evidence(tokens_T))


def evaluated_logprobs(ensemble: Ensemble, tokens: list[int], top_k: int) -> np.ndarray:
    """Log-probability of every token as the evaluation gives it."""
    return perplexity.mixture_logprobs(scored(ensemble, tokens), ensemble.routes[top_k])


def with_free_changes(ensemble: Ensemble) -> Ensemble:
    """Routed without a cost of reading: then it does not matter where the prompt ends."""
    routes = {
        top_k: dataclasses.replace(route, settings={**route.settings, "reread_cost": 0.0})
        for top_k, route in ensemble.routes.items()
    }
    return dataclasses.replace(ensemble, routes=routes)


def check_decodes_as_evaluated(ensemble: Ensemble, top_k: int, strategy: str, lengths: tuple[int, ...]) -> None:
    """The log-probabilities of an answer after prompts of these lengths are those of the evaluation."""
    for length in lengths:
        request = make_request(TEXT[:length], top_k=top_k, sampling=GREEDY, strategy=strategy)
        steps = list(generate(ensemble, request))
        text = TEXT[:length] + [step.token for step in steps]
        given_T = evaluated_logprobs(ensemble, text, top_k)[length:]
        np.testing.assert_allclose([step.logprob for step in steps], given_T, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "opt", "cohere, which scales its logits"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_text_has_the_probability_that_evaluation_gives_it(architecture: str, top_k: int) -> None:
    """Read as a prompt, and token by token; without a prompt also where a change of experts has a cost."""
    ensemble = make_ensemble(architecture=architecture)
    expected_T = evaluated_logprobs(ensemble, TEXT, top_k)
    np.testing.assert_allclose(text_logprobs(ensemble, TEXT, top_k=top_k), expected_T, atol=1e-4)
    check_decodes_as_evaluated(ensemble, top_k, "lockstep", (0,))
    check_decodes_as_evaluated(with_free_changes(ensemble), top_k, "lockstep", (4, 11))


@pytest.mark.parametrize("routing", SERVABLE)
@pytest.mark.parametrize("strategy", ["lockstep", "speculative"])
def test_every_router_decodes_as_it_is_evaluated(routing: str, strategy: str) -> None:
    """Read as a prompt, and token by token; with this many tokens a round of drafts sees experts come and go."""
    ensemble = make_ensemble(routing=routing)
    top_k = max(ensemble.routes) if routing == "uniform" else 2
    expected_T = evaluated_logprobs(ensemble, TEXT, top_k)
    np.testing.assert_allclose(text_logprobs(ensemble, TEXT, top_k=top_k), expected_T, atol=1e-4)
    check_decodes_as_evaluated(ensemble, top_k, strategy, (0,))
    check_decodes_as_evaluated(with_free_changes(ensemble), top_k, strategy, (4, 11))


@pytest.mark.parametrize("top_k", [1, 2])
def test_an_echoed_prompt_has_the_weights_of_the_evaluation(top_k: int) -> None:
    """Experts change in it, less often than they would if reading cost nothing; the answer's first experts are the best."""
    ensemble, prompt = make_ensemble(), TEXT * 3
    route, given = ensemble.routes[top_k], scored(ensemble, [*prompt, 0])
    expected_TK = route.weights(given)
    request = make_request(prompt, top_k=top_k, max_tokens=1, echo_logprobs=True, top_logprobs=0)
    steps = list(generate(ensemble, request))
    np.testing.assert_allclose([step.weights_K for step in steps[:-1]], expected_TK[:-1], atol=1e-5)
    assert [step.expert for step in steps[:-1]] == expected_TK[:-1].argmax(axis=1).tolist()
    free_TK = with_free_changes(ensemble).routes[top_k].weights(given)
    changes, free_changes = (int(((w[1:] > 0) != (w[:-1] > 0)).any(axis=1).sum()) for w in (expected_TK, free_TK))
    assert 0 < changes < free_changes
    np.testing.assert_allclose(steps[-1].weights_K, free_TK[-1], atol=1e-5)
    plain = next(generate(ensemble, dataclasses.replace(request, echo_logprobs=False)))
    assert (plain.token, plain.logprob) == (steps[-1].token, pytest.approx(steps[-1].logprob, abs=1e-5))


def test_only_the_experts_that_answer_read_the_prompt() -> None:
    """And where another takes over in the text, it reads what it missed."""
    ensemble, read = dataclasses.replace(make_ensemble(), end_of_text=25), dict.fromkeys(range(4), 0)
    for expert, model in ensemble.experts.items():
        model.register_forward_pre_hook(
            lambda _model, _given, named, expert=expert: read.update(
                {expert: read[expert] + named["input_ids"].numel()}
            ),
            with_kwargs=True,
        )
    steps = list(generate(ensemble, make_request(TEXT, top_k=1, max_tokens=1, sampling=GREEDY)))
    assert read == {expert: (len(TEXT) + 1) * (expert == steps[0].expert) for expert in read}
    read.update(dict.fromkeys(read, 0))
    request = make_request(TEXT[:4], top_k=1, max_tokens=30, sampling=Sampling(seed=3), strategy="lockstep")
    steps = list(generate(ensemble, request))
    experts = [step.expert for step in steps]
    assert len(set(experts)) > 1
    last = {expert: 5 + index for index, expert in enumerate(experts)}
    assert read == {expert: last.get(expert, 0) for expert in read}


def next_two(ensemble: Ensemble, sampling: Sampling, prompt: list[int], top_k: int) -> np.ndarray:
    """The exact probability of every pair of tokens after a prompt, (V, V): w(x) p(y1 | x) w(x, y1) p(y2 | x, y1)."""
    vocabulary, route = len(ensemble.embedder.table_VD), ensemble.routes[top_k]

    def probabilities(tokens: list[int], answer: list[int]) -> np.ndarray:
        with torch.inference_mode():
            rows = [
                model(input_ids=torch.tensor([[0, *tokens, *answer]])).logits[0, -1].softmax(-1)
                for model in ensemble.experts.values()
            ]
        weights_K = route.weights(scored(ensemble, [*tokens, *answer, 0]))[-1]
        mixture_V = torch.stack(rows, dim=-1).double().numpy() @ weights_K
        return token_probabilities(np.log(mixture_V), sampling, tokens, answer)

    first_V = probabilities(prompt, [])
    return np.stack([first_V[token] * probabilities(prompt, [token]) for token in range(vocabulary)])


@pytest.mark.parametrize(
    ("strategy", "sampling", "routing"),
    [
        ("lockstep", {}, "ngram"),
        ("ancestral", {}, "ngram"),
        ("speculative", {}, "ngram"),
        ("speculative", {"temperature": 0.7, "top_k_tokens": 4, "frequency_penalty": 0.8}, "ngram"),
        ("ancestral", {}, "embedding"),
        ("speculative", {}, "embedding"),
    ],
)
def test_draws_are_from_the_exact_mixture(strategy: str, sampling: dict[str, Any], routing: str) -> None:
    """Chi-square over pairs of tokens, since the second depends on caches, weights and penalties that the first changed."""
    ensemble = with_free_changes(make_ensemble(vocab_size=6, routing=routing))
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


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0, repetition_penalty=1.3, presence_penalty=0.5)])
def test_greedy_speculation_gives_the_greedy_text(sampling: Sampling) -> None:
    ensemble = make_ensemble()
    for prompt, top_k in itertools.product(([], [4, 9], TEXT), (2, 4)):
        texts = [
            tokens_of(
                ensemble, prompt, top_k=top_k, max_tokens=16, sampling=sampling, strategy=strategy
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


@pytest.mark.parametrize("routing", ["embedding", "ngram"])
def test_speculation_goes_on_where_experts_come_and_go(routing: str) -> None:
    """Equal experts accept every draft, and which two of them run changes with the tokens."""
    ensemble = dataclasses.replace(make_ensemble(routing=routing), end_of_text=25)
    alike, alone = with_experts(ensemble, [0, 0, 0, 0]), with_experts(ensemble, [0])
    alike = dataclasses.replace(alike, centers_KD=ensemble.centers_KD, ngrams=ensemble.ngrams)
    request = {"prompt": TEXT[:2], "max_tokens": 40, "sampling": GREEDY}
    steps = list(generate(alike, make_request(**request, strategy="speculative")))
    assert len({tuple(np.flatnonzero(step.weights_K)) for step in steps}) > 1
    assert [step.token for step in steps] == tokens_of(alone, **request, top_k=1, strategy="lockstep")


def test_speculation_becomes_lockstep_where_experts_disagree() -> None:
    ensemble = dataclasses.replace(make_ensemble(routing="embedding"), end_of_text=25)
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
