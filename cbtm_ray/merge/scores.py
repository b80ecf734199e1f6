"""Routing as arithmetic: distances and evidence of every context -> weights over experts, sparse and summing to 1.

T tokens (of one document after the other), K experts.

All scores are log weights up to a constant. Row t of everything speaks of the context before token t.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from scipy.signal import lfilter

from cbtm_ray.errors import UserError

Settings: TypeAlias = dict[str, float]
"""temperature, beta, gamma, reread_cost, legacy_d4: the settings that a router has."""


@dataclass(frozen=True)
class ScoredHalf:
    """Scored documents: everything the mixtures of an evaluation are computed from."""

    lengths: np.ndarray
    """Tokens of each document, int64."""
    logprobs_TK: np.ndarray
    """Every expert's log-probability of every token, in nats."""
    squared_distances_TK: np.ndarray
    """From every token's context to every cluster's center; (T, 0) where the experts have no centers."""
    ngrams_TK: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    """Evidence of every token by the clusters' n-grams; empty where the clusters have none."""

    def documents(self) -> Iterator[slice]:
        """The rows of each document."""
        ends = np.cumsum(self.lengths)
        return (slice(int(end - length), int(end)) for end, length in zip(ends, self.lengths, strict=True))


def embedding_scores(squared_distances: np.ndarray, temperature: float, *, legacy_d4: bool = False) -> np.ndarray:
    """The paper's routing (section 2): w_j proportional to exp(-||h - c_j||^2 / T).

    `legacy_d4` is what the paper's released code computes: it squares a distance that is squared already, and so weighs by
    exp(-||h - c_j||^4 / T).
    """
    return -(squared_distances**2 if legacy_d4 else squared_distances) / temperature


def routing_scores(squared_distances: np.ndarray, evidence: np.ndarray, settings: Settings) -> np.ndarray:
    """The formula of all routers: -||h - c_j||^2 / T + beta * evidence_j. Experts on the last axis.

    Without a temperature the distances are not looked at: all experts are alike before the evidence. Without a beta it is 1.
    """
    scores = settings.get("beta", 1.0) * evidence
    if "temperature" in settings:
        legacy_d4 = bool(settings.get("legacy_d4"))
        scores = scores + embedding_scores(squared_distances, settings["temperature"], legacy_d4=legacy_d4)
    return scores


def evidence(logprobs_TK: np.ndarray, gamma: float) -> np.ndarray:
    """The evidence for each expert: its discounted log-likelihood of the document so far, by `gamma` a token.

    Row t is sum over s < t of gamma^(t-1-s) * logprobs[s]; row 0 is zero.
    """
    return lfilter([0.0, 1.0], [1.0, -gamma], logprobs_TK, axis=0).astype(np.float32)


def hold_after_prefix(scores_TK: np.ndarray, top_k: int, prefix_tokens: int) -> np.ndarray:
    """Prefix routing of one document: after `prefix_tokens` the best `top_k` experts of that moment stay for good.

    The other experts' scores become -inf from there on: they need not run.
    """
    held_TK = scores_TK.copy()
    if len(held_TK) > prefix_tokens:
        dropped = np.argsort(-scores_TK[prefix_tokens], kind="stable")[top_k:]
        held_TK[prefix_tokens:, dropped] = -np.inf
    return held_TK


def check_top_k(top_k: int, sizes: Collection[int]) -> None:
    """UserError unless `top_k` is one of the numbers of experts that can be mixed."""
    if top_k not in sizes:
        raise UserError(
            f"top_k={top_k} must be between {min(sizes)} and {max(sizes)}, the numbers of experts that routing can mix. "
            "Change it."
        )


def sparse_weights(scores_TK: np.ndarray, top_k: int) -> np.ndarray:
    """Softmax of the scores, kept for the `top_k` largest of each row and renormalized; ties go to the lower expert.

    One row, (K,), is welcome too.
    """
    n_experts = scores_TK.shape[-1]
    check_top_k(top_k, range(1, n_experts + 1))
    if top_k < n_experts:
        order_TK = np.argsort(-scores_TK, axis=-1, kind="stable")
        scores_TK = scores_TK.copy()
        np.put_along_axis(scores_TK, order_TK[..., top_k:], -np.inf, axis=-1)
    weights_TK = np.exp(scores_TK - scores_TK.max(axis=-1, keepdims=True))
    return weights_TK / weights_TK.sum(axis=-1, keepdims=True)
