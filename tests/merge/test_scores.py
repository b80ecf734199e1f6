"""Routing weights: by hand, and as properties of a softmax."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cbtm_ray.errors import UserError
from cbtm_ray.merge.scores import (
    embedding_scores,
    evidence,
    hold_after_prefix,
    routing_scores,
    sparse_weights,
)


@st.composite
def scores_and_top_k(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 7)))
    scores = draw(hnp.arrays(np.float32, shape, elements=st.floats(-50, 50, width=32)))
    return scores, draw(st.integers(1, shape[1]))


def distinct_scores(rows: int, experts: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, experts)).astype(np.float32)


@given(scores_and_top_k())
def test_weights_sum_to_one_over_at_most_top_k_experts(drawn: tuple[np.ndarray, int]) -> None:
    scores, top_k = drawn
    weights = sparse_weights(scores, top_k)
    assert weights.shape == scores.shape
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-5)
    assert (weights >= 0).all()
    assert ((weights > 0).sum(axis=1) <= top_k).all()
    best = np.take_along_axis(weights, scores.argmax(axis=1)[:, None], axis=1)[:, 0]
    np.testing.assert_array_equal(best, weights.max(axis=1))


@given(scores_and_top_k())
def test_a_constant_in_the_scores_changes_nothing(drawn: tuple[np.ndarray, int]) -> None:
    scores, top_k = drawn
    whole = np.round(scores)  # so that adding 16 rounds nothing away
    np.testing.assert_allclose(sparse_weights(whole + 16, top_k), sparse_weights(whole, top_k), atol=1e-6)


@pytest.mark.parametrize("top_k", [1, 2, 3, 5])
def test_exactly_the_best_experts_have_weight_in_the_ratio_of_their_scores(top_k: int) -> None:
    scores = distinct_scores(20, 5)
    weights = sparse_weights(scores, top_k)
    for row, weight in zip(scores, weights, strict=True):
        best = np.argsort(row)[::-1][:top_k]
        assert set(np.flatnonzero(weight)) == set(best)
        np.testing.assert_allclose(weight[best], np.exp(row[best]) / np.exp(row[best]).sum(), rtol=1e-5)


def test_ties_go_to_the_lower_expert() -> None:
    assert sparse_weights(np.array([[1.0, 2.0, 2.0, 2.0]]), 2).tolist() == [[0, 0.5, 0.5, 0]]
    assert sparse_weights(np.zeros((1, 3)), 1).tolist() == [[1, 0, 0]]


def test_the_scores_are_left_as_they_are() -> None:
    scores = distinct_scores(4, 5)
    before = scores.copy()
    sparse_weights(scores, 2)
    hold_after_prefix(scores, 2, 1)
    assert np.array_equal(scores, before)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_renamed_experts_have_the_same_weights(top_k: int) -> None:
    scores, order = distinct_scores(10, 4), np.array([2, 0, 3, 1])
    np.testing.assert_allclose(
        sparse_weights(scores[:, order], top_k), sparse_weights(scores, top_k)[:, order], rtol=1e-6
    )


@pytest.mark.parametrize("top_k", [0, -1, 4])
def test_a_top_k_outside_the_experts_is_refused(top_k: int) -> None:
    with pytest.raises(
        UserError, match=rf"top_k={top_k} must be between 1 and 3, the numbers of experts that routing can mix\. Change"
    ):
        sparse_weights(np.zeros((2, 3)), top_k)


def test_embedding_routing_by_hand() -> None:
    """exp(-d^2 / T) with T = 0.5: exp(0), exp(-1), exp(-2) over their sum."""
    weights = sparse_weights(embedding_scores(np.array([[0.0, 0.5, 1.0]]), temperature=0.5), 3)
    total = 1 + np.exp(-1) + np.exp(-2)
    np.testing.assert_allclose(weights, [[1 / total, np.exp(-1) / total, np.exp(-2) / total]])


def test_the_released_code_squares_twice() -> None:
    """Distances 0, 1 and 2 are squared distances 0, 1 and 4; with T = 8 the weights go as exp(0), exp(-1/8), exp(-16/8)."""
    weights = sparse_weights(embedding_scores(np.array([[0.0, 1.0, 4.0]]), 8.0, legacy_d4=True), 3)
    total = 1 + np.exp(-1 / 8) + np.exp(-2)
    np.testing.assert_allclose(weights, [[1 / total, np.exp(-1 / 8) / total, np.exp(-2) / total]])


def test_a_low_temperature_takes_the_nearest_and_a_high_one_all_alike() -> None:
    distances = np.array([[0.3, 0.1, 0.2], [0.0, 0.5, 0.4]])
    np.testing.assert_allclose(sparse_weights(embedding_scores(distances, 1e-4), 3), [[0, 1, 0], [1, 0, 0]], atol=1e-9)
    np.testing.assert_allclose(sparse_weights(embedding_scores(distances, 1e6), 3), 1 / 3, atol=1e-6)


def test_evidence_by_hand() -> None:
    """Row 3 is gamma^2 * a + gamma * b + c."""
    logprobs = np.array([[-1, -8], [-2, -4], [-3, -2], [-99, -99]], np.float32)
    expected = [[0, 0], [-1, -8], [-0.5 - 2, -4 - 4], [-0.25 - 1 - 3, -2 - 2 - 2]]
    np.testing.assert_allclose(evidence(logprobs, 0.5), expected)


@given(
    logprobs=hnp.arrays(
        np.float32, st.tuples(st.integers(0, 12), st.integers(1, 4)), elements=st.floats(-20, 0, width=16)
    ),
    gamma=st.floats(0, 1),
)
def test_evidence_is_the_sum_of_its_definition(logprobs: np.ndarray, gamma: float) -> None:
    expected = np.zeros(logprobs.shape)
    for t in range(len(logprobs)):
        for s in range(t):
            expected[t] += gamma ** (t - 1 - s) * logprobs[s]
    np.testing.assert_allclose(evidence(logprobs, gamma), expected, rtol=1e-5, atol=1e-4)


def test_evidence_does_not_see_the_present_or_later_tokens() -> None:
    logprobs = distinct_scores(8, 3)
    changed = logprobs.copy()
    changed[5:] = -7
    assert np.array_equal(evidence(changed, 0.9)[:6], evidence(logprobs, 0.9)[:6])


@pytest.mark.parametrize(
    ("settings", "scores"),
    [
        ({"temperature": 0.5, "beta": 2.0, "gamma": 0.9}, [-2 - 6, -4 - 2]),
        ({"temperature": 0.5, "legacy_d4": True}, [-2 - 3, -8 - 1]),
        ({}, [-3, -1]),
    ],
)
def test_scores_by_hand(settings: dict[str, float], scores: list[float]) -> None:
    """Squared distances 1 and 2, evidence -3 and -1, for a batch and for one context."""
    distances, past = np.array([1.0, 2.0]), np.array([-3.0, -1.0])
    np.testing.assert_allclose(routing_scores(distances, past, settings), scores)
    np.testing.assert_allclose(routing_scores(distances[None], past[None], settings), [scores])


def test_after_the_prefix_the_best_of_that_moment_stay() -> None:
    scores = np.array([[3, 2, 1], [1, 2, 3], [1, 3, 2], [9, 0, 0], [0, 0, 9]], np.float32)
    expected = scores.copy()
    expected[2:, 0] = -np.inf  # at token 2 experts 1 and 2 are best
    np.testing.assert_array_equal(hold_after_prefix(scores, 2, 2), expected)
    weights = sparse_weights(hold_after_prefix(scores, 1, 2), 1)
    assert weights.argmax(axis=1).tolist() == [0, 2, 1, 1, 1]


def test_held_experts_still_share_by_their_present_scores() -> None:
    scores = np.array([[0, 5, 4], [9, 0, np.log(3)]], np.float32)
    weights = sparse_weights(hold_after_prefix(scores, 2, 0), 2)
    np.testing.assert_allclose(weights[1], [0, 0.25, 0.75], rtol=1e-6)


@pytest.mark.parametrize("prefix_tokens", [4, 5, 100])
def test_a_document_within_the_prefix_is_not_held(prefix_tokens: int) -> None:
    scores = distinct_scores(4, 3)
    assert np.array_equal(hold_after_prefix(scores, 1, prefix_tokens), scores)


def test_holding_all_experts_changes_nothing() -> None:
    scores = distinct_scores(6, 3)
    assert np.array_equal(hold_after_prefix(scores, 3, 2), scores)


def test_holding_ties_keeps_the_lower_expert() -> None:
    held = hold_after_prefix(np.zeros((2, 3), np.float32), 1, 1)
    assert held.tolist() == [[0, 0, 0], [0, -np.inf, -np.inf]]
