"""Generation agrees with evaluation, and serves over HTTP what it gives in process."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cbtm_ray import evaluate
from cbtm_ray.distances import squared_distances
from cbtm_ray.generate import Context, Ensemble, Sampling, generate, load_ensemble, sample
from cbtm_ray.results import held_out_documents
from cbtm_ray.run import Run

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def ensemble(finished_run: Run) -> Ensemble:
    return load_ensemble(finished_run.dir)[0]


def read(ensemble: Ensemble, tokens: np.ndarray, top_k: int) -> list[float]:
    """Log-probability of each token after those before it, read one by one."""
    context, logprobs = Context(ensemble, top_k), []
    for token in tokens:
        logprobs.append(float(context.next_logprobs()[0][token]))
        context.append([int(token)])
    return logprobs


@pytest.mark.parametrize("top_k", [1, 2])
def test_text_has_the_probability_that_evaluation_gives_it(ensemble: Ensemble, finished_run: Run, top_k: int) -> None:
    tokens = max(held_out_documents(finished_run).tokens, key=len)[:60]
    assert len(tokens) > ensemble.prefix_tokens
    logprobs_TK = np.stack(
        [
            evaluate.score_documents(
                model, [tokens], sequence_length=100, end_of_text=ensemble.end_of_text, batch_tokens=1000
            )
            for model in ensemble.experts
        ],
        axis=1,
    )
    distances_TK = squared_distances(
        torch.from_numpy(ensemble.embedder.prefix_embeddings(tokens)), ensemble.centers_KD
    ).numpy()
    expected_T = evaluate.mixture_logprobs(
        evaluate.HeldOut(np.array([len(tokens)]), logprobs_TK, distances_TK),
        evaluate.Route(routing="prefix", top_k=top_k, settings=ensemble.settings, prefix_tokens=ensemble.prefix_tokens),
    )
    np.testing.assert_allclose(read(ensemble, tokens, top_k), expected_T, atol=1e-4)
    for prompt in (5, 20, 41):  # a prompt is read in one piece, or two where the prefix ends inside it
        context = Context(ensemble, top_k)
        context.append(tokens[:prompt].tolist())
        assert context.next_logprobs()[0][tokens[prompt]] == pytest.approx(expected_T[prompt], abs=1e-4)


def test_only_the_chosen_experts_run_after_the_prefix(ensemble: Ensemble) -> None:
    context = Context(ensemble, 1)
    context.append(list(range(40, 40 + ensemble.prefix_tokens - 1)))
    assert context.router.running == [0, 1]
    context.append([39])
    assert len(context.router.running) == 1
    weights_K = context.next_logprobs()[1]
    assert weights_K[context.router.running[0]] == 1
    assert weights_K.sum() == 1


def test_greedy_tokens_are_the_most_probable_and_seeds_repeat(ensemble: Ensemble) -> None:
    def tokens(**sampling: float) -> list[int]:
        steps = generate(ensemble, [60, 61], top_k=2, max_tokens=12, sampling=Sampling(**sampling))
        return [step.token for step in steps]

    greedy = tokens(temperature=0)
    context = Context(ensemble, 2)
    context.append([60, 61])
    for token in greedy:
        assert token == context.next_logprobs()[0].argmax()
        context.append([token])
    assert tokens(seed=3) == tokens(seed=3)
    assert len({tuple(tokens(seed=seed)) for seed in range(4)}) == 4
    assert tokens(top_p=1e-6) == greedy


def test_samples_follow_temperature_and_top_p() -> None:
    logprobs_V = np.log([0.5, 0.3, 0.15, 0.05])
    random = np.random.default_rng(0)
    drawn = [sample(logprobs_V, Sampling(temperature=0.5, top_p=0.9), random) for _ in range(4000)]
    squared = np.array([0.25, 0.09, 0.0225, 0.0025])
    kept = squared[:2] / squared[:2].sum()  # 0.685 + 0.247 pass 0.9
    assert set(drawn) == {0, 1}
    assert np.mean(np.array(drawn) == 0) == pytest.approx(kept[0], abs=0.03)


def test_too_long_requests_and_unfinished_runs_are_refused(ensemble: Ensemble, tmp_path: object) -> None:
    with pytest.raises(ValueError, match="max_tokens=1000 with a prompt of 1 tokens must be at most 127 together"):
        next(generate(ensemble, [50], top_k=1, max_tokens=1000, sampling=Sampling()))
    with pytest.raises(ValueError, match="top_k=3 must be between 1 and the number of experts, 2"):
        next(generate(ensemble, [50], top_k=3, max_tokens=5, sampling=Sampling()))
    with pytest.raises(ValueError, match=r"is not a finished run. Run first: python -m jobs\.run_all"):
        load_ensemble(str(tmp_path))
