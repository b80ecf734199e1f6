"""Where documents are embedded: in Ray tasks on CPUs, or in actors that keep the embedder on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
from ray.data import ActorPoolStrategy, Dataset

from cbtm_ray.ray_session import capacity, check_fits

Row = dict[str, Any]


def map_embedding(rows: list[Row], work: Callable[[Row], Row], gpus: float) -> Dataset:
    """`work(row)` for every row, each a task of its own; with `gpus` in a pool of actors that have as many each.

    Raises:
        UserError: this machine has fewer GPUs than one actor needs.
    """
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    if not gpus:
        return dataset.map(work)
    check_fits("embed.gpus", "GPU", gpus)
    room = max(1, int(capacity("GPU") / gpus))
    worker: Any = _Worker
    return dataset.map(
        worker, fn_constructor_args=(work,), num_gpus=gpus, compute=ActorPoolStrategy(size=min(room, len(rows)))
    )


class _Worker:
    """An actor's process lives on between rows, and with it what `work` loads once a process."""

    def __init__(self, work: Callable[[Row], Row]) -> None:
        self._work = work

    def __call__(self, row: Row) -> Row:
        return self._work(row)
