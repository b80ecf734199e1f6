"""Balanced k-means over Ray actors: python -m benchmarks.distributed [--n 200000 400000 --k 64 --actors 1 2]

    N documents, D embedding dims, K clusters

Seconds of a Lloyd iteration with each number of actors, and the bytes that cross the network in it, counted by pickling
every message between the driver and the actors. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import pickle
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.clustering import skewed_documents
from cbtm_ray.cluster import kmeans_actors
from cbtm_ray.ray_session import ray_session

SHARD_ROWS = 8192


def write_shards(folder: Path, n: int, args: argparse.Namespace) -> list[str]:
    points = skewed_documents(n, args.dim, args.seed).numpy()
    uris = []
    for first in range(0, n, SHARD_ROWS):
        uris.append(str(folder / f"{n}-{first // SHARD_ROWS:05d}.npy"))
        np.save(uris[-1], points[first : first + SHARD_ROWS])
    return uris


class CountingShards(kmeans_actors.ActorShards):
    """`ActorShards` that count the bytes of every message to an actor and back."""

    sent = 0

    def _ask(self, method: str, step: Callable[..., Any], args: tuple) -> list[Any]:
        results = super()._ask(method, step, args)
        CountingShards.sent += len(self._actors) * len(pickle.dumps((step, args))) + len(pickle.dumps(results))
        return results


def measure(uris: list[str], n_actors: int, args: argparse.Namespace) -> tuple[float, float, np.ndarray]:
    """Seconds and bytes of an iteration, the mean of all but the first, which fills caches; and the centers."""
    times, sent = list[float](), list[int]()

    def mark(iteration: int, _: float) -> None:
        times.append(time.perf_counter())
        sent.append(CountingShards.sent)

    model = kmeans_actors.fit_distributed(
        uris, n_clusters=args.k, max_iter=args.iterations, tol=0, random_state=args.seed, n_actors=n_actors,
        on_iteration=mark,
    )  # fmt: skip
    steps = len(times) - 1
    return (times[-1] - times[0]) / steps, (sent[-1] - sent[0]) / steps, model.cluster_centers_


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--n", type=int, nargs="+", default=[200_000, 400_000], help="documents")
    parser.add_argument("--dim", type=int, default=100, help="embedding dimensions")
    parser.add_argument("--k", type=int, default=64, help="clusters")
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 2], help="a CPU that Ray counts for each")
    parser.add_argument("--iterations", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    table = Table("N", "actors", "s an iteration", "kB an iteration", "bytes a document")
    result: dict[str, Any] = {}
    kmeans_actors.ActorShards = CountingShards  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as folder, ray_session(local_cpus=max(args.actors)):
        for n in args.n:
            uris, centers = write_shards(Path(folder), n, args), []
            for n_actors in args.actors:
                seconds, size, found = measure(uris, n_actors, args)
                centers.append(found)
                result |= {
                    f"n{n}_actors{n_actors}_s": round(seconds, 3),
                    f"n{n}_actors{n_actors}_kb": round(size / 1e3),
                }
                table.add_row(f"{n:,}", str(n_actors), f"{seconds:.3f}", f"{size / 1e3:,.0f}", f"{size / n:.1f}")
            assert all(np.array_equal(centers[0], each) for each in centers), "the number of actors changes nothing"
            first, last = args.actors[0], args.actors[-1]
            result[f"n{n}_speedup"] = round(result[f"n{n}_actors{first}_s"] / result[f"n{n}_actors{last}_s"], 2)
    Console().print(f"D = {args.dim}, K = {args.k}, seed {args.seed}, centers equal bit for bit")
    Console().print(table)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
