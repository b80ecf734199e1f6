"""Routing: the context of every token -> weights over experts, sparse and summing to 1.

T tokens (of one document after the other), K experts.

All scores are log weights up to a constant. Row t of everything speaks of the context before token t.
"""

from __future__ import annotations

import numpy as np
from scipy.signal import lfilter

from cbtm_ray.errors import UserError


def embedding_scores(squared_distances_TK: np.ndarray, temperature: float, *, legacy_d4: bool = False) -> np.ndarray:
    """The paper's routing (section 2): w_j proportional to exp(-||h - c_j||^2 / T).

    `legacy_d4` is what the paper's released code computes: it squares a distance that is squared already, and so weighs by
    exp(-||h - c_j||^4 / T).
    """
    return -(squared_distances_TK**2 if legacy_d4 else squared_distances_TK) / temperature


def evidence(logprobs_TK: np.ndarray, gamma: float) -> np.ndarray:
    """What each expert's likelihood of one document's past says for it, forgetting by `gamma` a token.

    Row t is sum over s < t of gamma^(t-1-s) * logprobs[s]; row 0 is zero.
    """
    return lfilter([0.0, 1.0], [1.0, -gamma], logprobs_TK, axis=0).astype(np.float32)


def posterior_scores(
    squared_distances_TK: np.ndarray, evidence_TK: np.ndarray, temperature: float, beta: float
) -> np.ndarray:
    """The embedding as prior, the experts' likelihoods of the context as evidence, weighted by `beta`."""
    return embedding_scores(squared_distances_TK, temperature) + beta * evidence_TK


def hold_after_prefix(scores_TK: np.ndarray, top_k: int, prefix_tokens: int) -> np.ndarray:
    """Prefix routing of one document: after `prefix_tokens` the best `top_k` experts of that moment stay for good.

    The other experts' scores become -inf from there on: they need not run.
    """
    held_TK = scores_TK.copy()
    if len(held_TK) > prefix_tokens:
        dropped = np.argsort(-scores_TK[prefix_tokens], kind="stable")[top_k:]
        held_TK[prefix_tokens:, dropped] = -np.inf
    return held_TK


def nearest(squared_distances_TK: np.ndarray, n_nearest: int) -> np.ndarray:
    """Which experts are among the nearest `n_nearest` of each row, bool (T, K); ties go to the lower expert."""
    found_TK = np.zeros(squared_distances_TK.shape, bool)
    order_TK = np.argsort(squared_distances_TK, axis=1, kind="stable")
    np.put_along_axis(found_TK, order_TK[:, :n_nearest], True, axis=1)
    return found_TK


def check_top_k(top_k: int, n_experts: int) -> None:
    if not 1 <= top_k <= n_experts:
        raise UserError(f"top_k={top_k} must be between 1 and the number of experts, {n_experts}. Change it.")


def sparse_weights(scores_TK: np.ndarray, top_k: int) -> np.ndarray:
    """Softmax of the scores, kept for the `top_k` largest of each row and renormalised; ties go to the lower expert.

    Also of one row, (K,).
    """
    n_experts = scores_TK.shape[-1]
    check_top_k(top_k, n_experts)
    if top_k < n_experts:
        order_TK = np.argsort(-scores_TK, axis=-1, kind="stable")
        scores_TK = scores_TK.copy()
        np.put_along_axis(scores_TK, order_TK[..., top_k:], -np.inf, axis=-1)
    weights_TK = np.exp(scores_TK - scores_TK.max(axis=-1, keepdims=True))
    return weights_TK / weights_TK.sum(axis=-1, keepdims=True)
