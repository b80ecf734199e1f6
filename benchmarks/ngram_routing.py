"""The n-gram router's cost and error, for `benchmarks.routing`: tables of K clusters, a token at a time beside an expert.

V vocabulary, K clusters, T tokens.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.decoding import SIZES
from cbtm_ray.cluster.kmeans import BalancedKMeans
from cbtm_ray.cluster.ngrams import PAIR_PRIOR, NgramTables, PairCounts, count_pairs, smooth
from cbtm_ray.decode.kv_cache import Chunk, KVCache

N_CLUSTERS, MAX_PAIRS, GAMMA = 16, 500_000, 0.99
WINDOW = 256
"""Tokens of a text that the expert decodes one after the other."""


@dataclass(frozen=True)
class NgramCost:
    tables: NgramTables
    fit_s: float
    us_per_token: float
    """A token at a time, as decoding does: look up the evidence and add it to the discounted sum."""
    us_per_document_token: float
    """Whole documents, as the evaluation does."""
    expert_us_per_token: float
    """One token of one sequence through an expert of 10 million parameters, with its KV cache."""
    step_error: float
    """The largest difference between both ways, in nats."""
    table_error: float
    """Of the tables (float16) to the formula in float64, in nats."""


def measure(documents: list[np.ndarray], embeddings_ND: np.ndarray, vocabulary: int, text_T: np.ndarray) -> NgramCost:
    """Tables of clusters by k-means, and what they cost for the tokens of a text."""
    clusters = BalancedKMeans(N_CLUSTERS, random_state=0).fit_predict(embeddings_ND)
    started = time.perf_counter()
    counts = count_pairs(documents, clusters.tolist(), vocabulary=vocabulary, n_clusters=N_CLUSTERS, end_of_text=0)
    model = smooth(counts, end_of_text=0, max_pairs=MAX_PAIRS)
    tables = model.tables()
    fit_s = time.perf_counter() - started
    whole_s, step_s = min(_whole_s(tables, text_T) for _ in range(5)), min(_step_s(tables, text_T) for _ in range(5))
    steps_TK = np.stack([tables.step(a, b) for a, b in zip([None, *text_T.tolist()], text_T.tolist(), strict=False)])
    evidence_TK = tables.evidence(text_T)
    return NgramCost(
        tables=tables,
        fit_s=fit_s,
        us_per_token=1e6 * step_s / len(text_T),
        us_per_document_token=1e6 * whole_s / len(text_T),
        expert_us_per_token=1e6 * min(_expert_s() for _ in range(3)) / WINDOW,
        step_error=float(np.abs(steps_TK - evidence_TK).max()),
        table_error=float(np.abs(evidence_TK - _formula(model, text_T)).max()),
    )


def _whole_s(tables: NgramTables, text_T: np.ndarray) -> float:
    started = time.perf_counter()
    tables.evidence(text_T)
    return time.perf_counter() - started


def _step_s(tables: NgramTables, text_T: np.ndarray) -> float:
    sum_K, before, tokens = np.zeros(N_CLUSTERS), None, text_T.tolist()
    started = time.perf_counter()
    for token in tokens:
        sum_K *= GAMMA
        sum_K += tables.step(before, token)
        before = token
    return time.perf_counter() - started


def _expert_s() -> float:
    """Seconds of WINDOW tokens of one sequence, one at a time."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES["10M"], max_position_embeddings=2 * WINDOW)).eval()
    cache, slots = KVCache(WINDOW), torch.arange(WINDOW)
    cache.forward(model, [Chunk([1], 0, slots)])
    started = time.perf_counter()
    for position in range(1, WINDOW):
        cache.forward(model, [Chunk([position], position, slots)])
    return time.perf_counter() - started


def _formula(model: PairCounts, text_T: np.ndarray) -> np.ndarray:
    """The evidence of every token in float64, from the counts, a pair at a time."""
    rows, before, vocabulary = [], model.end_of_text, len(model.unseen_VK)
    known = {int(pair): row for row, pair in enumerate(model.pairs)}
    for token in text_T.tolist():
        unseen_K, row = model.unseen_VK[token].astype(np.float64), known.get(before * vocabulary + token)
        counted_K = 0 if row is None else model.pair_PK[row].astype(np.float64) / float(model.bigram_P[row])
        rows.append(np.log(counted_K + unseen_K) - np.log(model.context_VK[before].astype(np.float64) + PAIR_PRIOR))
        before = token
    return np.stack(rows)
