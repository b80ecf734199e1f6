"""Perplexity on held-out documents: every token predicted once, mixtures computed from the experts' saved log-probabilities.

T tokens (of one document after the other), K experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from cbtm_ray.config import EvaluateConfig
from cbtm_ray.loss import TokenLoss
from cbtm_ray.merge import mix_logprobs
from cbtm_ray.route import embedding_scores, evidence, hold_after_prefix, nearest, posterior_scores, sparse_weights

BOOTSTRAP = 1000
PREFIX_ROUTINGS = ("prefix", "nearest_prefix")


@dataclass(frozen=True)
class HeldOut:
    """Everything the mixtures are computed from, for the documents of one half of the held-out set."""

    lengths: np.ndarray
    """Tokens of each document, int64."""
    logprobs_TK: np.ndarray
    """Every expert's log-probability of every token, in nats."""
    squared_distances_TK: np.ndarray
    """Of every token's context to every cluster's centre; (T, 0) where the experts have no centres."""
    _evidence: dict[float, np.ndarray] = field(default_factory=dict, repr=False, compare=False)
    """That of the last gamma asked for: tuning goes through all else before it takes another."""

    def documents(self) -> Iterator[slice]:
        ends = np.cumsum(self.lengths)
        return (slice(int(end - length), int(end)) for end, length in zip(ends, self.lengths, strict=True))

    def evidence(self, gamma: float) -> np.ndarray:
        """Every expert's evidence before every token, (T, K); each document starts anew."""
        if gamma not in self._evidence:
            self._evidence.clear()
            parts = [evidence(self.logprobs_TK[rows], gamma) for rows in self.documents()]
            self._evidence[gamma] = np.concatenate(parts)
        return self._evidence[gamma]


@dataclass(frozen=True, kw_only=True)
class Route:
    """One way of routing, with its settings."""

    routing: str
    """'embedding', 'posterior', 'prefix' (posterior, then held) or 'nearest_prefix' (the same, but only the experts nearest to
    the context read the prefix); without centres 'uniform', or 'bayes' (the posterior of the experts' likelihoods of the whole
    past under a uniform prior, as in BTM)."""
    top_k: int
    """Experts mixed for a token."""
    settings: dict[str, float]
    """embedding: temperature and legacy_d4; posterior and prefix: temperature, beta and gamma; nearest_prefix: these and
    prefix_experts; the others have none."""
    prefix_tokens: int
    """Tokens of a document after which prefix routing holds its experts."""


def score_documents(
    model: PreTrainedModel,
    documents: list[np.ndarray],
    *,
    sequence_length: int,
    end_of_text: int,
    batch_tokens: int,
) -> np.ndarray:
    """Log-probability of every token in nats, float32, one document after the other.

    A document begins after an end-of-text token. Longer ones are cut into windows that begin with the last token of the
    window before, so that every token is predicted exactly once.
    """
    streams = [np.concatenate([[end_of_text], document]).astype(np.int64) for document in documents]
    starts = np.cumsum([0, *(len(document) for document in documents)])
    windows = [
        (int(start) + first, stream[first : first + sequence_length + 1])
        for start, stream in zip(starts, streams, strict=False)
        for first in range(0, len(stream) - 1, sequence_length)
    ]
    windows.sort(key=lambda window: len(window[1]))
    logprobs = np.zeros(int(starts[-1]), np.float32)
    model.eval()
    token_loss = TokenLoss(model, torch.full((1, 3), end_of_text, device=model.device))
    for batch in _batches(windows, batch_tokens):
        width = len(batch[-1][1])
        padded = np.full((len(batch), width), end_of_text, np.int64)
        for row, (_, tokens) in enumerate(batch):
            padded[row, : len(tokens)] = tokens
        with torch.inference_mode():
            losses_BT = token_loss(torch.from_numpy(padded).to(model.device)).reshape(len(batch), width - 1)
        for (position, tokens), losses_T in zip(batch, losses_BT.float().cpu().numpy(), strict=True):
            logprobs[position : position + len(tokens) - 1] = -losses_T[: len(tokens) - 1]
    return logprobs


