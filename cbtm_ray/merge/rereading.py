"""Which experts run where a change of expert costs something: the new one has to read all tokens that it missed.

An expert reads a context only when it is mixed, and then in one chunk. So at every token the `top_k` experts run that have the
highest score less `reread_cost` for each token that they have yet to read. A cost of 0 is plain top-k.

T tokens (of one document after the other), K experts.
"""

from __future__ import annotations

import numpy as np


def best_after_reading(scores: np.ndarray, unread: np.ndarray, top_k: int, reread_cost: float) -> np.ndarray:
    """The `top_k` experts of each row, (..., top_k); ties go to the lower expert. Experts on the last axis."""
    costs = reread_cost * unread - scores
    if top_k == 1:
        return costs.argmin(axis=-1, keepdims=True)
    return np.argsort(costs, axis=-1, kind="stable")[..., :top_k]


def chosen_experts(scores_TK: np.ndarray, lengths: np.ndarray, top_k: int, reread_cost: float) -> np.ndarray:
    """Which experts run for every token, bool (T, K): all documents advance side by side, a token at a time."""
    chosen_TK = np.zeros(scores_TK.shape, bool)
    if reread_cost == 0 or top_k >= scores_TK.shape[1]:
        order_TK = np.argsort(-scores_TK, axis=1, kind="stable")
        np.put_along_axis(chosen_TK, order_TK[:, :top_k], True, axis=1)
        return chosen_TK
    longest_first = np.argsort(-lengths, kind="stable")
    starts, lengths = (np.cumsum(lengths) - lengths)[longest_first], lengths[longest_first]
    read_NK = np.zeros((len(lengths), scores_TK.shape[1]), np.int64)
    for position in range(int(lengths[0]) if len(lengths) else 0):
        running = int(np.searchsorted(-lengths, -position))  # documents longer than this
        rows, read = starts[:running] + position, read_NK[:running]
        best = best_after_reading(scores_TK[rows], position - read, top_k, reread_cost)
        chosen_TK[rows[:, None], best] = True
        np.put_along_axis(read, best, position, axis=1)
    return chosen_TK


def positions(lengths: np.ndarray) -> np.ndarray:
    """The position of every token in its document, (T,)."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def tokens_read(chosen_TK: np.ndarray, lengths: np.ndarray) -> float:
    """Tokens that experts read for each token that is mixed: every expert reads a document up to where it is last mixed."""
    reached_TK = chosen_TK * (positions(lengths)[:, None] + 1)
    starts = (np.cumsum(lengths) - lengths)[lengths > 0]
    return float(np.maximum.reduceat(reached_TK, starts, axis=0).sum() / lengths.sum())
