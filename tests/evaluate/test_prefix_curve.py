"""Routing held after a prefix: by hand, and what it is at both ends."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cbtm_ray.evaluate.perplexity import oracle_logprobs
from cbtm_ray.evaluate.prefix_curve import gain_sentence, gain_share, hold, prefix_rows, share_of_gain
from cbtm_ray.merge.rereading import positions
from cbtm_ray.merge.routers import Route
from cbtm_ray.merge.scores import ScoredHalf


def scored(lengths: list[int], n_experts: int, seed: int = 0) -> ScoredHalf:
    random, total = np.random.default_rng(seed), sum(lengths)
    return ScoredHalf(
        np.array(lengths),
        -random.exponential(2, (total, n_experts)).astype(np.float32),
        random.random((total, n_experts)).astype(np.float32),
        random.normal(size=(total, n_experts)).astype(np.float32),
    )


def route(routing: str, top_k: int) -> Route:
    settings = {"temperature": 0.3} if routing == "embedding" else {"beta": 1.0, "gamma": 1.0}
    return Route(routing=routing, top_k=top_k, settings=settings, prefix_tokens=0)


def test_weights_are_held_by_hand() -> None:
    weights_TK = np.arange(8.0)[:, None]
    assert positions(np.array([5, 3])).tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert hold(weights_TK, np.array([5, 3]), 2)[:, 0].tolist() == [0, 1, 2, 2, 2, 5, 6, 7]
    assert hold(weights_TK, np.array([5, 3]), 0)[:, 0].tolist() == [0] * 5 + [5] * 3


def test_a_row_by_hand() -> None:
    """Two documents of which one is longer than the prefix: its first choice stays for its last two tokens."""
    held_out = ScoredHalf(
        np.array([3, 1]),
        np.log(np.array([[0.5, 0.1], [0.2, 0.4], [0.1, 0.8], [0.9, 0.9]], np.float32)),
        np.zeros((4, 2), np.float32),
        np.array([[1, 0], [0, 5], [0, 0], [0, 0]], np.float32),
    )
    dense_T = np.log(np.full(4, 0.25, np.float32))
    oracle, held, running = prefix_rows(held_out, dense_T, [route("ngram", 1)], [1, 3])
    assert (held["prefix_tokens"], held["tokens"], held["held"], running["held"]) == (1, 2, True, False)
    assert held["loss_nats"] == pytest.approx(-np.log([0.2, 0.1]).mean(), rel=1e-5)
    assert running["loss_nats"] == pytest.approx(-np.log([0.2, 0.8]).mean(), rel=1e-5)
    assert oracle["loss_nats"] == pytest.approx(-np.log([0.4, 0.8]).mean(), rel=1e-5)
    assert running["ratio_to_dense"] == pytest.approx(0.25 / 0.4, rel=1e-5)


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), n=st.integers(1, 8), seed=st.integers(0, 99))
def test_one_expert_is_the_oracle_and_holding_the_last_token_changes_nothing(
    lengths: list[int], n: int, seed: int
) -> None:
    one, two = scored(lengths, 1, seed), scored(lengths, 2, seed)
    for row in prefix_rows(one, one.logprobs_TK[:, 0], [route("ngram", 1)], [n]):
        assert row["ratio_to_dense"] == pytest.approx(1)
    last = max(lengths) - 1
    rows = prefix_rows(two, two.logprobs_TK[:, 0], [route("ngram", 2), route("embedding", 1)], [last]) if last else []
    for held, running in zip(rows[1::2], rows[2::2], strict=True):
        assert held["loss_nats"] == pytest.approx(running["loss_nats"])
    assert len(prefix_rows(two, two.logprobs_TK[:, 0], [route("ngram", 1)], [last + 1])) == 0


def test_the_oracle_takes_one_expert_a_document() -> None:
    held_out = scored([4, 2, 5], 3)
    best = oracle_logprobs(held_out)
    for rows in held_out.documents():
        assert best[rows].sum() == pytest.approx(held_out.logprobs_TK[rows].sum(axis=0).max())


def test_the_share_of_the_gain_by_hand() -> None:
    """Two documents alike, of losses 4 by the embedding, 3.85 held and 3.8 going on: 0.15 of 0.2, in every draw."""
    lengths = np.array([3, 3])
    paper_T, held_T, full_T = (np.full(6, -loss) for loss in (4.0, 3.85, 3.8))
    found = gain_share(paper_T, held_T, full_T, lengths)
    assert found is not None
    assert [found["share"], found["low"], found["high"]] == pytest.approx([0.75] * 3)
    assert gain_share(paper_T, held_T, paper_T, lengths) is None
    rare_T = np.where(np.arange(6) < 3, full_T, paper_T)  # a draw may have the second document alone
    assert gain_share(paper_T, rare_T, rare_T, lengths) == {"share": 1.0, "low": None, "high": None}


def test_the_gain_stands_in_the_row_of_held_n_grams_of_one_expert() -> None:
    held_out = scored([9, 9, 9], 3)
    held_out.logprobs_TK[:] -= 5 * (np.arange(3) > 0)
    held_out.ngrams_TK[:] = [1, 0, 0]  # the n-grams know the best expert
    routes = [route("embedding", 1), route("ngram", 1), route("ngram", 2)]
    rows = prefix_rows(held_out, held_out.logprobs_TK[:, 0], routes, [2, 32])
    assert [(row["routing"], row["top_k"], row["held"]) for row in rows if "gain" in row] == [("ngram", 1, True)]
    gain = share_of_gain(rows, 2)
    assert gain is not None
    assert gain["share"] == pytest.approx(1)
    assert share_of_gain(rows, 32) is None
    assert gain_sentence(rows) is None
    interval = {"share": 0.754, "low": 0.61, "high": 0.9}
    assert "keeps 75 [61, 90] % of its gain" in str(gain_sentence([rows[0] | {"prefix_tokens": 32, "gain": interval}]))  # type: ignore[list-item]
    assert prefix_rows(held_out, held_out.logprobs_TK[:, 0], routes[1:], [2])[1].keys() == rows[0].keys()
