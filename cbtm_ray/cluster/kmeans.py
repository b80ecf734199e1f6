"""Balanced k-means: Lloyd's iterations and a scikit-learn estimator (paper section 3.2: equal clusters while fitting).

    N documents, D embedding dims, K clusters

`balanced_assignment.py` balances the clusters. `shard_steps.py` does all work on documents: the loops here only add up its
results, on one machine or many.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClusterMixin, TransformerMixin
from sklearn.utils.validation import check_array, check_is_fitted
from torch import Tensor

from cbtm_ray.cluster.balanced_assignment import HOTTEST, WARM, assign, check_counts, fit_prices
from cbtm_ray.cluster.shard_steps import (
    LocalShards,
    Shards,
    add_up,
    cut,
    distances_step,
    farthest_rows,
    labels_step,
    means_step,
    moments,
    one_thread,
    squared_distances,
    take_rows,
)
from cbtm_ray.errors import UserError

SEED_ROWS = 64  # rows a cluster in the sample that k-means++ starts from
LARGEST_SQUARES = 1e37  # of all embeddings together: float32 holds no distances of larger ones

RandomState = int | np.random.Generator | np.random.RandomState | None


@dataclass(frozen=True)
class LloydState:
    """Where Lloyd's iterations stand."""

    iteration: int
    centers: Tensor
    """(K, D) float32."""
    prices: Tensor
    """(K,) float64, zeros if not balanced."""
    shift: float
    """Squared distance that the centers moved in this iteration, summed over clusters."""
    cost: float
    """Mean squared distance of the documents to the centers before they moved."""
    imbalance: float
    """max_j |K load_j - 1| of the loads that the means were taken with."""


def check_documents(shards: Shards, n_clusters: int) -> tuple[list[int], float]:
    """Documents in each shard, and their variance averaged over dimensions (the unit of `tol`, as in scikit-learn).

    Raises UserError if there are fewer documents than clusters, an embedding is not finite or too large, or shards differ
    in D.
    """
    parts = shards.each(moments)
    dimensions = sorted({len(sums) for _, sums, _ in parts})
    if len(dimensions) > 1:
        raise UserError(f"embeddings have {dimensions} dimensions, but must all have as many. Embed all shards again.")
    n, sums, squares = add_up(parts)
    check_counts(n, n_clusters)
    if not squares.sum() < LARGEST_SQUARES:
        raise UserError(
            f"embeddings must be finite with squares that sum to less than {LARGEST_SQUARES:g}, but some are NaN, infinite or "
            "too large. Find the documents they come from."
        )
    return [count for count, _, _ in parts], float((squares / n - (sums / n) ** 2).mean())


@one_thread()
def start_centers(shards: Shards, counts: list[int], n_clusters: int, random_state: RandomState) -> Tensor:
    """(K, D) k-means++ centers from a seeded sample of rows: the best of 2 + log K draws each time, as in scikit-learn.

    Rows are drawn by their number in the whole, so that the sample is the same however they are cut into shards.
    """
    rng = np.random.default_rng(random_state)
    n, ends = sum(counts), np.cumsum(counts)
    index = np.sort(rng.choice(n, size=min(n, SEED_ROWS * n_clusters), replace=False))
    parts = np.split(index, np.searchsorted(index, ends[:-1]))
    local = [part - (end - count) for part, end, count in zip(parts, ends, counts, strict=True)]
    sample = torch.cat(shards.each(take_rows, local))
    chosen = [int(rng.integers(len(sample)))]
    nearest = squared_distances(sample, sample[chosen])[:, 0].double()
    while len(chosen) < n_clusters:
        weight = nearest.numpy() if nearest.sum() > 0 else np.ones(len(sample))
        draws = rng.choice(len(sample), size=2 + int(math.log(n_clusters)), p=weight / weight.sum())
        after = torch.minimum(nearest[:, None], squared_distances(sample, sample[draws]).double())
        best = int(after.sum(0).argmin())
        chosen.append(int(draws[best]))
        nearest = after[:, best]
    return sample[chosen]


def lloyd(
    shards: Shards, state: LloydState, *, balanced: bool, max_iter: int, tolerance: float
) -> Iterator[LloydState]:
    """Lloyd's iterations from `state`, until the centers move by at most `tolerance` (squared, summed) or `max_iter`.

    Balanced means are taken with softmax loads within IMBALANCE of equal, which needs K x K numbers from a shard; only
    the labels of the final centers are rounded to exact sizes.
    """
    while state.iteration < max_iter and state.shift > tolerance:
        centers, prices, epsilon, imbalance = state.centers, state.prices, 0.0, math.nan
        if balanced:
            prices, epsilon, imbalance = fit_prices(shards, centers, prices, WARM if state.iteration else HOTTEST)
        sums, counts, cost = shards.total(means_step, centers, prices if balanced else None, epsilon)
        moved = torch.where(counts[:, None] > 0.5, sums / counts[:, None], centers.double()).float()
        empty = (counts <= 0.5).nonzero()[:, 0]
        if len(empty):
            found = itertools.chain.from_iterable(shards.each(farthest_rows, centers, len(empty)))
            far = sorted(found, key=lambda pair: -pair[0])
            for j, (distance, row) in zip(empty.tolist(), far, strict=False):
                moved[j] = row if distance > 0 else moved[j]
        shift = float(((moved - centers).double() ** 2).sum())
        n = float(counts.sum())
        state = LloydState(state.iteration + 1, moved, prices, shift, cost / n, imbalance)
        yield state


