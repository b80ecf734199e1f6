"""Prices of clusters that make an assignment of documents balanced, and that assignment with its certificate.

    N documents, D embedding dims, K clusters

Giving N documents to K clusters of equal size at least cost is a transport problem, whose dual has one price a cluster:
maximize  mean_i min_j (d2_ij + p_j) - mean_j p_j.  Newton steps on the softmax-smoothed dual find the prices, shortest
paths on the graph of clusters then make the sizes exact, and the dual value certifies how far from the optimum that is.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from cbtm_ray.cluster.rounding import round_sizes
from cbtm_ray.cluster.scale import ScaledShards, rescaling
from cbtm_ray.cluster.shard_steps import (
    LocalShards,
    Shards,
    bound_step,
    cut,
    dual_step,
    labels_step,
    log_spread,
    one_thread,
)
from cbtm_ray.errors import UserError

logger = logging.getLogger(__name__)

IMBALANCE = 0.01  # while fitting, soft cluster sizes are within this share of N / K
# Softmax temperatures, as shares of a document's typical spread of distances: the first, the first where the prices of
# similar centers are known, and the last.
HOTTEST, WARM, COLDEST = 0.1, 0.03, 0.002
MOLTEN = 100.0  # no spread of prices needs more
MOST_HEATED = 20  # times that a fit may be heated, which ends where loads cannot be balanced at all
NARROWEST = 1e-30  # least spread as a share of all distances: in float32, colder softmaxes are NaN
GAP = 1e-6  # relative gap at which the rounding is taken as optimal: float32 distances resolve no more
MAX_STEPS = 40  # dual steps at one temperature


def fit_prices(shards: Shards, centers: Tensor | None, prices: Tensor, hottest: float) -> tuple[Tensor, float, float]:
    """Prices (K) that balance the softmax loads, its last temperature epsilon, and the imbalance max_j |K load_j - 1|.

    Temperatures fall from `hottest` to COLDEST, in units of the documents' typical spread of squared distances. Steps are
    short in a cold dual: where it does not balance because prices have far to go, it is heated first.
    """
    logs, count, distances = shards.total(log_spread, centers)
    spread = max(math.exp(logs / count), NARROWEST * distances) if count else 1.0
    temperature, balanced, heated = max(hottest, COLDEST), False, 0
    while True:
        epsilon, last = temperature * spread, temperature == COLDEST
        goal = IMBALANCE if last else 5 * IMBALANCE
        prices, imbalance = _ascend(shards, centers, prices, epsilon, goal)
        assert math.isfinite(imbalance), f"loads at temperature {temperature:g} of spread {spread:g}"
        balanced = balanced or imbalance <= goal
        if not balanced and temperature < MOLTEN and heated < MOST_HEATED:
            temperature, heated = temperature * 10, heated + 1
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
    shards: Shards, centers: Tensor | None, prices: Tensor, epsilon: float, goal: float
) -> tuple[Tensor, float]:
    """Newton ascent on the smoothed dual at one temperature, until the loads are within `goal` of equal."""

    def dual(prices: Tensor) -> tuple[Tensor, Tensor, float]:
        loads, overlaps, value = shards.total(dual_step, centers, prices, epsilon)
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

    def times(self, area: float) -> Assignment:
        """The same for squared distances `area` times as large, a power of two."""
        return replace(self, cost=self.cost * area, lower_bound=self.lower_bound * area, prices=self.prices * area)


def balanced_assignment(squared_distances_NK: Tensor) -> Assignment:
    """The cheapest assignment with cluster sizes floor(N / K) or ceil(N / K), from a matrix of squared distances.

    Raises UserError if N < K or an entry is not finite.
    """
    n, n_clusters = squared_distances_NK.shape
    check_counts(n, n_clusters)
    if not squared_distances_NK.isfinite().all():
        raise UserError("squared_distances must be finite, but some entries are NaN or infinite. Look for empty rows.")
    area = rescaling(math.sqrt(float(squared_distances_NK.abs().max()))) ** 2
    shards = ScaledShards(LocalShards(cut(squared_distances_NK)), area)
    return assign(shards, None, torch.zeros(n_clusters, dtype=torch.double), HOTTEST).times(1 / area)


def assign_points(points_ND: Tensor, centers_KD: Tensor) -> Assignment:
    """`balanced_assignment` from embeddings and centers, float32; nothing of size N x K x D is ever made."""
    check_counts(len(points_ND), len(centers_KD))
    start = torch.zeros(len(centers_KD), dtype=torch.double)
    factor = rescaling(float(torch.linalg.vector_norm(points_ND, math.inf)))
    shards = ScaledShards(LocalShards(cut(points_ND)), factor)
    return assign(shards, centers_KD.cpu() * factor, start, HOTTEST).times(factor**-2)


def assign(shards: Shards, centers: Tensor | None, prices: Tensor, hottest: float) -> Assignment:
    """Prices, then exact rounding among the documents at a border, more of them until the gap is closed."""
    prices, epsilon, _ = fit_prices(shards, centers, prices, hottest)
    n_clusters, width = len(prices), 8 * epsilon
    while True:
        labels, costs, borders, distances = zip(*shards.each(labels_step, centers, prices, width), strict=True)
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
            bound = lower_bound(shards, centers, final_prices, n)
            excess, rounding = cost - bound, 1e-12 * (cost + np.abs(final_prices).max())
            assert excess >= -rounding, "no assignment costs less than the dual value"
            gap = 0.0 if excess <= rounding else excess / cost
            if all_in or (gap <= GAP and not small):
                label[border] = moved
                return Assignment(label, cost, min(bound, cost), gap, torch.from_numpy(final_prices))
        assert not all_in, "with every document free to move there is a path"
        width = math.inf if small else 8 * width


def lower_bound(shards: Shards, centers: Tensor | None, prices: np.ndarray, n: int) -> float:
    """Dual value at the prices, a document: the N mod K dearest clusters are the ones to hold one document more."""
    floor, extra = divmod(n, len(prices))
    owed = floor * prices.sum() + np.sort(prices)[::-1][:extra].sum()
    (total,) = shards.total(bound_step, centers, torch.from_numpy(prices))
    return float((total - owed) / n)


def check_counts(n: int, n_clusters: int) -> None:
    if n_clusters < 1:
        raise UserError(f"n_clusters={n_clusters} must be at least 1. Raise cluster.n_clusters.")
    if n < n_clusters:
        raise UserError(
            f"n_clusters={n_clusters} must be at most the number of documents, {n}. "
            "Lower cluster.n_clusters or give more documents."
        )
