"""Balanced k-means by dual prices, on plain tensors (paper section 3.2 asks for equal clusters while fitting).

    N documents, D embedding dims, K clusters, C documents near a border between two clusters

Giving N documents to K clusters of equal size at least cost is a transport problem, whose dual has one price a cluster:
maximise  mean_i min_j (d2_ij + p_j) - mean_j p_j.  Newton steps on the softmax-smoothed dual find the prices, shortest
paths on the graph of clusters then make the sizes exact, and the dual value certifies how far from the optimum that is.

All that touches documents is a step: a pure function of one `Shard` and of K-sized arguments, which returns sums. The
loops only add those up. They take `on_shards(step, *args)`, the list of `step(shard, *args)` in shard order, and so run
unchanged on one tensor (here) and over actors (`distributed.py`).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

OnShards = Callable[..., list[Any]]

IMBALANCE = 0.01  # while fitting, soft cluster sizes are within this share of N / K
# Softmax temperatures, as shares of a document's typical spread of distances: the first, the first where the prices of
# similar centres are known, and the last.
HOTTEST, WARM, COLDEST = 0.2, 0.03, 0.002
GAP = 1e-6  # relative gap at which the rounding is taken as optimal: float32 distances resolve no more
SEED_ROWS = 64  # rows a cluster in the sample that k-means++ starts from
MAX_STEPS = 40  # dual steps at one temperature
ROWS = 1 << 13  # rows of a shard on this machine
CACHE_BYTES = 1 << 30  # distances that a process keeps between steps; what does not fit is computed again each time


def squared_distances(points_ND: Tensor, centres_KD: Tensor) -> Tensor:
    """(N, K) squared Euclidean distances, by one matrix product.

    Both are shifted to the centres' mean first: in float32 |x|^2 - 2xc + |c|^2 loses what a common offset outweighs.
    """
    origin = centres_KD.mean(0)
    x, c = points_ND - origin, centres_KD - origin
    norms = (c * c).sum(1)[None] + (x * x).sum(1)[:, None]
    return norms.addmm_(x, c.T, alpha=-2).clamp_(min=0)


class Shard:
    """Shard number `position`: embeddings (N, D), or distances (N, K) where steps are given `centres=None`."""

    def __init__(self, rows: Tensor, position: int = 0, cache_bytes: int = CACHE_BYTES) -> None:
        self.rows, self.position, self._cache_bytes = rows, position, cache_bytes
        self._centres, self._distances = torch.empty(0), torch.empty(0)

    def blocks(self, centres: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the rows with their (n, K) squared distances, each small enough for a processor's cache."""
        n, device = len(self.rows), self.rows.device
        n_clusters = self.rows.shape[1] if centres is None else len(centres)
        known = centres is None or torch.equal(self._centres, centres)
        keep = not known and 4 * n * n_clusters <= self._cache_bytes
        if keep:
            self._centres = torch.empty(0)
            if self._distances.shape != (n, n_clusters):
                self._distances = torch.empty(n, n_clusters, device=device)
        distances = self.rows if centres is None else self._distances
        size = max(1, (1 << 18 if device.type == "cpu" else 1 << 26) // n_clusters)
        for rows in (slice(start, start + size) for start in range(0, max(n, 1), size)):
            if known:
                yield rows, distances[rows]
                continue
            assert centres is not None
            block = squared_distances(self.rows[rows], centres.to(device))
            if keep:
                distances[rows] = block
            yield rows, block
        if keep and centres is not None:
            self._centres = centres


def cut(rows: Tensor) -> list[Shard]:
    """Shards of ROWS rows; on a GPU just one. Never by the number of processors, which would change rounding errors."""
    size = ROWS if rows.device.type == "cpu" else max(1, len(rows))
    parts = rows.split(size)
    return [Shard(part, position, CACHE_BYTES // len(parts)) for position, part in enumerate(parts)]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Torch works on one thread: with more, small operations wait for each other, for ever longer on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def on_local(shards: list[Shard]) -> OnShards:
    """Runs steps here, a shard on each of the threads that torch is set to use."""
    workers = max(1, min(torch.get_num_threads(), len(shards)))

    def on_shards(step: Callable[..., Any], *args: Any) -> list[Any]:
        with one_thread(), ThreadPoolExecutor(workers) as pool:
            return list(pool.map(lambda shard: step(shard, *args), shards))

    return on_shards


def add_up(parts: list[tuple]) -> tuple:
    """Column sums of the shards' results, in shard order: rounding errors do not depend on actors."""
    return tuple(sum(column[1:], column[0]) for column in zip(*parts, strict=True))


def moments(shard: Shard) -> tuple[int, Tensor, Tensor]:
    """Count, sum (D) and sum of squares (D) of the embeddings, float64."""
    x = shard.rows.double()
    return len(x), x.sum(0).cpu(), (x * x).sum(0).cpu()


def take_rows(shard: Shard, index: list[np.ndarray]) -> Tensor:
    """The rows that `index` names for this shard, by their number in it."""
    return shard.rows[torch.tensor(index[shard.position]).to(shard.rows.device)].cpu()


def log_spread(shard: Shard, centres: Tensor | None) -> tuple[float, int]:
    """Sum of log(mean_j d2_ij - min_j d2_ij) and its number of terms: logs, so that a far outlier sets no scale."""
    logs, count = 0.0, 0
    for _, d in shard.blocks(centres):
        spread = (d.mean(1) - d.amin(1)).double()
        spread = spread[spread > 0]
        logs, count = logs + spread.log().sum().item(), count + len(spread)
    return logs, count


def _softmax(d: Tensor, prices: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """softmax_j(-(d + p) / epsilon) and the soft minimum -epsilon log sum_j exp(-(d + p) / epsilon) of each row."""
    logits = (d + prices.to(d)).mul_(-1 / epsilon)
    top = logits.amax(1, keepdim=True)
    share = logits.sub_(top).exp_()
    norm = share.sum(1, keepdim=True)
    return share.div_(norm), (top.double() + norm.double().log()).mul_(-epsilon)


def dual_step(shard: Shard, centres: Tensor | None, prices: Tensor, epsilon: float) -> tuple[Tensor, Tensor, float]:
    """Sums of loads (K), overlaps (K, K) and smoothed minima: the dual's gradient, curvature and value."""
    loads, overlaps, value = torch.zeros(()), torch.zeros(()), 0.0
    for _, d in shard.blocks(centres):
        share, minimum = _softmax(d, prices, epsilon)
        share = share.double()  # as in means_step
        loads, overlaps = loads + share.sum(0).cpu(), overlaps + (share.T @ share).cpu()
        value += minimum.sum().item()
    return loads, overlaps, value


def means_step(shard: Shard, centres: Tensor, prices: Tensor | None, epsilon: float) -> tuple[Tensor, Tensor, float]:
    """Sums (K, D) and counts (K) of the documents by cluster, and the sum of their squared distances.

    With prices the softmax shares documents out, so that equal ones split as balance asks; else to the nearest centre.
    """
    sums, counts, cost = torch.zeros(()), torch.zeros(()), 0.0
    for rows, d in shard.blocks(centres):
        if prices is None:
            share = torch.zeros_like(d).scatter_(1, d.argmin(1, keepdim=True), 1.0)
        else:
            share, _ = _softmax(d, prices, epsilon)
        # float64: rounding here is what iterations amplify, and so what makes differently cut shards drift apart.
        share = share.double()
        sums, counts = sums + (share.T @ shard.rows[rows].double()).cpu(), counts + share.sum(0).cpu()
        cost += (share * d).sum().item()
    return sums, counts, cost


def farthest_rows(shard: Shard, centres: Tensor, count: int) -> list[tuple[float, Tensor]]:
    """The `count` documents farthest from their nearest centre: (squared distance, embedding)."""
    distance, index = torch.cat([d.amin(1) for _, d in shard.blocks(centres)]).topk(min(count, len(shard.rows)))
    return list(zip(distance.tolist(), shard.rows[index].cpu(), strict=True))


def bound_step(shard: Shard, centres: Tensor | None, prices: Tensor) -> float:
    """Sum of min_j (d2_ij + p_j), float64."""
    return sum((d.double() + prices.to(d.device)).amin(1).sum().item() for _, d in shard.blocks(centres))


def labels_step(
    shard: Shard, centres: Tensor | None, prices: Tensor, width: float
) -> tuple[np.ndarray, float, np.ndarray, np.ndarray]:
    """Labels argmin_j (d2_ij + p_j) as int32, the sum of their d2, and the documents at a border: index (C), d2 (C, K).

    At a border: another cluster is at most `width` dearer than the cheapest. Rounding moves no other document.
    """
    labels, cost, borders, distances = [], 0.0, [], []
    for rows, d in shard.blocks(centres):
        offers = d + prices.to(d)
        best, label = offers.min(1)
        near = ((offers <= best[:, None] + width).sum(1) > 1).nonzero()[:, 0]
        cost += d.gather(1, label[:, None]).double().sum().item()
        labels.append(label.int().cpu().numpy())
        borders.append(near.cpu().numpy() + rows.start)
        distances.append(d[near].cpu().numpy())
    return np.concatenate(labels), cost, np.concatenate(borders), np.concatenate(distances)


def distances_step(shard: Shard, centres: Tensor) -> np.ndarray:
    """(N, K) Euclidean distances."""
    return torch.cat([d.sqrt().cpu() for _, d in shard.blocks(centres)]).numpy()


def fit_prices(
    on_shards: OnShards, centres: Tensor | None, prices: Tensor, hottest: float
) -> tuple[Tensor, float, float]:
    """Prices (K) that balance the softmax loads, its last temperature epsilon, and the imbalance max_j |K load_j - 1|.

    Temperatures fall from `hottest` to COLDEST, in units of the documents' typical spread of squared distances.
    """
    logs, count = add_up(on_shards(log_spread, centres))
    spread = math.exp(logs / count) if count else 1.0
    temperature = max(hottest, COLDEST)
    while True:
        last = temperature == COLDEST
        epsilon = temperature * spread
        prices, imbalance = _ascend(on_shards, centres, prices, epsilon, IMBALANCE if last else 5 * IMBALANCE)
        if last:
            break
        temperature = max(0.3 * temperature, COLDEST)
    if imbalance > IMBALANCE:
        logger.warning(
            "cluster sizes while fitting are within %.1f %% of equal, not %.1f %%", 100 * imbalance, 100 * IMBALANCE
        )
    return prices - prices.mean(), epsilon, imbalance


@one_thread()
def _ascend(
    on_shards: OnShards, centres: Tensor | None, prices: Tensor, epsilon: float, goal: float
) -> tuple[Tensor, float]:
    """Newton ascent on the smoothed dual at one temperature, until the loads are within `goal` of equal."""

    def dual(prices: Tensor) -> tuple[Tensor, Tensor, float]:
        loads, overlaps, value = add_up(on_shards(dual_step, centres, prices, epsilon))
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

    Raises ValueError if N < K or an entry is not finite.
    """
    n, n_clusters = squared_distances_NK.shape
    _check_counts(n, n_clusters)
    if not squared_distances_NK.isfinite().all():
        raise ValueError("squared_distances must be finite, but some entries are NaN or infinite. Look for empty rows.")
    return _assign(on_local(cut(squared_distances_NK)), None, torch.zeros(n_clusters, dtype=torch.double), HOTTEST)


def assign_points(points_ND: Tensor, centres_KD: Tensor) -> Assignment:
    """`balanced_assignment` from embeddings and centres, float32; nothing of size N x K x D is ever made."""
    _check_counts(len(points_ND), len(centres_KD))
    start = torch.zeros(len(centres_KD), dtype=torch.double)
    return _assign(on_local(cut(points_ND)), centres_KD.cpu(), start, HOTTEST)


def _assign(on_shards: OnShards, centres: Tensor | None, prices: Tensor, hottest: float) -> Assignment:
    """Prices, then exact rounding among the documents at a border, more of them until the gap is closed."""
    prices, epsilon, _ = fit_prices(on_shards, centres, prices, hottest)
    n_clusters, width = len(prices), 8 * epsilon
    while True:
        labels, costs, borders, distances = zip(*on_shards(labels_step, centres, prices, width), strict=True)
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
            bound = lower_bound(on_shards, centres, final_prices, n)
            excess, rounding = cost - bound, 1e-12 * (cost + np.abs(final_prices).max())
            assert excess >= -rounding, "no assignment costs less than the dual value"
            gap = 0.0 if excess <= rounding else excess / cost
            if all_in or (gap <= GAP and not small):
                label[border] = moved
                return Assignment(label, cost, min(bound, cost), gap, torch.from_numpy(final_prices))
        assert not all_in, "with every document free to move there is a path"
        width = math.inf if small else 8 * width


def lower_bound(on_shards: OnShards, centres: Tensor | None, prices: np.ndarray, n: int) -> float:
    """Dual value at the prices, a document: the N mod K dearest clusters are the ones to hold one document more."""
    floor, extra = divmod(n, len(prices))
    owed = floor * prices.sum() + np.sort(prices)[::-1][:extra].sum()
    return float((sum(on_shards(bound_step, centres, torch.from_numpy(prices))) - owed) / n)


def round_sizes(d_CK: np.ndarray, fixed_K: np.ndarray, prices_K: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Cheapest labels (C,) such that all sizes are floor(n / K) or ceil(n / K), and the prices (K,) that prove it.

    `fixed_K` counts the other documents, which stay where they are. Successive shortest paths from the labels that are
    cheapest at `prices_K`: an edge j -> k costs the least d_ik - d_ij over the documents i of cluster j. Distances are
    made whole numbers first: sums are then exact, and equal documents tie. None if these documents do not suffice.
    """
    unit = _unit(d_CK)
    d, prices = np.rint(d_CK.astype(float) / unit), np.rint(prices_K / unit)
    labels = (d + prices).argmin(1)
    sizes = fixed_K + np.bincount(labels, minlength=len(fixed_K))
    floor, extra = divmod(int(sizes.sum()), len(sizes))
    target = np.full(len(sizes), floor)
    target[np.argsort(-prices, kind="stable")[:extra]] += 1
    edges = np.stack([_cheapest_moves(d, labels, j) for j in range(len(sizes))])
    while True:
        surplus = sizes - target
        fits = not surplus.any()
        # Once the sizes fit, a path from a cluster of ceil(n / K) to one of floor(n / K) may still lower the cost.
        sources, sinks = (sizes > floor, sizes == floor) if fits else (surplus > 0, surplus < 0)
        path, cost = _cheapest_path(edges, sources, sinks)
        if fits and not cost < 0:
            return labels, unit * _proving_prices(edges, prices, sizes)
        if not path:
            return None
        amount = _move_along(d, labels, path, 1 if fits else min(surplus[path[0]], -surplus[path[-1]]))
        sizes[path[0]] -= amount
        sizes[path[-1]] += amount
        target = sizes.copy() if fits else target
        for j in path:
            edges[j] = _cheapest_moves(d, labels, j)


def _unit(d: np.ndarray) -> float:
    """The step to which distances are rounded: what their type resolves, yet sums over a path stay below 2^53."""
    if not d.size:
        return 1.0
    digits = 22 if d.dtype == np.float32 else 40
    return float(max(np.median(d) * 2.0**-digits, d.max() * 2.0**-45)) or 1.0


def _cheapest_moves(d: np.ndarray, labels: np.ndarray, j: int) -> np.ndarray:
    """(K,) least extra cost of a move from cluster j to each other one; inf to itself, or if it has no document."""
    members = d[labels == j]
    edges = (members - members[:, j, None]).min(0, initial=np.inf)
    edges[j] = np.inf
    return edges


def _cheapest_path(edges: np.ndarray, sources: np.ndarray, sinks: np.ndarray) -> tuple[list[int], float]:
    """Bellman-Ford on the K clusters, from any source to its cheapest sink: the path and its cost; [], inf if none."""
    cost, before = np.where(sources, 0.0, np.inf), np.full(len(edges), -1)
    for _ in range(len(edges)):
        offers = cost[:, None] + edges
        better = offers.min(0) < cost
        if not better.any():
            break
        before[better] = offers.argmin(0)[better]
        cost[better] = offers.min(0)[better]
    end = int(np.where(sinks, cost, np.inf).argmin())
    if not (sinks[end] and np.isfinite(cost[end])):
        return [], math.inf
    path = [end]
    while before[path[-1]] >= 0:
        path.append(int(before[path[-1]]))
        assert len(path) <= len(edges), "no cycle of negative cost"
    return path[::-1], float(cost[end])


def _move_along(d: np.ndarray, labels: np.ndarray, path: list[int], most: int) -> int:
    """Move up to `most` documents over each edge, as many as all edges have at their least cost; how many it was."""
    chosen = []
    for j, k in itertools.pairwise(path):
        members = np.flatnonzero(labels == j)
        extra = d[members, k] - d[members, j]
        chosen.append(members[extra == extra.min()])
    amount = min(most, *map(len, chosen))
    for members, k in zip(chosen, path[1:], strict=True):
        labels[members[:amount]] = k
    return amount


def _proving_prices(edges: np.ndarray, prices: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Prices with p_j <= p_k + edge_jk: documents are in their cheapest clusters, and the largest are the dearest."""
    spare = (sizes == sizes.min())[:, None] & (sizes > sizes.min())[None]
    edges = np.where(spare, np.minimum(edges, 0.0), edges)
    for _ in range(len(prices)):
        prices = np.minimum(prices, (prices + edges).min(1))
    return prices


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


def check_documents(on_shards: OnShards, n_clusters: int) -> tuple[list[int], float]:
    """Documents in each shard, and their variance averaged over dimensions (the unit of `tol`, as in scikit-learn).

    Raises ValueError if there are fewer documents than clusters, an embedding is not finite, or shards differ in D.
    """
    parts = on_shards(moments)
    dimensions = sorted({len(sums) for _, sums, _ in parts})
    if len(dimensions) > 1:
        raise ValueError(f"embeddings have {dimensions} dimensions, but must all have as many. Embed all shards again.")
    n, sums, squares = add_up(parts)
    _check_counts(n, n_clusters)
    if not squares.isfinite().all():
        raise ValueError("embeddings must be finite, but some are NaN or infinite. Find the documents they come from.")
    return [count for count, _, _ in parts], float((squares / n - (sums / n) ** 2).mean())


@one_thread()
def start_centres(on_shards: OnShards, counts: list[int], n_clusters: int, random_state: int) -> Tensor:
    """(K, D) k-means++ centres from a seeded sample of rows: the best of 2 + log K draws each time, as in scikit-learn.

    Rows are drawn by their number in the whole, so that the sample is the same however they are cut into shards.
    """
    rng = np.random.default_rng(random_state)
    n, ends = sum(counts), np.cumsum(counts)
    index = np.sort(rng.choice(n, size=min(n, SEED_ROWS * n_clusters), replace=False))
    parts = np.split(index, np.searchsorted(index, ends[:-1]))
    local = [part - (end - count) for part, end, count in zip(parts, ends, counts, strict=True)]
    sample = torch.cat(on_shards(take_rows, local))
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
    on_shards: OnShards, state: Progress, *, balanced: bool, max_iter: int, tolerance: float
) -> Iterator[Progress]:
    """Lloyd's iterations from `state`, until the centres move by at most `tolerance` (squared, summed) or `max_iter`.

    Balanced means are taken with softmax loads within IMBALANCE of equal, which needs K x K numbers from a shard; only
    the labels of the final centres are rounded to exact sizes.
    """
    while state.iteration < max_iter and state.shift > tolerance:
        centres, prices, epsilon, imbalance = state.centres, state.prices, 0.0, math.nan
        if balanced:
            prices, epsilon, imbalance = fit_prices(on_shards, centres, prices, WARM if state.iteration else HOTTEST)
        steps = on_shards(means_step, centres, prices if balanced else None, epsilon)
        sums, counts, cost = add_up(steps)
        moved = torch.where(counts[:, None] > 0.5, sums / counts[:, None], centres.double()).float()
        empty = (counts <= 0.5).nonzero()[:, 0]
        if len(empty):
            found = itertools.chain.from_iterable(on_shards(farthest_rows, centres, len(empty)))
            far = sorted(found, key=lambda pair: -pair[0])
            for j, (distance, row) in zip(empty.tolist(), far, strict=False):
                moved[j] = row if distance > 0 else moved[j]
        shift = float(((moved - centres).double() ** 2).sum())
        n = float(counts.sum())
        state = Progress(state.iteration + 1, moved, prices, shift, cost / n, imbalance)
        yield state


def _check_counts(n: int, n_clusters: int) -> None:
    if n_clusters < 1:
        raise ValueError(f"n_clusters={n_clusters} must be at least 1. Raise cluster.n_clusters.")
    if n < n_clusters:
        raise ValueError(
            f"n_clusters={n_clusters} must be at most the number of documents, {n}. "
            "Lower cluster.n_clusters or give more documents."
        )


class BalancedKMeans:
    """k-means with equal cluster sizes while fitting, in scikit-learn's contract.

    Parameters as in `sklearn.cluster.KMeans`; `balanced=False` is plain k-means. After `fit`:

    cluster_centers_ : ndarray (K, D) float32
    labels_ : ndarray (N,) int32, with sizes that differ by at most 1 if balanced
    inertia_ : sum of the squared distances to the centres of `labels_`
    n_iter_ : Lloyd iterations
    gap_ : relative gap of `labels_` to the dual lower bound at these centres; 0.0 if not balanced
    imbalance_ : max_j |K load_j - 1| of the soft loads behind the last means; NaN if not balanced
    """

    def __init__(
        self, n_clusters: int, *, balanced: bool = True, max_iter: int = 50, tol: float = 1e-4, random_state: int = 0
    ) -> None:
        self.n_clusters = n_clusters
        self.balanced = balanced
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    def fit(self, X: np.ndarray | Tensor, y: None = None) -> Self:
        """Fit to embeddings (N, D). Raises ValueError if N < K, or X is not finite or not two-dimensional."""
        on_shards = on_local(cut(_as_points(X)))
        *_, state = self.iterations(on_shards)
        return self.finish(on_shards, state)

    def iterations(self, on_shards: OnShards, state: Progress | None = None) -> Iterator[Progress]:
        """The start, then the state after each Lloyd iteration; goes on from `state` if given."""
        counts, variance = check_documents(on_shards, self.n_clusters)
        if state is None:
            centres = start_centres(on_shards, counts, self.n_clusters, self.random_state)
            prices = torch.zeros(self.n_clusters, dtype=torch.double)
            state = Progress(0, centres, prices, math.inf, math.inf, math.nan)
        yield state
        yield from lloyd(
            on_shards, state, balanced=self.balanced, max_iter=self.max_iter, tolerance=self.tol * variance
        )

    def finish(self, on_shards: OnShards, state: Progress) -> Self:
        """Label the documents by the final centres and set the learnt attributes."""
        if self.balanced:
            best = _assign(on_shards, state.centres, state.prices, WARM if state.iteration else HOTTEST)
            labels, cost, self.gap_ = best.labels, best.cost * len(best.labels), best.gap
        else:
            steps = on_shards(labels_step, state.centres, torch.zeros(self.n_clusters), -1.0)
            labels, cost, self.gap_ = np.concatenate([step[0] for step in steps]), sum(step[1] for step in steps), 0.0
        self.labels_, self.inertia_ = labels, float(cost)
        self.cluster_centers_ = state.centres.numpy()
        self.n_iter_, self.imbalance_ = state.iteration, state.imbalance
        return self

    def predict(self, X: np.ndarray | Tensor) -> np.ndarray:
        """(N,) int32 nearest centres: not balanced, as the paper assigns the corpus."""
        on_shards, centres = self._ready(X)
        return np.concatenate([step[0] for step in on_shards(labels_step, centres, torch.zeros(len(centres)), -1.0)])

    def transform(self, X: np.ndarray | Tensor) -> np.ndarray:
        """(N, K) Euclidean distances (not squared) to the centres, float32."""
        on_shards, centres = self._ready(X)
        return np.concatenate(on_shards(distances_step, centres))

    def _ready(self, X: np.ndarray | Tensor) -> tuple[OnShards, Tensor]:
        if not hasattr(self, "cluster_centers_"):
            raise ValueError("this BalancedKMeans is not fitted yet. Call fit first.")
        points, centres = _as_points(X), torch.from_numpy(self.cluster_centers_)
        if points.shape[1] != centres.shape[1]:
            raise ValueError(
                f"embeddings have {points.shape[1]} dimensions, but must have {centres.shape[1]} as the centres do. "
                "Embed the documents as those of the fit."
            )
        return on_local(cut(points)), centres


def _as_points(X: np.ndarray | Tensor) -> Tensor:
    if not isinstance(X, Tensor):
        X = torch.from_numpy(np.require(X, np.float32, ["C", "W"]))
    if X.ndim != 2:
        raise ValueError(f"embeddings have shape {tuple(X.shape)}, but must be (documents, dimensions).")
    return X.float()
