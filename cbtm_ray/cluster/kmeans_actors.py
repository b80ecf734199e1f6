"""Balanced k-means over Ray actors: the loops of `lloyd.py`, the steps of `shard_steps.py`, the shards held by actors.

    N documents, D embedding dims, K clusters

An actor's state is a function of its URIs alone, and a step is a pure function of its arguments, so Ray may restart an
actor and repeat a step without counting anything twice. Shards stand in at most 16 groups, whatever N and the number of
actors; a group's sums come back and are added up in the order of `shard_uris`, so the number of actors does not change a
bit of the outcome. While fitting, messages hold K x D or K x K numbers a group; the labels (N int32) and the documents at
a border cross once, when the last centers are labeled.
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
from cbtm_ray.cluster.kmeans import BalancedKMeans, LloydState
from cbtm_ray.cluster.shard_actor import ShardActor
from cbtm_ray.cluster.shard_steps import add_up, reduce_groups
from cbtm_ray.errors import UserError
from cbtm_ray.ray_session import capacity, check_fits


class ActorShards:
    """Shards held by actors; a step runs on all actors at once, and results are in the order of the shards."""

    def __init__(self, actors: list[Any]) -> None:
        self._actors = actors

    def each(self, step: Callable[..., Any], *args: Any) -> list[Any]:
        return self._ask("each", step, args)

    def total(self, step: Callable[..., tuple], *args: Any) -> tuple:
        return add_up(self._ask("sums", step, args))

    def _ask(self, method: str, step: Callable[..., Any], args: tuple) -> list[Any]:
        parts = ray.get([getattr(actor, method).remote(step, args) for actor in self._actors])
        return [result for part in parts for result in part]


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
    gpus_per_actor: float = 0,
    state_uri: str | None = None,
    on_iteration: Callable[[int, float], None] | None = None,
) -> BalancedKMeans:
    """Fit to the embeddings (N_i, D) in .npy files; the same result as `BalancedKMeans.fit` on all of them.

    `state_uri` (.npz) is written after each iteration, and a call that finds it goes on from there. `on_iteration` gets
    the iteration (from 1) and the mean squared distance of the documents to the centers that it started from. There are
    at most 16 actors, and as many as shards, and as the cluster's CPUs and GPUs hold: one more would wait for ever.

    Raises UserError if there is no shard, n_actors < 1, no GPU where one is asked for, N < K, an embedding is not finite,
    or the state at `state_uri` belongs to other arguments.
    """
    if not shard_uris:
        raise UserError("shard_uris=[] must name at least one shard. Run the embedding stage first.")
    if n_actors < 1:
        raise UserError(f"n_actors={n_actors} must be at least 1. Raise cluster.actors.")
    model = BalancedKMeans(n_clusters, balanced=balanced, max_iter=max_iter, tol=tol, random_state=random_state)
    shards = hashlib.sha256("\n".join(shard_uris).encode()).hexdigest()[:12]
    identity = f"n_clusters={n_clusters} balanced={balanced} random_state={random_state} shards={shards}"
    saved = _load_state(state_uri, identity) if state_uri else None
    actors = _start_actors(shard_uris, n_actors, cpus_per_actor, gpus_per_actor)
    try:
        held = ActorShards(actors)
        states = model.iterations(held, saved)
        state = next(states)  # the start, or what was saved
        for state in states:
            if state_uri:
                _save_state(state_uri, identity, state)
            if on_iteration:
                on_iteration(state.iteration, state.cost)
        return model.finish(held, state)
    finally:
        for actor in actors:
            ray.kill(actor)


def _start_actors(shard_uris: list[str], n_actors: int, cpus_per_actor: float, gpus_per_actor: float) -> list[Any]:
    parts = [shard_uris[group] for group in reduce_groups(len(shard_uris))]
    room = [int(capacity(kind) / each) for kind, each in (("CPU", cpus_per_actor), ("GPU", gpus_per_actor)) if each]
    check_fits("cluster.gpus_per_actor", "GPU", gpus_per_actor)
    n_actors = max(1, min(n_actors, len(parts), *room))
    options = {"num_cpus": cpus_per_actor, "num_gpus": gpus_per_actor, "max_restarts": -1, "max_task_retries": -1}
    cuts = [len(parts) * i // n_actors for i in range(n_actors + 1)]
    before = list(itertools.accumulate((len(part) for part in parts), initial=0))
    actor, device = ray.remote(ShardActor).options(**options), "cuda" if gpus_per_actor else "cpu"
    return [actor.remote(parts[a:b], before[a], device) for a, b in itertools.pairwise(cuts)]


def _save_state(uri: str, identity: str, state: LloydState) -> None:
    buffer = io.BytesIO()
    scalars = np.array([state.iteration, state.shift, state.cost, state.imbalance])
    np.savez(buffer, identity=identity, centers=state.centers.numpy(), prices=state.prices.numpy(), scalars=scalars)
    files.write_bytes(uri, buffer.getvalue())


def _load_state(uri: str, identity: str) -> LloydState | None:
    if not files.exists(uri):
        return None
    with np.load(io.BytesIO(files.read_bytes(uri)), allow_pickle=False) as saved:
        made = f"a fit by an earlier version, {saved['identity']}" if "centers" not in saved else str(saved["identity"])
        if made != identity:
            raise UserError(
                f"state_uri={uri} must be of the same fit, but holds {made} where this one is {identity}. "
                "Delete it, or give another."
            )
        iteration, shift, cost, imbalance = saved["scalars"].tolist()
        centers, prices = torch.from_numpy(saved["centers"]), torch.from_numpy(saved["prices"])
    return LloydState(int(iteration), centers, prices, shift, cost, imbalance)