class BalancedKMeans(TransformerMixin, ClusterMixin, BaseEstimator):
    """k-means with equal cluster sizes while fitting, a scikit-learn estimator.

    Parameters as in `sklearn.cluster.KMeans`, but `random_state` may be a numpy Generator too; `balanced=False` is plain
    k-means. After `fit`:

    cluster_centers_ : ndarray (K, D) float32
    labels_ : ndarray (N,) int32, with sizes that differ by at most 1 if balanced
    inertia_ : sum of the squared distances to the centers of `labels_`
    n_iter_ : Lloyd iterations
    gap_ : relative gap of `labels_` to the dual lower bound at these centers; 0.0 if not balanced
    imbalance_ : max_j |K load_j - 1| of the soft loads behind the last means; NaN if not balanced
    n_features_in_ : D

    `fit_predict` gives `labels_`; `predict` is not balanced and may differ from them.
    """

    def __init__(
        self,
        n_clusters: int,
        *,
        balanced: bool = True,
        max_iter: int = 50,
        tol: float = 1e-4,
        random_state: RandomState = 0,
    ) -> None:
        self.n_clusters = n_clusters
        self.balanced = balanced
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    def fit(self, X: np.ndarray | Tensor, y: None = None) -> Self:
        """Fit to embeddings (N, D) of any real type.

        Raises UserError if N < K, a parameter is out of bounds, or X is not two-dimensional, finite and dense.
        """
        self._check_parameters()
        shards = LocalShards(cut(_as_points(X)))
        *_, state = self.iterations(shards)
        return self.finish(shards, state)

    def iterations(self, shards: Shards, state: LloydState | None = None) -> Iterator[LloydState]:
        """The start, then the state after each Lloyd iteration; goes on from `state` if given."""
        counts, variance = check_documents(shards, self.n_clusters)
        if state is None:
            centers = start_centers(shards, counts, self.n_clusters, self.random_state)
            prices = torch.zeros(self.n_clusters, dtype=torch.double)
            state = LloydState(0, centers, prices, math.inf, math.inf, math.nan)
        yield state
        yield from lloyd(shards, state, balanced=self.balanced, max_iter=self.max_iter, tolerance=self.tol * variance)

    def finish(self, shards: Shards, state: LloydState) -> Self:
        """Label the documents by the final centers and set the learned attributes."""
        if self.balanced:
            best = assign(shards, state.centers, state.prices, WARM if state.iteration else HOTTEST)
            labels, cost, self.gap_ = best.labels, best.cost * len(best.labels), best.gap
        else:
            steps = shards.each(labels_step, state.centers, torch.zeros(self.n_clusters), -1.0)
            labels, cost, self.gap_ = np.concatenate([step[0] for step in steps]), sum(step[1] for step in steps), 0.0
        self.labels_, self.inertia_ = labels, float(cost)
        self.cluster_centers_ = state.centers.numpy()
        self.n_iter_, self.imbalance_ = state.iteration, state.imbalance
        self.n_features_in_ = state.centers.shape[1]
        return self

    def predict(self, X: np.ndarray | Tensor) -> np.ndarray:
        """(N,) int32 nearest centers: not balanced, as the paper assigns the corpus."""
        shards, centers = self._ready(X)
        return np.concatenate([step[0] for step in shards.each(labels_step, centers, torch.zeros(len(centers)), -1.0)])

    def transform(self, X: np.ndarray | Tensor) -> np.ndarray:
        """(N, K) Euclidean distances (not squared) to the centers, float32."""
        shards, centers = self._ready(X)
        return np.concatenate(shards.each(distances_step, centers))

    def _ready(self, X: np.ndarray | Tensor) -> tuple[Shards, Tensor]:
        check_is_fitted(self)
        points, centers = _as_points(X), torch.from_numpy(self.cluster_centers_)
        if points.shape[1] != centers.shape[1]:
            raise UserError(
                f"embeddings have {points.shape[1]} dimensions, but must have {centers.shape[1]} as the centers do. "
                "Embed the documents as those of the fit."
            )
        if len(points) and not np.isfinite([float(end) for end in points.aminmax()]).all():
            raise UserError(
                "embeddings must be finite, but some are NaN or infinite. Find the documents they come from."
            )
        return LocalShards(cut(points)), centers

    def _check_parameters(self) -> None:
        for name in ("n_clusters", "max_iter"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
                raise UserError(f"{name}={value!r} must be at least 1, a whole number.")
        if not isinstance(self.tol, Real) or not self.tol >= 0:
            raise UserError(f"tol={self.tol!r} must be a number of at least 0.")
        try:
            np.random.default_rng(self.random_state)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"random_state={self.random_state!r} must be a whole number of at least 0, a numpy Generator or RandomState, "
                "or None."
            ) from error


def _as_points(X: np.ndarray | Tensor) -> Tensor:
    """Float32 (N, D) of a tensor, where it is, or of whatever scikit-learn takes for an array. UserError if it is none."""
    if not isinstance(X, Tensor):
        array = check_array(
            X, dtype=np.float32, ensure_2d=False, allow_nd=True, ensure_all_finite=False, ensure_min_samples=0
        )
        X = torch.from_numpy(np.require(array, np.float32, ["C", "W"]))
    if X.ndim != 2:
        raise UserError(f"embeddings have shape {tuple(X.shape)}, but must be (documents, dimensions).")
    return X.detach().float()