def _batches(windows: list[tuple[int, np.ndarray]], batch_tokens: int) -> Iterator[list[tuple[int, np.ndarray]]]:
    """Neighbours in length together, at most `batch_tokens` with the padding, at least one window."""
    batch: list[tuple[int, np.ndarray]] = []
    for window in windows:
        if batch and (len(batch) + 1) * len(window[1]) > batch_tokens:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def candidates(routing: str, config: EvaluateConfig) -> list[dict[str, float]]:
    """The settings to choose from for one way of routing."""
    if routing in ("uniform", "bayes"):
        return [{}]
    if routing == "embedding":
        legacy = {"legacy_d4": True} if config.legacy_d4 else {}
        return [{"temperature": temperature, **legacy} for temperature in config.temperatures]
    fixed = {"prefix_experts": float(config.prefix_experts or 0)} if routing == "nearest_prefix" else {}
    return [
        {"gamma": gamma, "temperature": temperature, "beta": beta, **fixed}
        for gamma in config.gammas
        for temperature in config.temperatures
        for beta in config.betas
    ]


def mixture_logprobs(held_out: HeldOut, route: Route) -> np.ndarray:
    """The mixture's log-probability of every token, (T,)."""
    return mix_logprobs(held_out.logprobs_TK, routing_weights(held_out, route))


def routing_weights(held_out: HeldOut, route: Route) -> np.ndarray:
    """Weights of the experts for every token, (T, K)."""
    scores_TK = _scores(held_out, route.routing, route.settings, route.prefix_tokens)
    if route.routing in PREFIX_ROUTINGS:
        held = [hold_after_prefix(scores_TK[rows], route.top_k, route.prefix_tokens) for rows in held_out.documents()]
        scores_TK = np.concatenate(held)
    return sparse_weights(scores_TK, route.top_k)


def _scores(held_out: HeldOut, routing: str, settings: dict[str, float], prefix_tokens: int) -> np.ndarray:
    distances_TK = held_out.squared_distances_TK
    if routing == "uniform":
        return np.zeros_like(held_out.logprobs_TK)
    if routing == "bayes":
        return held_out.evidence(gamma=1.0)
    if routing == "embedding":
        return embedding_scores(distances_TK, settings["temperature"], legacy_d4=bool(settings.get("legacy_d4")))
    evidence_TK = held_out.evidence(settings["gamma"])
    scores_TK = posterior_scores(distances_TK, evidence_TK, settings["temperature"], settings["beta"])
    if routing == "nearest_prefix":
        for rows in held_out.documents():
            prefix = slice(rows.start, min(rows.start + prefix_tokens + 1, rows.stop))  # and the row that chooses
            scores_TK[prefix][~nearest(distances_TK[prefix], int(settings["prefix_experts"]))] = -np.inf
    return scores_TK


def tune(held_out: HeldOut, config: EvaluateConfig, *, routing: str, sizes: list[int]) -> list[Route]:
    """For each top-k of `sizes` the route of least loss on these documents, which must not be those reported on."""
    best = {top_k: (math.inf, dict[str, float]()) for top_k in sizes}
    for settings in candidates(routing, config):
        scores_TK = _scores(held_out, routing, settings, config.prefix_tokens)
        order_TK = np.argsort(-scores_TK, axis=1, kind="stable")
        if routing in PREFIX_ROUTINGS:
            for rows in held_out.documents():
                order_TK[rows][config.prefix_tokens :] = order_TK[rows][config.prefix_tokens : config.prefix_tokens + 1]
        losses_K = -nested_mixtures(held_out.logprobs_TK, scores_TK, order_TK).mean(axis=0)
        for top_k in sizes:
            if losses_K[top_k - 1] < best[top_k][0]:
                best[top_k] = float(losses_K[top_k - 1]), settings
    return [
        Route(routing=routing, top_k=top_k, settings=settings, prefix_tokens=config.prefix_tokens)
        for top_k, (_, settings) in best.items()
    ]


