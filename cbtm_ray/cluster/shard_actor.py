"""The process that holds a part of the embeddings while k-means runs. It imports what it computes with, and no more."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from cbtm_ray import files
from cbtm_ray.cluster.shard_steps import CACHE_BYTES, LocalShards, Shard, add_up


class ShardActor:
    """Holds consecutive groups of shards; `position` is the number of the first shard."""

    def __init__(self, groups: list[list[str]], position: int, device: str) -> None:
        uris = [uri for group in groups for uri in group]
        cache_bytes = CACHE_BYTES // len(uris)
        held = [Shard(_read_points(uri).to(device), position + i, cache_bytes) for i, uri in enumerate(uris)]
        self._shards, self._sizes = LocalShards(held), [len(group) for group in groups]

    def each(self, step: Callable[..., Any], args: tuple) -> list[Any]:
        return self._shards.each(step, *args)

    def sums(self, step: Callable[..., tuple], args: tuple) -> list[tuple]:
        """The sum of every group."""
        results = iter(self._shards.each(step, *args))
        return [add_up(list(itertools.islice(results, size))) for size in self._sizes]


def _read_points(uri: str) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(files.read_array(uri), dtype=np.float32))
