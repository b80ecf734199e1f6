"""Perplexity on held-out documents: every token predicted once, mixtures computed from the experts' saved log-probabilities.

T tokens (of one document after the other), K experts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import torch
from transformers import PreTrainedModel

from cbtm_ray.config import EvaluateConfig
from cbtm_ray.evaluate.result_rows import Summary
from cbtm_ray.merge.mixture import mix_logprobs
from cbtm_ray.merge.rereading import tokens_read
from cbtm_ray.merge.routers import ROUTERS, Route, Router
from cbtm_ray.merge.scores import ScoredHalf, Settings, routing_scores
from cbtm_ray.train.loss import TokenLoss

BOOTSTRAP = 1000


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
    if not windows:
        return np.zeros(0, np.float32)
    windows.sort(key=lambda window: len(window[1]))
    logprobs = np.zeros(int(starts[-1]), np.float32)
    model.eval()
    token_loss = TokenLoss(model, torch.from_numpy(windows[-1][1][None]).to(model.device))
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


def packed_loss(model: PreTrainedModel, sequences: torch.Tensor, *, border: int | None, batch_tokens: int) -> float:
    """Mean loss in nats of a token of packed sequences (B, T + 1), as training measures it on held-out documents.

    Args:
        border: as of `TokenLoss`.
    """
    model.eval()
    token_loss = TokenLoss(model, sequences[:1].to(model.device), border=border)
    parts = sequences.split(max(1, batch_tokens // sequences.shape[1]))
    with torch.inference_mode():
        return torch.cat([token_loss(part.to(model.device)).double() for part in parts]).mean().item()


def _batches(windows: list[tuple[int, np.ndarray]], batch_tokens: int) -> Iterator[list[tuple[int, np.ndarray]]]:
    """Neighbors in length together, at most `batch_tokens` with the padding, at least one window."""
    batch: list[tuple[int, np.ndarray]] = []
    for window in windows:
        if batch and (len(batch) + 1) * len(window[1]) > batch_tokens:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def mixture_logprobs(held_out: ScoredHalf, route: Route) -> np.ndarray:
    """The mixture's log-probability of every token, (T,)."""
    return mix_logprobs(held_out.logprobs_TK, route.weights(held_out))


def oracle_logprobs(held_out: ScoredHalf) -> np.ndarray:
    """The log-probability of every token by the best single expert of its document, chosen in hindsight, (T,)."""
    logprobs_TK = held_out.logprobs_TK
    sums = [document_sums(logprobs_TK[:, expert], held_out.lengths) for expert in range(logprobs_TK.shape[1])]
    best_N = np.argmax(sums, axis=0)
    return logprobs_TK[np.arange(len(logprobs_TK)), np.repeat(best_N, held_out.lengths)]


def tune(held_out: ScoredHalf, config: EvaluateConfig, routing: str) -> dict[int, Route]:
    """For every top_k that the router can mix: the route of least loss on these documents, which are not those reported on.

    A pass over the documents for each candidate gives the losses of all sizes together.
    """
    router, n_experts = ROUTERS[routing], held_out.logprobs_TK.shape[1]
    if not (sizes := router.sizes(n_experts)):
        return {}
    if router.evidence == "ngrams":
        return _tune_ngrams(held_out, config, routing)
    losses, chosen = np.full(n_experts, np.inf), [Settings()] * n_experts
    for settings, losses_K in _candidate_losses(held_out, config, router):
        for index in np.flatnonzero(losses_K < losses):
            losses[index], chosen[index] = losses_K[index], settings
    return {
        top_k: Route(routing=routing, top_k=top_k, settings=chosen[top_k - 1], prefix_tokens=config.prefix_tokens)
        for top_k in sizes
    }


def _candidate_losses(
    held_out: ScoredHalf, config: EvaluateConfig, router: Router
) -> Iterator[tuple[Settings, np.ndarray]]:
    """Every candidate with the loss (K,) of its mixtures of 1, 2, ... K experts."""
    candidates = router.candidates(config)
    if not held_out.squared_distances_TK.shape[1]:  # clusters by chance have no centers
        candidates = [settings for settings in candidates if "temperature" not in settings]
    for gamma, group in itertools.groupby(candidates, lambda settings: settings.get("gamma", 1.0)):
        evidence_TK = router.evidence_TK(held_out, gamma)
        for settings in group:
            scores_TK = routing_scores(held_out.squared_distances_TK, evidence_TK, settings)
            order_TK = router.order_TK(held_out, scores_TK, config.prefix_tokens)
            yield settings, -nested_mixtures(held_out.logprobs_TK, scores_TK, order_TK).mean(axis=0)


