"""Continuous batching: sequences join and leave at every step, and a step is one forward pass for many of them.

Sequences wait for different experts. scheduler.py chooses which of them a step serves: sequences that wait for one expert, or
for several experts whose weights are stacked.

Numeric only: a server calls the engine from one thread, and text.py makes text of the tokens.
"""

from __future__ import annotations

import itertools
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch

from cbtm_ray.decode.kv_cache import Chunk, KVCache, check_attention
from cbtm_ray.decode.remote import ScoreRequest
from cbtm_ray.decode.scheduler import PendingChunk, choose_pass
from cbtm_ray.decode.sequence import Request, Sequence, Step
from cbtm_ray.decode.stacked import StackedExperts, can_stack
from cbtm_ray.decode.strategies import STRATEGIES, Strategy, strategy_for
from cbtm_ray.errors import UserError
from cbtm_ray.merge.ensemble import Ensemble
from cbtm_ray.merge.scores import check_top_k

PROMPT_TOKENS = 128
"""Most tokens that an expert reads of a sequence in one step: a long prompt must not delay the other sequences."""
REMOTE_WAIT_S = 0.05
"""The longest time that a step waits for remote experts when it has nothing else to do."""

RemoteExperts: TypeAlias = "Callable[[list[ScoreRequest]], list[Future[np.ndarray]]]"
"""Sends requests to experts in other groups; each future completes by itself."""


@dataclass
class _Running:
    sequence: Sequence
    strategy: Strategy
    targets: dict[int, int] | None = None
    """By expert: the position up to which it has to read before the sequence can advance. None: not computed yet."""
    steps_waited: int = 0
    """Steps since an expert last read of it."""
    remote_answers: dict[int, Future[np.ndarray]] = field(default_factory=dict)
    """By remote expert: the answer that the sequence waits for."""


class Engine:
    """Decodes many requests with one ensemble. Not thread-safe.

    The tokens of a sequence do not depend on the other sequences, up to the rounding of sums in another order.
    """

    def __init__(
        self, ensemble: Ensemble, *, max_sequences: int, cache_tokens: int, remote: RemoteExperts | None = None
    ) -> None:
        """
        Args:
            max_sequences: most sequences that run at once.
            cache_tokens: tokens of all running sequences that each expert has memory for; a sequence reserves the tokens of
                its prompt and of its longest answer.
            remote: sends requests to the experts that this process does not hold.
        """
        for name, value in (("max_sequences", max_sequences), ("cache_tokens", cache_tokens)):
            if value < 1:
                raise UserError(f"{name}={value} must be at least 1. Raise it.")
        check_attention(ensemble.model_config)
        self.ensemble, self._remote = ensemble, remote
        self.failed: list[tuple[int, BaseException]] = []
        """Sequences that ended because a remote expert failed, with the reason. The caller empties the list."""
        self.active = set(range(ensemble.n_experts))
        self._max_sequences, self._cache_tokens = max_sequences, cache_tokens
        self._caches = {expert: KVCache(cache_tokens) for expert in ensemble.experts}
        together = max_sequences > 1 and can_stack(ensemble.experts, ensemble.model_config)
        self._stacked = StackedExperts(ensemble.experts, self._caches) if together else None
        self._free = list(range(cache_tokens))  # slots of the caches, in order
        self._waiting: deque[tuple[int, Request]] = deque()
        self._running: dict[int, _Running] = {}
        self._ids, self._name = itertools.count(), uuid.uuid4().hex

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
            UserError: it can never run.
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
        """Route to these experts only, from the next step on.

        Running sequences are re-routed as if these experts had been the only ones from the start.

        Raises:
            UserError: none, or one that the ensemble does not have.
        """
        known = range(self.ensemble.n_experts)
        if not experts or not experts <= set(known):
            raise UserError(f"experts={sorted(experts)} must be some of 0 to {known[-1]}. Name at least one.")
        if experts == self.active:
            return
        self.active = set(experts)
        for running in self._running.values():
            running.remote_answers.clear()
            running.targets = None
            running.sequence.reroute(self.active)
            running.strategy = type(running.strategy)(running.sequence)

    def step(self) -> list[tuple[int, Step]]:
        """Run one forward pass; the new tokens of all sequences, if any. Of a long prompt it reads a piece."""
        self._join()
        local: list[PendingChunk[_Running]] = []
        remote: list[tuple[_Running, ScoreRequest]] = []
        for number, running in self._running.items():
            for expert, chunk in _chunks(running):
                if expert in self.ensemble.experts:
                    local.append(PendingChunk(expert, chunk, running.steps_waited, running))
                else:
                    remote.append((running, self._score_request(number, running.sequence, expert, chunk)))
        self._send(remote)
        if local:
            self._forward(local)
        else:
            wait(
                [one for running in self._running.values() for one in running.remote_answers.values()],
                REMOTE_WAIT_S,
                FIRST_COMPLETED,
            )
        found = []
        for number, running in list(self._running.items()):
            running.steps_waited += 1
            steps = _advance(running) if self._is_ready(number, running) else []
            found += [(number, step) for step in steps]
            if steps and steps[-1].finish_reason:
                self._leave(number)
        return found

    def _forward(self, pending: list[PendingChunk[_Running]]) -> None:
        """Run the pass that the scheduler chooses."""
        chosen, chunks = choose_pass(pending, stacked=self._stacked is not None), dict[int, list[Chunk]]()
        for one in chosen:
            chunks.setdefault(one.expert, []).append(one.chunk)
        if self._stacked and len(chunks) > 1:
            found = self._stacked.forward(chunks)
        else:
            ((expert, theirs),) = chunks.items()
            found = {expert: self._caches[expert].forward(self.ensemble.experts[expert], theirs)}
        rows = {expert: iter(theirs) for expert, theirs in found.items()}
        for one in chosen:
            one.sequence.sequence.append_predictions(one.expert, next(rows[one.expert]))
            one.sequence.steps_waited = 0

    def _score_request(self, number: int, sequence: Sequence, expert: int, chunk: Chunk) -> ScoreRequest:
        token_ids = [*sequence.token_ids, *sequence.drafts][: chunk.end]
        return ScoreRequest(expert, token_ids, chunk.start, f"{self._name}-{number}")

    def _send(self, requests: list[tuple[_Running, ScoreRequest]]) -> None:
        """Send the requests of a step to remote experts, all together."""
        if requests:
            assert self._remote is not None
            answers = self._remote([request for _, request in requests])
            for (running, request), answer in zip(requests, answers, strict=True):
                running.remote_answers[request.expert] = answer

    def _is_ready(self, number: int, running: _Running) -> bool:
        """Whether a sequence waits for no expert any more. It gets the answers of the remote experts that have come."""
        answers = running.remote_answers
        for expert in [expert for expert, answer in answers.items() if answer.done()]:
            answer = answers.pop(expert)
            if problem := answer.exception():
                self.failed.append((number, problem))
                self._leave(number)
                return False
            running.sequence.append_predictions(expert, answer.result())
        return not answers and not _pending(running)

    def _join(self) -> None:
        """Start waiting requests, in order: a large request is not overtaken by small ones forever."""
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
        check_top_k(request.top_k, self.ensemble.routes)
        strategy_for(request)
        least = 0 if request.echo_logprobs and request.prompt else 1
        if request.max_tokens < least:
            raise UserError(f"max_tokens={request.max_tokens} must be at least {least}. Raise it.")
        vocabulary = self.ensemble.model_config.vocab_size
        for token in request.prompt:
            if not 0 <= token < vocabulary:
                raise UserError(f"prompt={token} must be token ids from 0 to {vocabulary - 1}.")
        check_room(request, self.ensemble.max_length, self._cache_tokens)


