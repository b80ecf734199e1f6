"""Balanced k-means by dual prices, on plain tensors (paper section 3.2 asks for equal clusters while fitting).

    N documents, D embedding dims, K clusters

Giving N documents to K clusters of equal size at least cost is a transport problem, whose dual has one price a cluster:
maximise  mean_i min_j (d2_ij + p_j) - mean_j p_j.  Newton steps on the softmax-smoothed dual find the prices, shortest
paths on the graph of clusters then make the sizes exact, and the dual value certifies how far from the optimum that is.

What touches documents is in `shard_steps.py`; the loops here only add up what the steps return, on one machine or many.
"""

from __future__ import annotations

import itertools
import logging
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

from cbtm_ray.distances import squared_distances
from cbtm_ray.errors import UserError
from cbtm_ray.rounding import round_sizes
from cbtm_ray.shard_steps import (
    LocalShards,
    Shards,
    add_up,
    bound_step,
    cut,
    distances_step,
    dual_step,
    farthest_rows,
    labels_step,
    log_spread,
    means_step,
    moments,
    one_thread,
    take_rows,
)

logger = logging.getLogger(__name__)

IMBALANCE = 0.01  # while fitting, soft cluster sizes are within this share of N / K
# Softmax temperatures, as shares of a document's typical spread of distances: the first, the first where the prices of
# similar centres are known, and the last.
HOTTEST, WARM, COLDEST = 0.1, 0.03, 0.002
MOLTEN = 100.0  # no spread of prices needs more
GAP = 1e-6  # relative gap at which the rounding is taken as optimal: float32 distances resolve no more
SEED_ROWS = 64  # rows a cluster in the sample that k-means++ starts from
MAX_STEPS = 40  # dual steps at one temperature
LARGEST_SQUARES = 1e37  # of all embeddings together: float32 holds no distances of larger ones

RandomState = int | np.random.Generator | np.random.RandomState | None


def fit_prices(shards: Shards, centres: Tensor | None, prices: Tensor, hottest: float) -> tuple[Tensor, float, float]:
    """Prices (K) that balance the softmax loads, its last temperature epsilon, and the imbalance max_j |K load_j - 1|.

    Temperatures fall from `hottest` to COLDEST, in units of the documents' typical spread of squared distances. Steps are
    short in a cold dual: where it does not balance because prices have far to go, it is heated first.
    """
    logs, count = shards.total(log_spread, centres)
    spread = math.exp(logs / count) if count else 1.0
    temperature, balanced = max(hottest, COLDEST), False
    while True:
        epsilon, last = temperature * spread, temperature == COLDEST
        goal = IMBALANCE if last else 5 * IMBALANCE
        prices, imbalance = _ascend(shards, centres, prices, epsilon, goal)
        balanced = balanced or imbalance <= goal
        if not balanced and temperature < MOLTEN:
            temperature *= 10
        elif last:
            break
        else:
            temperature = max(0.3 * temperature, COLDEST)
    if imbalance > IMBALANCE:
        logger.warning(
            "cluster sizes while fitting are within %.1f %% of equal, not %.1f %%", 100 * imbalance, 100 * IMBALANCE
        )
    return prices - prices.mean(), epsilon, imbalance


@one_thread()
def _ascend(
    shards: Shards, centres: Tensor | None, prices: Tensor, epsilon: float, goal: float
) -> tuple[Tensor, float]:
    """Newton ascent on the smoothed dual at one temperature, until the loads are within `goal` of equal."""

    def dual(prices: Tensor) -> tuple[Tensor, Tensor, float]:
        loads, overlaps, value = shards.total(dual_step, centres, prices, epsilon)
        n = loads.sum()
        return loads / n, overlaps / n, float(value / n - prices.mean())

    n_clusters = len(prices)
    loads, overlaps, value = dual(prices)
    for _ in range(MAX_STEPS):
        if (loads * n_clusters - 1).abs().max() <= goal:
            break
        # The curvature is singular along (1, ..., 1), and nearly so where few documents are undecided: both are damped.
        curvature = torch.diag(1.001 * loads + 1e-4 / n_clusters) - overlaps
        newton = torch.linalg.solve(curvature, loads - 1 / n_clusters) * epsilon
        trial = prices + newton * min(1.0, 3 * epsilon / float(newton.abs().max()))
        reached = dual(trial)
        if reached[2] < value - 1e-7 * abs(value):
            trial = prices + epsilon * (loads * n_clusters + 1e-12).log()  # Sinkhorn's step: slower, but never down
            reached = dual(trial)
        prices, (loads, overlaps, value) = trial, reached
    return prices, float((loads * n_clusters - 1).abs().max())


@dataclass(frozen=True)
class Assignment:
    """A balanced assignment of N documents: cluster sizes differ by at most 1."""

    labels: np.ndarray
    """(N,) int32."""
    cost: float
    """Mean squared distance."""
    lower_bound: float
    """Dual value: no balanced assignment costs less."""
    gap: float
    """(cost - lower_bound) / cost."""
    prices: Tensor
    """(K,) float64."""


