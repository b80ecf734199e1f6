"""The mixture is one of probabilities, and stays one where probabilities vanish."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import log_softmax, logsumexp

from cbtm_ray.merge import mix_logprobs


def weights_of(draw: st.DrawFn, shape: tuple[int, ...]) -> np.ndarray:
    raw = draw(hnp.arrays(np.float64, shape, elements=st.floats(0, 1)))
    raw[..., 0] += 0.1
    return raw / raw.sum(axis=-1, keepdims=True)


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities and weights, (T, K)."""
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 5)))
    return draw(hnp.arrays(np.float64, shape, elements=st.floats(-30, 0))), weights_of(draw, shape)


def test_a_mixture_by_hand() -> None:
    mixed = mix_logprobs(np.log([[0.5, 0.1], [0.2, 0.4]]), np.array([[0.25, 0.75], [1.0, 0.0]]))
    np.testing.assert_allclose(mixed, np.log([0.125 + 0.075, 0.2]))


@given(mixtures())
def test_a_mixture_is_the_logarithm_of_the_weighted_probabilities(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    logprobs, weights = drawn
    expected = np.log((weights * np.exp(logprobs)).sum(axis=1))
    np.testing.assert_allclose(mix_logprobs(logprobs, weights), expected, atol=1e-12)


@given(mixtures())
def test_a_mixture_lies_between_its_experts(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    logprobs, weights = drawn
    mixed = mix_logprobs(logprobs, weights)
    assert (mixed <= logprobs.max(axis=1) + 1e-9).all()
    assert (mixed >= logprobs.min(axis=1) - 1e-9).all()


@given(mixtures())
def test_experts_that_agree_are_the_mixture_whatever_the_weights(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    logprobs, weights = drawn
    alike = np.repeat(logprobs[:, :1], logprobs.shape[1], axis=1)
    np.testing.assert_allclose(mix_logprobs(alike, weights), logprobs[:, 0], atol=1e-9)


def test_one_expert_is_the_mixture() -> None:
    logprobs = np.random.default_rng(0).normal(size=(9, 1)) - 5
    np.testing.assert_array_equal(mix_logprobs(logprobs, np.ones((9, 1))), logprobs[:, 0])


def test_a_one_hot_weight_picks_its_expert() -> None:
    logprobs = np.random.default_rng(0).normal(size=(4, 4)) - 5
    np.testing.assert_array_equal(mix_logprobs(logprobs, np.eye(4)), np.diag(logprobs))


def test_a_mixture_over_the_vocabulary_sums_to_one() -> None:
    """Shapes (T, V, K): experts are on the last axis, whatever stands before it."""
    random = np.random.default_rng(0)
    logprobs_TVK = log_softmax(random.normal(size=(5, 11, 3)) * 9, axis=1)
    weights_T1K = random.dirichlet(np.ones(3), size=(5, 1))
    mixed_TV = mix_logprobs(logprobs_TVK, np.broadcast_to(weights_T1K, logprobs_TVK.shape))
    assert mixed_TV.shape == (5, 11)
    np.testing.assert_allclose(logsumexp(mixed_TV, axis=1), 0, atol=1e-12)


def test_very_small_probabilities_do_not_vanish() -> None:
    mixed = mix_logprobs(np.array([[-2000.0, -2001.0]]), np.array([[0.5, 0.5]]))
    assert mixed[0] == pytest.approx(-2000 + np.log(0.5 + 0.5 * np.exp(-1)))


@pytest.mark.filterwarnings("error")
def test_an_impossible_token_and_an_expert_without_weight() -> None:
    inf = np.inf
    logprobs = np.array([[-inf, -1.0], [-1.0, -inf], [-inf, -inf], [-inf, -2.0]])
    weights = np.array([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5], [0.5, 0.5]])
    np.testing.assert_allclose(mix_logprobs(logprobs, weights), [-1, -1, -inf, -2 + np.log(0.5)])