def generate(ensemble: Ensemble, request: Request) -> Iterator[Step]:
    """Decode one request alone: its tokens as they come.

    Raises:
        UserError: the request can never run (see `Engine.add`).
    """
    engine = Engine(ensemble, max_sequences=1, cache_tokens=slots_needed(request))
    engine.add(request)
    while engine.running or engine.waiting:
        for _, step in engine.step():
            yield step


def slots_needed(request: Request) -> int:
    """Tokens that an expert reads for a request: the end-of-text token and all others but the last token of the answer.

    Each takes a slot of the cache and a position of the model. A prompt without an answer is read to its end.
    """
    return len(request.prompt) + max(request.max_tokens, 1)


def check_room(request: Request, max_length: int, cache_tokens: int) -> None:
    """UserError: a request needs more slots than the cache has, or more positions than the model."""
    needed = slots_needed(request)
    for bound, most in (("max_position_embeddings", max_length), ("cache_tokens", cache_tokens)):
        if needed > most:
            raise UserError(
                f"max_tokens={request.max_tokens} with a prompt of {len(request.prompt)} tokens takes {needed} positions, "
                f"which must be at most {most} ({bound}). Shorten the prompt or ask for less."
            )


def _pending(running: _Running) -> dict[int, int]:
    """By expert: the position up to which it has to read next; without experts that have a request under way."""
    sequence = running.sequence
    if running.targets is None:
        running.targets = sequence.echo_targets(PROMPT_TOKENS) if sequence.echoing else running.strategy.targets()
    return {
        expert: min(end, sequence.expert_states[expert].length + PROMPT_TOKENS)
        for expert, end in running.targets.items()
        if end > sequence.expert_states[expert].length and expert not in running.remote_answers
    }


def _chunks(running: _Running) -> Iterator[tuple[int, Chunk]]:
    """The tokens that these experts have to read."""
    sequence = running.sequence
    for expert, end in _pending(running).items():
        yield expert, Chunk(sequence.unread_tokens(expert, end), sequence.expert_states[expert].length, sequence.slots)


def _advance(running: _Running) -> list[Step]:
    """Advance a sequence whose experts have read enough; its new tokens."""
    running.targets = None
    return running.sequence.echo() if running.sequence.echoing else running.strategy.advance()
