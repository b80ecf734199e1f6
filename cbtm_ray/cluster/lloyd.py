"""Lloyd's iterations of balanced k-means (paper section 3.2: equal clusters while fitting), and where they start.

    N documents, D embedding dims, K clusters

`balanced_assignment.py` balances the clusters. `shard_steps.py` does all work on documents: the loops here only add up its
results, on one machine or many.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from cbtm_ray.cluster.balanced_assignment import HOTTEST, WARM, check_counts, fit_prices
from cbtm_ray.cluster.scale import rescaling
from cbtm_ray.cluster.shard_steps import (
    Shards,
    add_up,
    farthest_rows,
    means_step,
    moments,
    one_thread,
    squared_distances,
    take_rows,
)
from cbtm_ray.errors import UserError

SEED_ROWS = 64  # rows a cluster in the sample that k-means++ starts from

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

    def times(self, factor: float) -> LloydState:
        """The same for embeddings `factor` times as large, a power of two."""
        area = factor**2
        return replace(
            self,
            centers=self.centers * factor,
            prices=self.prices * area,
            shift=self.shift * area,
            cost=self.cost * area,
        )


def check_documents(shards: Shards, n_clusters: int) -> tuple[list[int], float, float]:
    """Documents in each shard; their variance averaged over dimensions (the unit of `tol`, as in scikit-learn); and the
    power of two by which float32 has room for their squared distances.

    Raises UserError if there are fewer documents than clusters, an embedding is not finite, or shards differ in D.
    """
    parts = shards.each(moments)
    dimensions = sorted({len(sums) for _, sums, _ in parts})
    if len(dimensions) > 1:
        raise UserError(f"embeddings have {dimensions} dimensions, but must all have as many. Embed all shards again.")
    n, sums, squares = add_up(parts)
    check_counts(n, n_clusters)
    if not squares.isfinite().all():
        raise UserError(
            "embeddings must be finite in float32, but some are NaN, infinite or too large. Find the documents they come from."
        )
    variance = float((squares / n - (sums / n) ** 2).mean())
    return [count for count, _, _ in parts], variance, rescaling(math.sqrt(float(squares.mean()) / n))


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