def balanced_assignment(squared_distances_NK: Tensor) -> Assignment:
    """The cheapest assignment with cluster sizes floor(N / K) or ceil(N / K), from a matrix of squared distances.

    Raises UserError if N < K or an entry is not finite.
    """
    n, n_clusters = squared_distances_NK.shape
    _check_counts(n, n_clusters)
    if not squared_distances_NK.isfinite().all():
        raise UserError("squared_distances must be finite, but some entries are NaN or infinite. Look for empty rows.")
    return _assign(LocalShards(cut(squared_distances_NK)), None, torch.zeros(n_clusters, dtype=torch.double), HOTTEST)


def assign_points(points_ND: Tensor, centres_KD: Tensor) -> Assignment:
    """`balanced_assignment` from embeddings and centres, float32; nothing of size N x K x D is ever made."""
    _check_counts(len(points_ND), len(centres_KD))
    start = torch.zeros(len(centres_KD), dtype=torch.double)
    return _assign(LocalShards(cut(points_ND)), centres_KD.cpu(), start, HOTTEST)


def _assign(shards: Shards, centres: Tensor | None, prices: Tensor, hottest: float) -> Assignment:
    """Prices, then exact rounding among the documents at a border, more of them until the gap is closed."""
    prices, epsilon, _ = fit_prices(shards, centres, prices, hottest)
    n_clusters, width = len(prices), 8 * epsilon
    while True:
        labels, costs, borders, distances = zip(*shards.each(labels_step, centres, prices, width), strict=True)
        starts = np.cumsum([0, *map(len, labels[:-1])])
        border = np.concatenate([start + index for start, index in zip(starts, borders, strict=True)])
        label, d = np.concatenate(labels), np.concatenate(distances)
        n, row = len(label), np.arange(len(border))
        all_in, small = n_clusters == 1 or len(border) == n, n * n_clusters <= 1 << 16
        fixed = np.bincount(label, minlength=n_clusters) - np.bincount(label[border], minlength=n_clusters)
        rounded = round_sizes(d, fixed, prices.numpy())
        if rounded is not None:
            moved, final_prices = rounded
            saved = d[row, label[border]].astype(float) - d[row, moved].astype(float)
            cost = float((sum(costs) - saved.sum()) / n)
            bound = lower_bound(shards, centres, final_prices, n)
            excess, rounding = cost - bound, 1e-12 * (cost + np.abs(final_prices).max())
            assert excess >= -rounding, "no assignment costs less than the dual value"
            gap = 0.0 if excess <= rounding else excess / cost
            if all_in or (gap <= GAP and not small):
                label[border] = moved
                return Assignment(label, cost, min(bound, cost), gap, torch.from_numpy(final_prices))
        assert not all_in, "with every document free to move there is a path"
        width = math.inf if small else 8 * width


def lower_bound(shards: Shards, centres: Tensor | None, prices: np.ndarray, n: int) -> float:
    """Dual value at the prices, a document: the N mod K dearest clusters are the ones to hold one document more."""
    floor, extra = divmod(n, len(prices))
    owed = floor * prices.sum() + np.sort(prices)[::-1][:extra].sum()
    (total,) = shards.total(bound_step, centres, torch.from_numpy(prices))
    return float((total - owed) / n)


@dataclass(frozen=True)
class Progress:
    """Where Lloyd's iterations stand."""

    iteration: int
    centres: Tensor
    """(K, D) float32."""
    prices: Tensor
    """(K,) float64, zeros if not balanced."""
    shift: float
    """Squared distance that the centres moved in this iteration, summed over clusters."""
    cost: float
    """Mean squared distance of the documents to the centres before they moved."""
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
    _check_counts(n, n_clusters)
    if not squares.sum() < LARGEST_SQUARES:
        raise UserError(
            f"embeddings must be finite with squares that sum to less than {LARGEST_SQUARES:g}, but some are NaN, infinite or "
            "too large. Find the documents they come from."
        )
    return [count for count, _, _ in parts], float((squares / n - (sums / n) ** 2).mean())


