"""What k-means computes on one shard of the documents: pure functions of a `Shard` and of K-sized arguments.

    N documents, D embedding dims, K clusters, C documents near a border between two clusters

A step returns sums, or results for few documents. The loops of `lloyd.py` and `balanced_assignment.py` ask `Shards` for the
results of each shard or for their total, and so run unchanged on one tensor (`LocalShards`) and over actors
(`kmeans_actors.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

ROWS = 1 << 13  # rows of a shard on this machine
SHARD_ROWS = 4096  # of a shard over actors: fixed, so that the number of actors cannot change the order of any sum
GROUPS = 16  # sums that a step sends over the network, and so the most actors that can hold the shards
_BLAS = ThreadpoolController().select(user_api="blas")  # numpy's
CACHE_BYTES = 1 << 30  # distances that a process keeps between steps; what does not fit is computed again each time


class Shards(Protocol):
    """All shards, wherever they are."""

    def each(self, step: Callable[..., Any], *args: Any) -> list[Any]:
        """`step(shard, *args)` of every shard, in shard order."""

    def total(self, step: Callable[..., tuple], *args: Any) -> tuple:
        """Column sums of what the step returns on the shards."""


def squared_distances(points_ND: Tensor, centers_KD: Tensor) -> Tensor:
    """(N, K) squared Euclidean distances by one matrix product: for clustering, assigning and routing alike.

    Both are shifted to the centers' mean first: in float32 |x|^2 - 2xc + |c|^2 loses what a common offset outweighs.
    """
    origin = centers_KD.mean(0)
    x, c = points_ND - origin, centers_KD - origin
    norms = (c * c).sum(1)[None] + (x * x).sum(1)[:, None]
    return norms.addmm_(x, c.T, alpha=-2).clamp_(min=0)


class Shard:
    """Shard number `position`: embeddings (N, D), or distances (N, K) where steps are given `centers=None`."""

    def __init__(self, rows: Tensor, position: int = 0, cache_bytes: int = CACHE_BYTES) -> None:
        self.rows, self.position, self._cache_bytes = rows, position, cache_bytes
        self._centers, self._distances = torch.empty(0), torch.empty(0)
        self._scaled: tuple[float, Shard] | None = None

    def times(self, factor: float) -> Shard:
        """The shard of rows `factor` times as large, made once."""
        if factor == 1:
            return self
        if self._scaled is None or self._scaled[0] != factor:
            rows = (self.rows.double() * factor).to(self.rows)
            self._scaled = factor, Shard(rows, self.position, self._cache_bytes)
        return self._scaled[1]

    def blocks(self, centers: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the rows with their (n, K) squared distances, each small enough for a processor's cache.

        Distances that fit in `cache_bytes` are computed once for the same centers and reused until other centers are given;
        larger ones are computed block by block in every call.
        """
        if centers is not None and 4 * len(self.rows) * len(centers) > self._cache_bytes:
            yield from self._compute(centers)
            return
        distances_NK = self.rows if centers is None else self._keep(centers)
        yield from ((rows, distances_NK[rows]) for rows in self._slices(distances_NK.shape[1]))

    def _keep(self, centers: Tensor) -> Tensor:
        """All distances (N, K), out of the cache if it is of these centers."""
        if not torch.equal(self._centers, centers):
            self._centers = torch.empty(0)  # the cache is of none until it is whole
            if self._distances.shape[1:] != centers.shape[:1]:
                self._distances = torch.empty(len(self.rows), len(centers), device=self.rows.device)
            for rows, distances in self._compute(centers):
                self._distances[rows] = distances
            self._centers = centers
        return self._distances

    def _compute(self, centers: Tensor) -> Iterator[tuple[slice, Tensor]]:
        here = centers.to(self.rows.device)
        yield from ((rows, squared_distances(self.rows[rows], here)) for rows in self._slices(len(centers)))

    def _slices(self, n_clusters: int) -> list[slice]:
        size = max(1, (1 << 18 if self.rows.device.type == "cpu" else 1 << 26) // n_clusters)
        return [slice(start, start + size) for start in range(0, max(len(self.rows), 1), size)]


def cut(rows: Tensor) -> list[Shard]:
    """Shards of ROWS rows; on a GPU just one. Never by the number of processors, which would change rounding errors."""
    size = ROWS if rows.device.type == "cpu" else max(1, len(rows))
    parts = rows.split(size)
    return [Shard(part, position, CACHE_BYTES // len(parts)) for position, part in enumerate(parts)]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Torch and numpy work on one thread: with more, small operations wait for each other, longer on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _BLAS.limit(limits=1):
            yield
    finally:
        torch.set_num_threads(before)


class LocalShards:
    """Shards held here; steps run on the threads that torch is set to use, a shard on each."""

    def __init__(self, shards: list[Shard]) -> None:
        self._shards = shards
        self._workers = max(1, min(torch.get_num_threads(), len(shards)))

    def each(self, step: Callable[..., Any], *args: Any) -> list[Any]:
        with one_thread(), ThreadPoolExecutor(self._workers) as pool:
            return list(pool.map(lambda shard: step(shard, *args), self._shards))

    def total(self, step: Callable[..., tuple], *args: Any) -> tuple:
        results = self.each(step, *args)
        return add_up([add_up(results[group]) for group in reduce_groups(len(results))])


def reduce_groups(n_shards: int) -> list[slice]:
    """The shards in at most GROUPS runs of neighbors, whose sums are what crosses the network.

    Whoever adds up sums the shards of a group first and then the groups, so that the number of actors does not change a
    bit of the outcome.
    """
    n = min(GROUPS, n_shards)
    return [slice(n_shards * i // n, n_shards * (i + 1) // n) for i in range(n)]


def add_up(parts: list[tuple]) -> tuple:
    """Column sums, in the order given."""
    return tuple(sum(column[1:], column[0]) for column in zip(*parts, strict=True))


def moments(shard: Shard) -> tuple[int, Tensor, Tensor]:
    """Count, sum (D) and sum of squares (D) of the embeddings, float64."""
    x = shard.rows.double()
    return len(x), x.sum(0).cpu(), (x * x).sum(0).cpu()


def take_rows(shard: Shard, index: list[np.ndarray]) -> Tensor:
    """The rows that `index` names for this shard, by their number in it."""
    return shard.rows[torch.tensor(index[shard.position]).to(shard.rows.device)].cpu()


def log_spread(shard: Shard, centers: Tensor | None) -> tuple[float, int, float]:
    """Sums of log(mean_j d2_ij - min_j d2_ij), of 1 for each such term, and of mean_j |d2_ij|.

    Logs, so that a far outlier sets no scale."""
    logs, count, total = 0.0, 0, 0.0
    for _, d in shard.blocks(centers):
        spread = (d.mean(1) - d.amin(1)).double()
        spread = spread[spread > 0]
        logs, count = logs + spread.log().sum().item(), count + len(spread)
        total += d.abs().mean(1).double().sum().item()
    return logs, count, total


def _softmax(d: Tensor, prices: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """softmax_j(-(d + p) / epsilon) and the soft minimum -epsilon log sum_j exp(-(d + p) / epsilon) of each row."""
    logits = (d + prices.to(d)).mul_(-1 / epsilon)
    top = logits.amax(1, keepdim=True)
    share = logits.sub_(top).exp_()
    norm = share.sum(1, keepdim=True)
    return share.div_(norm), (top.double() + norm.double().log()).mul_(-epsilon)


def dual_step(shard: Shard, centers: Tensor | None, prices: Tensor, epsilon: float) -> tuple[Tensor, Tensor, float]:
    """Sums of loads (K), overlaps (K, K) and smoothed minima: the dual's gradient, curvature and value."""
    loads, overlaps, value = torch.zeros(()), torch.zeros(()), 0.0
    for _, d in shard.blocks(centers):
        share, minimum = _softmax(d, prices, epsilon)
        share = share.double()  # as in means_step; the curvature too: in float32, other cuts drift apart by 1e-5
        loads, overlaps = loads + share.sum(0).cpu(), overlaps + _gram(share)
        value += minimum.sum().item()
    return loads, overlaps, value


def _gram(share: Tensor) -> Tensor:
    """share.T @ share (K, K); on a CPU by numpy, which computes one triangle of it: less than half of torch's time."""
    if share.device.type != "cpu":
        return (share.T @ share).cpu()
    rows = share.numpy()
    return torch.from_numpy(rows.T @ rows)


def means_step(shard: Shard, centers: Tensor, prices: Tensor | None, epsilon: float) -> tuple[Tensor, Tensor, float]:
    """Sums (K, D) and counts (K) of the documents by cluster, and the sum of their squared distances.

    With prices the softmax shares documents out, so that equal ones split as balance asks; else to the nearest center.
    """
    sums, counts, cost = torch.zeros(()), torch.zeros(()), 0.0
    for rows, d in shard.blocks(centers):
        if prices is None:
            share = torch.zeros_like(d).scatter_(1, d.argmin(1, keepdim=True), 1.0)
        else:
            share, _ = _softmax(d, prices, epsilon)
        # float64: rounding here is what iterations amplify, and so what makes differently cut shards drift apart.
        share = share.double()
        sums, counts = sums + (share.T @ shard.rows[rows].double()).cpu(), counts + share.sum(0).cpu()
        cost += (share * d).sum().item()
    return sums, counts, cost


def farthest_rows(shard: Shard, centers: Tensor, count: int) -> list[tuple[float, Tensor]]:
    """The `count` documents farthest from their nearest center: (squared distance, embedding)."""
    distance, index = torch.cat([d.amin(1) for _, d in shard.blocks(centers)]).topk(min(count, len(shard.rows)))
    return list(zip(distance.tolist(), shard.rows[index].cpu(), strict=True))


def bound_step(shard: Shard, centers: Tensor | None, prices: Tensor) -> tuple[float]:
    """Sum of min_j (d2_ij + p_j), float64."""
    return (sum((d.double() + prices.to(d.device)).amin(1).sum().item() for _, d in shard.blocks(centers)),)


def labels_step(
    shard: Shard, centers: Tensor | None, prices: Tensor, width: float
) -> tuple[np.ndarray, float, np.ndarray, np.ndarray]:
    """Labels argmin_j (d2_ij + p_j) as int32, the sum of their d2, and the documents at a border: index (C), d2 (C, K).

    At a border: another cluster is at most `width` dearer than the cheapest. Rounding moves no other document.
    """
    labels, cost, borders, distances = [], 0.0, [], []
    for rows, d in shard.blocks(centers):
        offers = d + prices.to(d)
        best, label = offers.min(1)
        near = ((offers <= best[:, None] + width).sum(1) > 1).nonzero()[:, 0]
        cost += d.gather(1, label[:, None]).double().sum().item()
        labels.append(label.int().cpu().numpy())
        borders.append(near.cpu().numpy() + rows.start)
        distances.append(d[near].cpu().numpy())
    return np.concatenate(labels), cost, np.concatenate(borders), np.concatenate(distances)


def distances_step(shard: Shard, centers: Tensor) -> np.ndarray:
    """(N, K) Euclidean distances."""
    return torch.cat([d.sqrt().cpu() for _, d in shard.blocks(centers)]).numpy()