def nested_mixtures(logprobs_TK: np.ndarray, scores_TK: np.ndarray, order_TK: np.ndarray) -> np.ndarray:
    """The mixture's log-probability with the first 1, 2, ... K experts of each row's order, (T, K), in one pass."""
    ranked_TK = np.take_along_axis(scores_TK, order_TK, axis=1).astype(np.float64)
    joint_TK = ranked_TK + np.take_along_axis(logprobs_TK, order_TK, axis=1)
    sums = [torch.logcumsumexp(torch.from_numpy(rows_TK), dim=1) for rows_TK in (joint_TK, ranked_TK)]  # on all cores
    return (sums[0] - sums[1]).numpy()


def summarise(logprobs_T: np.ndarray, lengths: np.ndarray, text_bytes: int, dense_T: np.ndarray) -> dict[str, Any]:
    """Token-weighted perplexity, bits per byte, and the ratio to the dense control, with 95 % intervals over documents.

    The bootstrap draws the same documents for both systems, so that the ratio's interval leaves out what they share.
    """
    sums_N, dense_N = -_document_sums(logprobs_T, lengths), -_document_sums(dense_T, lengths)
    draws = np.random.default_rng(0).integers(0, len(lengths), (BOOTSTRAP, len(lengths)))
    tokens_R = lengths[draws].sum(axis=1)
    loss_R, dense_R = sums_N[draws].sum(axis=1) / tokens_R, dense_N[draws].sum(axis=1) / tokens_R
    loss, dense = sums_N.sum() / lengths.sum(), dense_N.sum() / lengths.sum()
    ppl_low, ppl_high = np.exp(np.quantile(loss_R, [0.025, 0.975]))
    ratio_low, ratio_high = np.exp(np.quantile(loss_R - dense_R, [0.025, 0.975]))
    return {
        "ppl": float(np.exp(loss)),
        "ppl_low": float(ppl_low),
        "ppl_high": float(ppl_high),
        "ratio_to_dense": float(np.exp(loss - dense)),
        "ratio_low": float(ratio_low),
        "ratio_high": float(ratio_high),
        "loss_nats": float(loss),
        "bpb": float(sums_N.sum() / math.log(2) / text_bytes),
    }


def _document_sums(values_T: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Sum over each document's tokens, float64; 0 for one without tokens."""
    totals = np.concatenate([[0.0], np.cumsum(values_T, dtype=np.float64)])
    ends = np.cumsum(lengths)
    return totals[ends] - totals[ends - lengths]


def prefix_readers(held_out: HeldOut, n_nearest: int, prefix_tokens: int) -> float:
    """Experts that read a token of a prefix, on average, where only those nearest to its contexts read it.

    Nearest before which token changes with the token, and an expert that comes late reads what it missed.
    """
    reads = 0
    for rows in held_out.documents():
        near_TK = nearest(held_out.squared_distances_TK[rows][: prefix_tokens + 1], n_nearest)
        until_K = np.where(near_TK.any(axis=0), len(near_TK) - near_TK[::-1].argmax(axis=0), 0)
        reads += int(np.minimum(until_K, prefix_tokens).sum())
    return reads / int(np.minimum(held_out.lengths, prefix_tokens).sum())


def experts_run(
    routing: str, top_k: int, n_experts: int, lengths: np.ndarray, prefix_tokens: int, readers: float | None = None
) -> float:
    """Experts that run for a token, on average: evidence needs all of them, prefix routing only for the prefix.

    Args:
        readers: experts that read the prefix, on average. None: all.
    """
    if routing == "embedding" or top_k == n_experts:
        return float(top_k)
    if routing in ("posterior", "bayes"):
        return float(n_experts)
    prefixes = np.minimum(lengths, prefix_tokens).sum() / lengths.sum()
    return float(prefixes * (n_experts if readers is None else readers) + (1 - prefixes) * top_k)
