"""Experts that run where a change of expert costs the tokens that the new one has to read."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cbtm_ray.merge.rereading import chosen_experts, tokens_read


def test_an_expert_takes_over_when_its_lead_is_worth_the_reading() -> None:
    """At token t expert 1 has t tokens to read, the expert that runs one."""
    scores_TK = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.9], [0.0, 3.1]])
    lengths = np.array([5])
    assert chosen_experts(scores_TK, lengths, 1, 0.0).argmax(1).tolist() == [0, 0, 1, 1, 1]
    assert chosen_experts(scores_TK, lengths, 1, 1.0).argmax(1).tolist() == [0, 0, 0, 0, 1]
    assert chosen_experts(scores_TK, lengths, 1, 9.0).argmax(1).tolist() == [0] * 5


def test_tokens_read_by_hand() -> None:
    chosen_TK = np.array([[1, 0], [1, 0], [0, 1], [1, 0], [0, 1]], bool)  # documents of 3 and of 2 tokens
    assert tokens_read(chosen_TK, np.array([3, 2])) == (2 + 3 + 1 + 2) / 5
    assert tokens_read(np.ones((5, 2), bool), np.array([3, 0, 2])) == 2


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any),
    n_experts=st.integers(1, 5),
    data=st.data(),
)
def test_documents_side_by_side_are_documents_one_by_one(
    lengths: list[int], n_experts: int, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, n_experts))
    scores_TK = np.random.default_rng(sum(lengths)).normal(size=(sum(lengths), n_experts))
    found = chosen_experts(scores_TK, np.array(lengths), top_k, 0.3)
    assert (found.sum(1) == top_k).all()
    ends = np.cumsum(lengths)
    for end, length in zip(ends, lengths, strict=True):
        rows = slice(end - length, end)
        assert np.array_equal(found[rows], chosen_experts(scores_TK[rows], np.array([length]), top_k, 0.3))
