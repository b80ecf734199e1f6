"""Clusters by likelihood: every document goes to the cluster whose bigram model explains it best (hard EM).

A round counts the pairs of tokens of every cluster, scores every document by every cluster's evidence (ngrams.py), and assigns
the documents anew, to clusters of equal size if balanced. A document's own pairs are left out of its own cluster's counts:
with them it would hardly ever move. The steps are pure functions of a `TokenShard`, so that `refine` runs unchanged here
and over a cluster (refine_clusters.py).

N documents, T tokens of one after the other, K clusters.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from cbtm_ray.cluster.balanced_assignment import balanced_assignment
from cbtm_ray.cluster.ngrams import (
    PAIR_PRIOR,
    NgramCounts,
    NgramTables,
    PairCounts,
    add_counts,
    count_pairs,
    find_rows,
    pair_keys,
    smooth,
)

Each: TypeAlias = Callable[..., list[Any]]
"""`each(step, *args)`: `step(shard, *args)` of every `TokenShard`, in their order, as `LocalShards.each` has it."""
MAX_PAIRS = 500_000
"""Pairs of tokens with a row of their own: 4 K + 12 bytes each while refining."""
SCORED_TOKENS = 1 << 17
"""Tokens scored at once: 4 K bytes each, a few times over."""


@dataclass(frozen=True)
class TokenShard:
    """The first tokens of some documents."""

    first: int
    """The number of the first of them."""
    tokens_T: np.ndarray
    """int32, one document after the other."""
    lengths_N: np.ndarray

    def documents(self) -> list[np.ndarray]:
        return np.split(self.tokens_T, np.cumsum(self.lengths_N)[:-1])

    def rows(self, values_N: np.ndarray) -> np.ndarray:
        """The shard's part of an array over all documents."""
        return values_N[self.first : self.first + len(self.lengths_N)]


def token_shards(documents: list[np.ndarray], most: int, shard_rows: int) -> list[TokenShard]:
    """The first `most` tokens of every document, in shards of so many documents."""
    shards = []
    for first in range(0, len(documents), shard_rows):
        cut = [document[:most] for document in documents[first : first + shard_rows]]
        shards.append(TokenShard(first, np.concatenate(cut), np.array([len(document) for document in cut])))
    return shards


@dataclass(frozen=True)
class Tokens:
    """What tokens are: the sizes of all tables."""

    vocabulary: int
    n_clusters: int
    end_of_text: int


@dataclass(frozen=True)
class Refined:
    """Where the rounds stand."""

    round: int
    labels_N: np.ndarray
    """The documents' clusters, of equal size if balanced; int32."""
    best_N: np.ndarray
    """The clusters of the highest score: where the documents of the corpus go."""
    moved: float
    """Share of the documents whose label this round changed."""
    evidence_nats: float
    """Mean over the documents of the score in their cluster, by the models that the round began with."""


def refine(each: Each, before: Refined, sizes: Tokens, *, rounds: int, balanced: bool) -> Iterator[Refined]:
    """The rounds after `before`, until no document moves or there have been `rounds`."""
    while before.round < rounds and before.moved > 0:
        model = fit_model(each, before.labels_N, sizes)
        scores_NK = np.concatenate(each(score_step, model, before.labels_N))
        best_N = scores_NK.argmax(axis=1).astype(np.int32)
        labels_N = best_N
        if balanced:
            costs_NK = torch.from_numpy(scores_NK.max(axis=1, keepdims=True) - scores_NK)
            labels_N = balanced_assignment(costs_NK).labels
        before = Refined(
            round=before.round + 1,
            labels_N=labels_N,
            best_N=best_N,
            moved=float((labels_N != before.labels_N).mean()),
            evidence_nats=float(scores_NK[np.arange(len(labels_N)), labels_N].mean()),
        )
        yield before


def fit_model(each: Each, labels_N: np.ndarray, sizes: Tokens) -> PairCounts:
    """The bigram models of the clusters that these labels make."""
    counts = add_counts(each(count_step, labels_N, sizes))
    return smooth(counts, end_of_text=sizes.end_of_text, max_pairs=MAX_PAIRS)


def count_step(shard: TokenShard, labels_N: np.ndarray, sizes: Tokens) -> NgramCounts:
    """The pairs of the shard's documents; `labels_N` of all shards."""
    return count_pairs(
        shard.documents(),
        shard.rows(labels_N).tolist(),
        vocabulary=sizes.vocabulary,
        n_clusters=sizes.n_clusters,
        end_of_text=sizes.end_of_text,
    )


def score_step(shard: TokenShard, model: PairCounts, labels_N: np.ndarray) -> np.ndarray:
    """`left_out_scores` of the shard's documents, float32 (N, K); `labels_N` of all shards."""
    documents, mine, ends = shard.documents(), shard.rows(labels_N), np.cumsum(shard.lengths_N)
    later = np.searchsorted(ends, np.arange(SCORED_TOKENS, ends[-1], SCORED_TOKENS))
    cuts = np.unique([0, *later, len(documents)])
    parts = [left_out_scores(model, documents[a:b], mine[a:b]) for a, b in itertools.pairwise(cuts)]
    return np.concatenate(parts)


def left_out_scores(model: PairCounts, documents: list[np.ndarray], labels_N: np.ndarray) -> np.ndarray:
    """The sum of every cluster's evidence over each document, float32 (N, K), its own cluster's without its own pairs."""
    vocabulary, n_clusters = model.unseen_VK.shape
    documents_T = np.repeat(np.arange(len(documents)), [len(document) for document in documents])
    keys_T = np.concatenate([pair_keys(document, vocabulary, model.end_of_text) for document in documents])
    previous_T, tokens_T = np.divmod(keys_T, vocabulary)
    places_T, kept_T = find_rows(model.pairs, keys_T)
    counts_TK = np.zeros((len(keys_T), n_clusters), np.float32)
    counts_TK[kept_T] = model.pair_PK[places_T[kept_T]]
    context_TK = model.context_VK[previous_T]
    rows_T, own_T = np.arange(len(keys_T)), labels_N[documents_T]
    counts_TK[rows_T, own_T] -= kept_T * _occurrences(documents_T, keys_T)
    context_TK[rows_T, own_T] -= _occurrences(documents_T, previous_T)
    bigram_T = np.ones(len(keys_T), np.float32)
    bigram_T[kept_T] = model.bigram_P[places_T[kept_T]]
    evidence_TK = np.log(counts_TK / bigram_T[:, None] + model.unseen_VK[tokens_T]) - np.log(context_TK + PAIR_PRIOR)
    ends = np.concatenate([[0], np.cumsum(np.bincount(documents_T, minlength=len(documents)))])
    sums_TK = np.concatenate([np.zeros((1, n_clusters)), np.cumsum(evidence_TK, axis=0, dtype=np.float64)])
    return (sums_TK[ends[1:]] - sums_TK[ends[:-1]]).astype(np.float32)


def best_clusters(tables: NgramTables, documents: list[np.ndarray], most: int) -> np.ndarray:
    """The cluster that explains the first `most` tokens of each document best, int64 (N,); ties go to the lower cluster."""
    return np.array([int(tables.evidence(document[:most]).sum(axis=0).argmax()) for document in documents], np.int64)


def _occurrences(documents_T: np.ndarray, values_T: np.ndarray) -> np.ndarray:
    """How often each value occurs in its document, float32 (T,)."""
    codes_T = documents_T * (int(values_T.max(initial=0)) + 1) + values_T
    _, inverse_T, counts = np.unique(codes_T, return_inverse=True, return_counts=True)
    return counts[inverse_T].astype(np.float32)
