"""Embeddings of any size: by a power of two they are brought to where float32 has room for their squared distances.

A power of two changes no digit, so the clusters do not depend on the unit of the embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from cbtm_ray.cluster.shard_steps import Shard, Shards

ROOM = 40  # embeddings between 2^-ROOM and 2^ROOM stay as they are
MOST = 120  # the largest exponent of a factor: float32 holds factors, and centers times them


def rescaling(size: float) -> float:
    """The power of two that brings a typical size to about 1; 1.0 where float32 has room for its squares anyway."""
    if size == 0 or 2.0**-ROOM <= size <= 2.0**ROOM:
        return 1.0
    return 2.0 ** max(-MOST, min(MOST, -round(math.log2(size))))


class ScaledShards:
    """Shards with rows `factor` times as large as in `shards`."""

    def __init__(self, shards: Shards, factor: float) -> None:
        self._shards, self._factor = shards, factor

    def each(self, step: Callable[..., Any], *args: Any) -> list[Any]:
        return self._shards.each(_scaled, self._factor, step, *args)

    def total(self, step: Callable[..., tuple], *args: Any) -> tuple:
        return self._shards.total(_scaled, self._factor, step, *args)


def _scaled(shard: Shard, factor: float, step: Callable[..., Any], *args: Any) -> Any:
    return step(shard.times(factor), *args)
