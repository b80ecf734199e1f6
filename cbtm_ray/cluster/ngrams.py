"""Bigram models of the clusters' tokens: evidence of a text's cluster for one table row a token, without running an expert.

For token x after token y, and cluster j's counts c_j, the evidence is the log-ratio of two smoothed bigram models:

    e_j(y, x) = log p_j(x | y) - log p(x | y)
    p(x | y)   = (c(y, x) + 100 p(x)) / (c(y) + 100)                                       all clusters together
    p_j(x)     = (c_j(x) + 2000 p(x)) / (n_j + 2000)
    p_j(x | y) = (c_j(y, x) + 300 p(x | y) sqrt(p_j(x) / p(x))) / (c_j(y) + 300)

V tokens in the vocabulary, K clusters, P pairs kept, T tokens of a text. The first token of a document follows end-of-text.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from cbtm_ray import files

CORPUS_PRIOR, UNIGRAM_PRIOR, PAIR_PRIOR = 100.0, 2000.0, 300.0
"""Pseudo-counts of the Dirichlet smoothing, in tokens."""


@dataclass(frozen=True)
class NgramCounts:
    """How often each cluster has each pair of tokens. A code is (previous * V + token) * K + cluster."""

    codes: np.ndarray
    """Sorted, int64."""
    counts: np.ndarray
    """int64."""
    vocabulary: int
    n_clusters: int


def count_pairs(
    documents: Iterable[np.ndarray], clusters: Iterable[int], *, vocabulary: int, n_clusters: int, end_of_text: int
) -> NgramCounts:
    """The pairs of tokens of every document, counted for its cluster."""
    codes = [np.zeros(0, np.int64)]
    for tokens, cluster in zip(documents, clusters, strict=True):
        codes.append((pair_keys(tokens, vocabulary, end_of_text)) * n_clusters + cluster)
    found, counts = np.unique(np.concatenate(codes), return_counts=True)
    return NgramCounts(found, counts, vocabulary, n_clusters)


def add_counts(parts: list[NgramCounts]) -> NgramCounts:
    """The sum of counts of the same vocabulary and clusters."""
    codes, inverse = np.unique(np.concatenate([part.codes for part in parts]), return_inverse=True)
    counts = np.bincount(inverse, np.concatenate([part.counts for part in parts]), len(codes)).astype(np.int64)
    return NgramCounts(codes, counts, parts[0].vocabulary, parts[0].n_clusters)


ARRAYS = ("token_VK", "context_VK", "pairs", "pair_PK")


@dataclass(frozen=True)
class NgramTables:
    """The evidence of every pair, as the two parts that all pairs have and a row for each frequent pair."""

    token_VK: np.ndarray
    """float16: log of the numerator of p_j(x | y) / p(x | y) for a pair that is not in `pairs`."""
    context_VK: np.ndarray
    """float16: log of the denominator."""
    pairs: np.ndarray
    """The pairs kept, sorted: previous * V + token, int64 (P,)."""
    pair_PK: np.ndarray
    """float16: log of the numerator for each pair kept."""
    end_of_text: int

    @property
    def n_bytes(self) -> int:
        return self.token_VK.nbytes + self.context_VK.nbytes + self.pairs.nbytes + self.pair_PK.nbytes

    def evidence(self, tokens_T: np.ndarray, previous: int | None = None) -> np.ndarray:
        """The evidence of every token of a text after `previous`, None at the start of a document: float32 (T, K)."""
        before = self.end_of_text if previous is None else previous
        keys_T = pair_keys(tokens_T, len(self.token_VK), before)
        previous_T, tokens_T = np.divmod(keys_T, len(self.token_VK))
        numerator_TK = self.token_VK[tokens_T].astype(np.float32)
        places_T, kept_T = find_rows(self.pairs, keys_T)
        numerator_TK[kept_T] = self.pair_PK[places_T[kept_T]]
        return numerator_TK - self.context_VK[previous_T]

    def step(self, previous: int | None, token: int) -> np.ndarray:
        """The evidence of one token, float32 (K,). `previous` is None at the start of a document."""
        before = self.end_of_text if previous is None else previous
        key = before * len(self.token_VK) + token
        place = int(np.searchsorted(self.pairs, key))
        kept = place < len(self.pairs) and self.pairs[place] == key
        numerator_K = self.pair_PK[place] if kept else self.token_VK[token]
        return numerator_K.astype(np.float32) - self.context_VK[before]

    def save(self, folder_uri: str) -> None:
        for name in ARRAYS:
            files.write_array(files.join(folder_uri, f"{name}.npy"), getattr(self, name))


def load_tables(folder_uri: str, end_of_text: int) -> NgramTables:
    arrays = {name: files.read_array(files.join(folder_uri, f"{name}.npy")) for name in ARRAYS}
    return NgramTables(**arrays, end_of_text=end_of_text)


@dataclass(frozen=True)
class PairCounts:
    """Counts of the frequent pairs, and what smooths them: every part of the formula above."""

    unseen_VK: np.ndarray
    """float32: 300 sqrt(p_j(x) / p(x)), the numerator of p_j(x | y) / p(x | y) for a pair that is not in `pairs`."""
    context_VK: np.ndarray
    """float32: c_j(y)."""
    pairs: np.ndarray
    """As in `NgramTables`."""
    pair_PK: np.ndarray
    """float32: c_j(y, x)."""
    bigram_P: np.ndarray
    """float32: p(x | y)."""
    end_of_text: int

    def tables(self) -> NgramTables:
        """The evidence of every pair, with nothing left to compute but a difference."""
        after_P = self.pairs % len(self.unseen_VK)
        return NgramTables(
            token_VK=np.log(self.unseen_VK).astype(np.float16),
            context_VK=np.log(self.context_VK + PAIR_PRIOR).astype(np.float16),
            pairs=self.pairs,
            pair_PK=np.log(self.pair_PK / self.bigram_P[:, None] + self.unseen_VK[after_P]).astype(np.float16),
            end_of_text=self.end_of_text,
        )


def smooth(counts: NgramCounts, *, end_of_text: int, max_pairs: int, min_count: int = 2) -> PairCounts:
    """The counts of the `max_pairs` most frequent pairs with their smoothing; ties go to the lower pair."""
    vocabulary, n_clusters = counts.vocabulary, counts.n_clusters
    keys, cluster = np.divmod(counts.codes, n_clusters)
    previous, token = np.divmod(keys, vocabulary)

    def table(rows: np.ndarray) -> np.ndarray:
        found = np.bincount(rows * n_clusters + cluster, counts.counts, vocabulary * n_clusters)
        return found.reshape(vocabulary, n_clusters)

    token_VK, context_VK = table(token), table(previous)
    total_V = token_VK.sum(1)
    unigram_V = (total_V + 1) / (total_V.sum() + vocabulary)  # one more each: no token is impossible
    unigram_VK = (token_VK + UNIGRAM_PRIOR * unigram_V[:, None]) / (token_VK.sum(0) + UNIGRAM_PRIOR)
    pairs, first = np.unique(keys, return_index=True)
    in_all = np.add.reduceat(counts.counts, first) if len(pairs) else np.zeros(0, np.int64)
    best = np.argsort(-in_all, kind="stable")[:max_pairs]
    kept = np.sort(best[in_all[best] >= min_count])
    before, after = np.divmod(pairs[kept], vocabulary)
    bigram_P = (in_all[kept] + CORPUS_PRIOR * unigram_V[after]) / (context_VK.sum(1)[before] + CORPUS_PRIOR)
    places, here = find_rows(pairs[kept], keys)
    pair_PK = np.zeros((len(kept), n_clusters), np.float32)
    pair_PK[places[here], cluster[here]] = counts.counts[here]
    return PairCounts(
        unseen_VK=(PAIR_PRIOR * np.sqrt(unigram_VK / unigram_V[:, None])).astype(np.float32),
        context_VK=context_VK.astype(np.float32),
        pairs=pairs[kept],
        pair_PK=pair_PK,
        bigram_P=bigram_P.astype(np.float32),
        end_of_text=end_of_text,
    )


def find_rows(pairs: np.ndarray, keys_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The row of each key among the sorted pairs, and whether it is there, bool (T,)."""
    if not len(pairs):
        return np.zeros(len(keys_T), np.int64), np.zeros(len(keys_T), bool)
    places_T = np.minimum(np.searchsorted(pairs, keys_T), len(pairs) - 1)
    return places_T, pairs[places_T] == keys_T


def pair_keys(tokens_T: np.ndarray, vocabulary: int, before: int) -> np.ndarray:
    """Each token with the token before it, as one number, int64 (T,); `before` comes before the first."""
    tokens_T = np.asarray(tokens_T, np.int64)
    return np.concatenate([[before], tokens_T[:-1]])[: len(tokens_T)] * vocabulary + tokens_T
