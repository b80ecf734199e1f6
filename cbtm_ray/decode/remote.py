"""Serves log-probability requests from engines in other groups; keeps their KV caches in an LRU.

C tokens that a request asks about, V vocabulary. A request carries the whole sequence: the KV cache may be lost at any time.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch

from cbtm_ray.decode.kv_cache import Chunk, KVCache, length_buckets
from cbtm_ray.errors import UserError
from cbtm_ray.merge.ensemble import Ensemble


@dataclass(frozen=True)
class ScoreRequest:
    """A request to one expert: its log-probabilities after every token of a sequence, from the position `start` on."""

    expert: int
    token_ids: list[int]
    """The whole sequence, with the end-of-text token at position 0."""
    start: int
    key: str
    """Identifies the sequence while it grows, to find its KV cache."""


@dataclass
class _CachedSequence:
    token_ids: list[int]
    slots: list[int]


class RemoteScorer:
    """Answers requests with the experts of this process. Not thread-safe."""

    def __init__(self, ensemble: Ensemble, cache_tokens: int) -> None:
        """
        Args:
            cache_tokens: tokens of all sequences that each expert has memory for; the least recently used give way.
        """
        self._ensemble, self._cache_tokens = ensemble, cache_tokens
        self._caches = {expert: KVCache(cache_tokens) for expert in ensemble.experts}
        self._cached: dict[int, OrderedDict[str, _CachedSequence]] = {k: OrderedDict() for k in ensemble.experts}
        self._free = {expert: list(range(cache_tokens)) for expert in ensemble.experts}

    def score(self, requests: list[ScoreRequest]) -> list[np.ndarray]:
        """The log-probabilities that each request asks for, float32 (C, V).

        Raises:
            UserError: a sequence is longer than the cache.
        """
        found: dict[int, np.ndarray] = {}
        by_expert: dict[int, list[tuple[int, ScoreRequest]]] = {}
        for number, request in enumerate(requests):
            by_expert.setdefault(request.expert, []).append((number, request))
        for expert, numbered in by_expert.items():
            batch: list[tuple[tuple[int, ScoreRequest], Chunk]] = []
            for number, request in numbered:
                if not self._reserve_slots(request, {other.key for (_, other), _ in batch}):
                    found |= self._score_batch(expert, batch)
                    batch = []
                    if not self._reserve_slots(request, set()):
                        size = f"cache_tokens={self._cache_tokens}"
                        needed = len(request.token_ids)
                        raise UserError(f"{size} must be at least {needed}, the tokens of a text. Raise it.")
                batch.append(((number, request), self._chunk(request)))
            found |= self._score_batch(expert, batch)
        return [found[number] for number in range(len(requests))]

    def _reserve_slots(self, request: ScoreRequest, busy: set[str]) -> bool:
        """Give the sequence its slots, taken from the least recently used ones; False if there are not enough."""
        cached, free = self._cached[request.expert], self._free[request.expert]
        sequence = cached.setdefault(request.key, _CachedSequence([], []))
        cached.move_to_end(request.key)
        missing = len(request.token_ids) - len(sequence.slots)
        for key in list(cached):
            if len(free) >= missing:
                break
            if key != request.key and key not in busy:
                free += cached.pop(key).slots
        if len(free) < missing:
            return False
        for _ in range(missing):
            sequence.slots.append(free.pop())
        return True

    def _chunk(self, request: ScoreRequest) -> Chunk:
        """The tokens to read: from the first one that is not cached, or that the request asks about."""
        sequence = self._cached[request.expert][request.key]
        start = 0
        for known, token in zip(sequence.token_ids, request.token_ids[: request.start], strict=False):
            if known != token:
                break
            start += 1
        sequence.token_ids = request.token_ids[:start]  # the rest is overwritten, and known once the pass has succeeded
        return Chunk(request.token_ids[start:], start, torch.tensor(sequence.slots))

    def _score_batch(self, expert: int, batch: list[tuple[tuple[int, ScoreRequest], Chunk]]) -> dict[int, np.ndarray]:
        found = {}
        for group in length_buckets(batch):
            rows = self._caches[expert].forward(self._ensemble.experts[expert], [chunk for _, chunk in group])
            for ((number, request), chunk), rows_CV in zip(group, rows, strict=True):
                found[number] = rows_CV[request.start - chunk.start :]
                self._cached[expert][request.key].token_ids = request.token_ids
        return found
