"""Serves log-probability requests from engines in other groups; keeps their KV caches in an LRU.

C tokens that a request asks about, V vocabulary. A request carries the whole sequence: the KV cache may be lost at any time.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch

from cbtm_ray.ensemble import Ensemble
from cbtm_ray.errors import UserError
from cbtm_ray.kv_cache import Chunk, KVCache, length_buckets


@dataclass(frozen=True)
class FarRead:
    """A request to one expert: its log-probabilities after every token of a sequence, from the position `start` on."""

    expert: int
    text: list[int]
    """The whole sequence, with the end-of-text token at position 0."""
    start: int
    key: str
    """Identifies the sequence while it grows, to find its KV cache."""


@dataclass
class _Held:
    tokens: list[int]
    slots: list[int]


class Contexts:
    """Answers requests with the experts of this process. Not thread-safe."""

    def __init__(self, ensemble: Ensemble, cache_tokens: int) -> None:
        """
        Args:
            cache_tokens: tokens of all sequences that each expert has memory for; the least recently used give way.
        """
        self._ensemble, self._cache_tokens = ensemble, cache_tokens
        self._caches = {expert: KVCache(cache_tokens) for expert in ensemble.experts}
        self._held: dict[int, OrderedDict[str, _Held]] = {expert: OrderedDict() for expert in ensemble.experts}
        self._free = {expert: list(range(cache_tokens)) for expert in ensemble.experts}

    def read(self, reads: list[FarRead]) -> list[np.ndarray]:
        """The log-probabilities that each request asks for, float32 (C, V).

        Raises:
            UserError: a sequence is longer than the cache.
        """
        found: dict[int, np.ndarray] = {}
        by_expert: dict[int, list[tuple[int, FarRead]]] = {}
        for number, read in enumerate(reads):
            by_expert.setdefault(read.expert, []).append((number, read))
        for expert, asked in by_expert.items():
            batch: list[tuple[tuple[int, FarRead], Chunk]] = []
            for number, read in asked:
                if not self._make_room(read, {other.key for (_, other), _ in batch}):
                    found |= self._read_batch(expert, batch)
                    batch = []
                    if not self._make_room(read, set()):
                        size = f"cache_tokens={self._cache_tokens}"
                        raise UserError(f"{size} must be at least {len(read.text)}, the tokens of a text. Raise it.")
                batch.append(((number, read), self._chunk(read)))
            found |= self._read_batch(expert, batch)
        return [found[number] for number in range(len(reads))]

    def _make_room(self, read: FarRead, busy: set[str]) -> bool:
        """Give the sequence its slots, taken from the least recently used ones; False if there are not enough."""
        held, free = self._held[read.expert], self._free[read.expert]
        mine = held.setdefault(read.key, _Held([], []))
        held.move_to_end(read.key)
        missing = len(read.text) - len(mine.slots)
        for key in list(held):
            if len(free) >= missing:
                break
            if key != read.key and key not in busy:
                free += held.pop(key).slots
        if len(free) < missing:
            return False
        for _ in range(missing):
            mine.slots.append(free.pop())
        return True

    def _chunk(self, read: FarRead) -> Chunk:
        """The tokens to read: from the first one that is not cached, or that the request asks about."""
        mine = self._held[read.expert][read.key]
        start = 0
        for known, token in zip(mine.tokens, read.text[: read.start], strict=False):
            if known != token:
                break
            start += 1
        mine.tokens = read.text
        return Chunk(read.text[start:], start, torch.tensor(mine.slots))

    def _read_batch(self, expert: int, batch: list[tuple[tuple[int, FarRead], Chunk]]) -> dict[int, np.ndarray]:
        found = {}
        for group in length_buckets(batch):
            rows = self._caches[expert].forward(self._ensemble.experts[expert], [chunk for _, chunk in group])
            for ((number, read), chunk), rows_CV in zip(group, rows, strict=True):
                found[number] = rows_CV[read.start - chunk.start :]
        return found