def _tune_ngrams(held_out: ScoredHalf, config: EvaluateConfig, routing: str) -> dict[int, Route]:
    """As `tune`, with `reread_cost`: for each gamma the best settings without a cost, then these with every cost.

    The choice is the least loss among routes that read at most `reread_share` more tokens than they mix, or the route that
    reads least. A size that is not in `evaluate.top_k` has the settings of the next smaller size that is.
    """
    n_experts = held_out.logprobs_TK.shape[1]
    found: dict[float, list[tuple[float, Settings]]] = {}
    for settings, losses_K in _candidate_losses(held_out, config, ROUTERS[routing]):
        best = found.setdefault(settings["gamma"], [(math.inf, settings)] * n_experts)
        for index in np.flatnonzero(losses_K < [loss for loss, _ in best]):
            best[index] = (float(losses_K[index]), settings)
    tuned_sizes = sorted({1, *(size for size in config.top_k if size < n_experts), n_experts})
    chosen = {}
    for top_k in tuned_sizes:
        costs = config.reread_costs if top_k < n_experts else (0.0,)
        tried = [best[top_k - 1][1] | {"reread_cost": cost} for best in found.values() for cost in costs]
        chosen[top_k] = min(tried, key=lambda settings: _reading_loss(held_out, config, routing, top_k, settings))
    return {
        top_k: Route(
            routing=routing,
            top_k=top_k,
            settings=chosen[max(size for size in tuned_sizes if size <= top_k)],
            prefix_tokens=config.prefix_tokens,
        )
        for top_k in range(1, n_experts + 1)
    }


def _reading_loss(
    held_out: ScoredHalf, config: EvaluateConfig, routing: str, top_k: int, settings: Settings
) -> tuple[float, float]:
    """How far the route reads beyond what it may, then its loss."""
    route = Route(routing=routing, top_k=top_k, settings=settings, prefix_tokens=config.prefix_tokens)
    weights_TK = route.weights(held_out)
    excess = tokens_read(weights_TK > 0, held_out.lengths) / top_k - 1 - config.reread_share
    return max(excess, 0.0), float(-mix_logprobs(held_out.logprobs_TK, weights_TK).mean())


def nested_mixtures(logprobs_TK: np.ndarray, scores_TK: np.ndarray, order_TK: np.ndarray) -> np.ndarray:
    """The mixture's log-probability with the first 1, 2, ... K experts of each row's order, (T, K), in one pass."""
    ranked_TK = np.take_along_axis(scores_TK, order_TK, axis=1).astype(np.float64)
    joint_TK = ranked_TK + np.take_along_axis(logprobs_TK, order_TK, axis=1)
    sums = [torch.logcumsumexp(torch.from_numpy(rows_TK), dim=1) for rows_TK in (joint_TK, ranked_TK)]  # on all cores
    return (sums[0] - sums[1]).numpy()


def summarize(logprobs_T: np.ndarray, lengths: np.ndarray, text_bytes: int, dense_T: np.ndarray) -> Summary:
    """Token-weighted perplexity, bits per byte, and the ratio to the dense control, with 95 % intervals over documents.

    The bootstrap draws the same documents for both systems, so that the ratio's interval leaves out what they share.
    """
    sums_N, dense_N = -document_sums(logprobs_T, lengths), -document_sums(dense_T, lengths)
    draws = document_draws(len(lengths))
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


def document_draws(n_documents: int) -> np.ndarray:
    """The documents of every bootstrap draw, the same for as many documents; (BOOTSTRAP, N)."""
    return np.random.default_rng(0).integers(0, n_documents, (BOOTSTRAP, n_documents))


def document_sums(values_T: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Sum over each document's tokens, float64; 0 for one without tokens."""
    totals = np.concatenate([[0.0], np.cumsum(values_T, dtype=np.float64)])
    ends = np.cumsum(lengths)
    return totals[ends] - totals[ends - lengths]
