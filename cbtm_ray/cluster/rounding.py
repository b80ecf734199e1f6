"""From prices that balance almost to sizes that differ by at most 1: shortest paths on the graph of clusters.

C documents near a border between two clusters, K clusters. All distances are squared.
"""

from __future__ import annotations

import itertools
import math

import numpy as np


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
    edges = np.stack([_cheapest_moves(d, labels, j) for j in range(len(sizes))])
    if not _balance(d, labels, sizes, edges, prices):
        return None
    _improve(d, labels, sizes, edges)
    return labels, unit * _proving_prices(edges, prices, sizes)


def _balance(d: np.ndarray, labels: np.ndarray, sizes: np.ndarray, edges: np.ndarray, prices: np.ndarray) -> bool:
    """First phase: from clusters that are too large to those too small, until the dearest clusters are the larger ones.

    False if there is no path. Labels, sizes and edges change in place.
    """
    floor, extra = divmod(int(sizes.sum()), len(sizes))
    surplus = sizes - floor
    surplus[np.argsort(-prices, kind="stable")[:extra]] -= 1
    while surplus.any():
        path, _ = _cheapest_path(edges, surplus > 0, surplus < 0)
        if not path:
            return False
        amount = _move_along(d, labels, edges, path, min(surplus[path[0]], -surplus[path[-1]]))
        for counts in (sizes, surplus):
            counts[path[0]] -= amount
            counts[path[-1]] += amount
    return True


def _improve(d: np.ndarray, labels: np.ndarray, sizes: np.ndarray, edges: np.ndarray) -> None:
    """Second phase: sizes fit, but a path from a cluster of ceil(n / K) to one of floor(n / K) may still lower the cost."""
    floor = sizes.sum() // len(sizes)
    while True:
        path, cost = _cheapest_path(edges, sizes > floor, sizes == floor)
        if not cost < 0:
            return
        _move_along(d, labels, edges, path, 1)
        sizes[path[0]] -= 1
        sizes[path[-1]] += 1


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


def _move_along(d: np.ndarray, labels: np.ndarray, edges: np.ndarray, path: list[int], most: int) -> int:
    """Move up to `most` documents over each edge, as many as all edges have at their least cost; how many it was."""
    chosen = []
    for j, k in itertools.pairwise(path):
        members = np.flatnonzero(labels == j)
        extra = d[members, k] - d[members, j]
        chosen.append(members[extra == extra.min()])
    amount = min(most, *map(len, chosen))
    for members, k in zip(chosen, path[1:], strict=True):
        labels[members[:amount]] = k
    for j in path:
        edges[j] = _cheapest_moves(d, labels, j)
    return amount


def _proving_prices(edges: np.ndarray, prices: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Prices with p_j <= p_k + edge_jk: documents are in their cheapest clusters, and the largest are the dearest."""
    spare = (sizes == sizes.min())[:, None] & (sizes > sizes.min())[None]
    edges = np.where(spare, np.minimum(edges, 0.0), edges)
    for _ in range(len(prices)):
        prices = np.minimum(prices, (prices + edges).min(1))
    return prices
