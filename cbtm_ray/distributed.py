"""Balanced k-means over Ray actors: the loops and steps of `cluster.py`, with the shards held by actors.

    N documents, D embedding dims, K clusters

An actor's state is a function of its URIs alone, and a step is a pure function of its arguments, so Ray may restart an
actor and repeat a step without counting anything twice. Results come back for each shard and are added up in the order
of `shard_uris`, so the number of actors does not change a bit of the outcome. While fitting, messages hold K x D or
K x K numbers; the labels (N int32) and the documents at a border cross once, when the last centres are labelled.
"""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import ray
import torch

from cbtm_ray import files
from cbtm_ray.cluster import CACHE_BYTES, BalancedKMeans, OnShards, Progress, Shard, on_local


class _ShardActor:
    """Holds consecutive shards; `position` is the number of the first."""

    def __init__(self, uris: list[str], position: int) -> None:
        cache_bytes = CACHE_BYTES // len(uris)
        self._on_shards = on_local([Shard(_read_points(uri), position + i, cache_bytes) for i, uri in enumerate(uris)])

    def run(self, step: Callable[..., Any], args: tuple) -> list[Any]:
        return self._on_shards(step, *args)


def fit_distributed(
    shard_uris: list[str],
    *,
    n_clusters: int,
    balanced: bool = True,
    max_iter: int = 50,
    tol: float = 1e-4,
    random_state: int = 0,
    n_actors: int = 2,
    cpus_per_actor: float = 1,
    state_uri: str | None = None,
    on_iteration: Callable[[int, float], None] | None = None,
) -> BalancedKMeans:
    """Fit to the embeddings (N_i, D) in .npy files; the same result as `BalancedKMeans.fit` on all of them.

    `state_uri` (.npz) is written after each iteration, and a call that finds it goes on from there. `on_iteration` gets
    the iteration (from 1) and the mean squared distance of the documents to the centres that it started from. There are
    at most as many actors as shards, and as the cluster's CPUs hold now: one more would wait for ever.

    Raises ValueError if there is no shard, n_actors < 1, N < K, an embedding is not finite, or the state at `state_uri`
    belongs to other arguments.
    """
    if not shard_uris:
        raise ValueError("shard_uris=[] must name at least one shard. Run the embedding stage first.")
    if n_actors < 1:
        raise ValueError(f"n_actors={n_actors} must be at least 1. Raise cluster.actors.")
    model = BalancedKMeans(n_clusters, balanced=balanced, max_iter=max_iter, tol=tol, random_state=random_state)
    shards = hashlib.sha256("\n".join(shard_uris).encode()).hexdigest()[:12]
    identity = f"n_clusters={n_clusters} balanced={balanced} random_state={random_state} shards={shards}"
    saved = _load_state(state_uri, identity) if state_uri else None
    actors = _start_actors(shard_uris, n_actors, cpus_per_actor)
    try:
        on_shards = _on_actors(actors)
        states = model.iterations(on_shards, saved)
        state = next(states)  # the start, or what was saved
        for state in states:
            if state_uri:
                _save_state(state_uri, identity, state)
            if on_iteration:
                on_iteration(state.iteration, state.cost)
        return model.finish(on_shards, state)
    finally:
        for actor in actors:
            ray.kill(actor)


def _start_actors(shard_uris: list[str], n_actors: int, cpus_per_actor: float) -> list[Any]:
    room = int(ray.cluster_resources().get("CPU", 1) / cpus_per_actor) if cpus_per_actor > 0 else n_actors
    n_actors = max(1, min(n_actors, len(shard_uris), room))
    options = {"num_cpus": cpus_per_actor, "max_restarts": -1, "max_task_retries": -1}
    cuts = [len(shard_uris) * i // n_actors for i in range(n_actors + 1)]
    actor = ray.remote(_ShardActor).options(**options)
    return [actor.remote(shard_uris[a:b], a) for a, b in itertools.pairwise(cuts)]


def _on_actors(actors: list[Any]) -> OnShards:
    """Runs a step on all actors at once; the results in the order of the shards."""

    def on_shards(step: Callable[..., Any], *args: Any) -> list[Any]:
        parts = ray.get([actor.run.remote(step, args) for actor in actors])
        return [result for part in parts for result in part]

    return on_shards


def _read_points(uri: str) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(files.read_array(uri), dtype=np.float32))


def _save_state(uri: str, identity: str, state: Progress) -> None:
    buffer = io.BytesIO()
    scalars = np.array([state.iteration, state.shift, state.cost, state.imbalance])
    np.savez(buffer, identity=identity, centres=state.centres.numpy(), prices=state.prices.numpy(), scalars=scalars)
    files.write_bytes(uri, buffer.getvalue())


def _load_state(uri: str, identity: str) -> Progress | None:
    if not files.exists(uri):
        return None
    with np.load(io.BytesIO(files.read_bytes(uri)), allow_pickle=False) as saved:
        if str(saved["identity"]) != identity:
            raise ValueError(
                f"state_uri={uri} must be of the same fit, but holds {saved['identity']} where this one is {identity}. "
                "Delete it, or give another."
            )
        iteration, shift, cost, imbalance = saved["scalars"].tolist()
        centres, prices = torch.from_numpy(saved["centres"]), torch.from_numpy(saved["prices"])
    return Progress(int(iteration), centres, prices, shift, cost, imbalance)