@one_thread()
def start_centres(shards: Shards, counts: list[int], n_clusters: int, random_state: RandomState) -> Tensor:
    """(K, D) k-means++ centres from a seeded sample of rows: the best of 2 + log K draws each time, as in scikit-learn.

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


def lloyd(shards: Shards, state: Progress, *, balanced: bool, max_iter: int, tolerance: float) -> Iterator[Progress]:
    """Lloyd's iterations from `state`, until the centres move by at most `tolerance` (squared, summed) or `max_iter`.

    Balanced means are taken with softmax loads within IMBALANCE of equal, which needs K x K numbers from a shard; only
    the labels of the final centres are rounded to exact sizes.
    """
    while state.iteration < max_iter and state.shift > tolerance:
        centres, prices, epsilon, imbalance = state.centres, state.prices, 0.0, math.nan
        if balanced:
            prices, epsilon, imbalance = fit_prices(shards, centres, prices, WARM if state.iteration else HOTTEST)
        sums, counts, cost = shards.total(means_step, centres, prices if balanced else None, epsilon)
        moved = torch.where(counts[:, None] > 0.5, sums / counts[:, None], centres.double()).float()
        empty = (counts <= 0.5).nonzero()[:, 0]
        if len(empty):
            found = itertools.chain.from_iterable(shards.each(farthest_rows, centres, len(empty)))
            far = sorted(found, key=lambda pair: -pair[0])
            for j, (distance, row) in zip(empty.tolist(), far, strict=False):
                moved[j] = row if distance > 0 else moved[j]
        shift = float(((moved - centres).double() ** 2).sum())
        n = float(counts.sum())
        state = Progress(state.iteration + 1, moved, prices, shift, cost / n, imbalance)
        yield state


def _check_counts(n: int, n_clusters: int) -> None:
    if n_clusters < 1:
        raise UserError(f"n_clusters={n_clusters} must be at least 1. Raise cluster.n_clusters.")
    if n < n_clusters:
        raise UserError(
            f"n_clusters={n_clusters} must be at most the number of documents, {n}. "
            "Lower cluster.n_clusters or give more documents."
        )


class BalancedKMeans(TransformerMixin, ClusterMixin, BaseEstimator):
    """k-means with equal cluster sizes while fitting, a scikit-learn estimator.

    Parameters as in `sklearn.cluster.KMeans`, but `random_state` may be a numpy Generator too; `balanced=False` is plain
    k-means. After `fit`:

    cluster_centers_ : ndarray (K, D) float32
    labels_ : ndarray (N,) int32, with sizes that differ by at most 1 if balanced
    inertia_ : sum of the squared distances to the centres of `labels_`
    n_iter_ : Lloyd iterations
    gap_ : relative gap of `labels_` to the dual lower bound at these centres; 0.0 if not balanced
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

    def iterations(self, shards: Shards, state: Progress | None = None) -> Iterator[Progress]:
        """The start, then the state after each Lloyd iteration; goes on from `state` if given."""
        counts, variance = check_documents(shards, self.n_clusters)
        if state is None:
            centres = start_centres(shards, counts, self.n_clusters, self.random_state)
            prices = torch.zeros(self.n_clusters, dtype=torch.double)
            state = Progress(0, centres, prices, math.inf, math.inf, math.nan)
        yield state
        yield from lloyd(shards, state, balanced=self.balanced, max_iter=self.max_iter, tolerance=self.tol * variance)

    def finish(self, shards: Shards, state: Progress) -> Self:
        """Label the documents by the final centres and set the learnt attributes."""
        if self.balanced:
            best = _assign(shards, state.centres, state.prices, WARM if state.iteration else HOTTEST)
            labels, cost, self.gap_ = best.labels, best.cost * len(best.labels), best.gap
        else:
            steps = shards.each(labels_step, state.centres, torch.zeros(self.n_clusters), -1.0)
            labels, cost, self.gap_ = np.concatenate([step[0] for step in steps]), sum(step[1] for step in steps), 0.0
        self.labels_, self.inertia_ = labels, float(cost)
        self.cluster_centers_ = state.centres.numpy()
        self.n_iter_, self.imbalance_ = state.iteration, state.imbalance
        self.n_features_in_ = state.centres.shape[1]
        return self

    def predict(self, X: np.ndarray | Tensor) -> np.ndarray:
        """(N,) int32 nearest centres: not balanced, as the paper assigns the corpus."""
        shards, centres = self._ready(X)
        return np.concatenate([step[0] for step in shards.each(labels_step, centres, torch.zeros(len(centres)), -1.0)])

    def transform(self, X: np.ndarray | Tensor) -> np.ndarray:
        """(N, K) Euclidean distances (not squared) to the centres, float32."""
        shards, centres = self._ready(X)
        return np.concatenate(shards.each(distances_step, centres))

    def _ready(self, X: np.ndarray | Tensor) -> tuple[Shards, Tensor]:
        check_is_fitted(self)
        points, centres = _as_points(X), torch.from_numpy(self.cluster_centers_)
        if points.shape[1] != centres.shape[1]:
            raise UserError(
                f"embeddings have {points.shape[1]} dimensions, but must have {centres.shape[1]} as the centres do. "
                "Embed the documents as those of the fit."
            )
        if len(points) and not np.isfinite([float(end) for end in points.aminmax()]).all():
            raise UserError(
                "embeddings must be finite, but some are NaN or infinite. Find the documents they come from."
            )
        return LocalShards(cut(points)), centres

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
