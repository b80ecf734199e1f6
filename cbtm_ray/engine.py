"""Continuous batching: sequences join and leave at every step, and each expert reads for all of them in one pass.

Numeric only: a server calls it from one thread, and text is made of the tokens elsewhere (text.py).
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from cbtm_ray.ensemble import Ensemble
from cbtm_ray.kv_cache import Chunk, KVCache
from cbtm_ray.route import check_top_k
from cbtm_ray.sequence import Request, Sequence, Step
from cbtm_ray.strategies import STRATEGIES, Strategy, strategy_for

PROMPT_TOKENS = 128
"""Of a prompt that an expert reads in one step, so that a long one does not hold up the sequences beside it."""
PADDING_TOKENS = 32
"""Of one pass at most; a pass more costs about as much as these."""


@dataclass
class _Running:
    sequence: Sequence
    strategy: Strategy


class Engine:
    """Decodes many requests with one ensemble. Not for several threads at once.

    What a sequence gives does not depend on the others, up to the rounding of sums in another order.
    """

    def __init__(self, ensemble: Ensemble, *, max_sequences: int, cache_tokens: int) -> None:
        """
        Args:
            max_sequences: sequences that run at once.
            cache_tokens: tokens of all of them that each expert has memory for; one needs those of its prompt and of its
                longest answer.
        """
        for name, value in (("max_sequences", max_sequences), ("cache_tokens", cache_tokens)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1. Raise it.")
        self.ensemble = ensemble
        self.active = set(range(len(ensemble.experts)))
        self._max_sequences, self._cache_tokens = max_sequences, cache_tokens
        self._caches = [KVCache(model, cache_tokens) for model in ensemble.experts]
        self._free = list(range(cache_tokens))  # slots of the caches, in order
        self._waiting: deque[tuple[int, Request]] = deque()
        self._running: dict[int, _Running] = {}
        self._ids = itertools.count()

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def add(self, request: Request) -> int:
        """Queue a request; its sequence joins when there is room.

        Returns:
            The number that `step` and `cancel` know it by.

        Raises:
            ValueError: it can never run.
        """
        self._check(request)
        number = next(self._ids)
        self._waiting.append((number, request))
        return number

    def cancel(self, sequence: int) -> None:
        """End a sequence, running or waiting; nothing if it has ended already."""
        self._waiting = deque(pair for pair in self._waiting if pair[0] != sequence)
        if sequence in self._running:
            self._leave(sequence)

    def set_active(self, experts: set[int]) -> None:
        """Route to these experts only, from the next step on; running sequences as if it had always been so.

        Raises:
            ValueError: none, or one that the ensemble does not have.
        """
        known = range(len(self.ensemble.experts))
        if not experts or not experts <= set(known):
            raise ValueError(f"experts={sorted(experts)} must be some of 0 to {known[-1]}. Name at least one.")
        if experts == self.active:
            return
        self.active = set(experts)
        for running in self._running.values():
            running.sequence.reroute(self.active)
            running.strategy = type(running.strategy)(running.sequence)

    def step(self) -> list[tuple[int, Step]]:
        """Run one step of the batch: the new tokens of every sequence that has got any; of a long prompt a piece is read."""
        self._join()
        jobs: dict[int, list[tuple[Sequence, Chunk]]] = {}
        for running in self._running.values():
            for expert, chunk in self._chunks(running):
                jobs.setdefault(expert, []).append((running.sequence, chunk))
        for expert, chunks in jobs.items():
            for batch in _passes(chunks):
                for (sequence, _), rows_CV in zip(
                    batch, self._caches[expert].read([chunk for _, chunk in batch]), strict=True
                ):
                    sequence.take(expert, rows_CV)
        found = []
        for number, running in list(self._running.items()):
            steps = _advance(running)
            found += [(number, step) for step in steps]
            if steps and steps[-1].finish_reason:
                self._leave(number)
        return found

    def _chunks(self, running: _Running) -> Iterator[tuple[int, Chunk]]:
        """What each expert has to read for the sequence in this step."""
        sequence = running.sequence
        reads = running.strategy.reads() if sequence.routed else sequence.prompt_reads(PROMPT_TOKENS)
        for expert, end in reads.items():
            start = sequence.readings[expert].length
            if end > start:
                yield expert, Chunk(sequence.unread(expert, end), start, sequence.slots)

    def _join(self) -> None:
        """In the order of asking, so that a large request is not overtaken for ever."""
        while self._waiting and len(self._running) < self._max_sequences:
            number, request = self._waiting[0]
            needed = slots_needed(request)
            if needed > len(self._free):
                return
            self._waiting.popleft()
            slots, self._free = self._free[:needed], self._free[needed:]
            sequence = Sequence(self.ensemble, request, torch.tensor(slots), self.active)
            self._running[number] = _Running(sequence, STRATEGIES[strategy_for(request)](sequence))

    def _leave(self, number: int) -> None:
        slots = self._running.pop(number).sequence.slots
        self._free = sorted([*self._free, *slots.tolist()])

    def _check(self, request: Request) -> None:
        check_top_k(request.top_k, len(self.ensemble.experts))
        strategy_for(request)
        if request.refresh_tokens < 1:
            raise ValueError(f"refresh_tokens={request.refresh_tokens} must be at least 1. Raise it.")
        least = 0 if request.echo_logprobs and request.prompt else 1
        if request.max_tokens < least:
            raise ValueError(f"max_tokens={request.max_tokens} must be at least {least}. Raise it.")
        vocabulary = self.ensemble.experts[0].config.vocab_size
        for token in request.prompt:
            if not 0 <= token < vocabulary:
                raise ValueError(f"prompt={token} must be token ids from 0 to {vocabulary - 1}.")
        for name, most, needed in (
            ("", self.ensemble.max_length, len(request.prompt) + request.max_tokens),
            (" (cache_tokens)", self._cache_tokens, slots_needed(request)),
        ):
            if needed > most:
                raise ValueError(
                    f"max_tokens={request.max_tokens} with a prompt of {len(request.prompt)} tokens must be at most "
                    f"{most}{name} together. Shorten the prompt or ask for less."
                )


def slots_needed(request: Request) -> int:
    """What of `cache_tokens` a request takes: the end-of-text token and all others but the last, which nobody reads."""
    return len(request.prompt) + max(request.max_tokens, 1)


def _passes(chunks: list[tuple[Sequence, Chunk]]) -> Iterator[list[tuple[Sequence, Chunk]]]:
    """Chunks that are read in one pass, right-padded: alike in length, so that little of it is padding."""
    batch: list[tuple[Sequence, Chunk]] = []
    n_tokens = 0
    for pair in sorted(chunks, key=lambda pair: len(pair[1].tokens)):
        longest = len(pair[1].tokens)
        if (len(batch) + 1) * longest - (n_tokens + longest) > PADDING_TOKENS:
            yield batch
            batch, n_tokens = [], 0
        batch.append(pair)
        n_tokens += longest
    yield batch


def _advance(running: _Running) -> list[Step]:
    """The steps that a sequence's experts have read enough for."""
    sequence, steps = running.sequence, []
    if not sequence.routed:
        steps = sequence.route_prompt()
        if not sequence.routed or (steps and steps[-1].finish_reason):
            return steps
        running.strategy.reads()  # satisfied: the running experts have read everything
    return steps + running.strategy.advance()
