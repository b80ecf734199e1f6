"""Expert groups that ask each other for log-probabilities: texts go over as token ids, step by step."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import ReplicaUnavailableError

from cbtm_ray.decode.remote import RemoteScorer, ScoreRequest

from .placement import Layout

logger = logging.getLogger("ray.serve")

REPLICA_LOST = (RayActorError, ReplicaUnavailableError)
"""The errors of a call whose replica dies."""
MAX_ATTEMPTS = 3


class RemoteServer:
    """Reads texts for other groups, all that have come while the thread was busy in one go."""

    def __init__(self, scorer: RemoteScorer) -> None:
        self._scorer, self._thread = scorer, ThreadPoolExecutor(1)
        self._waiting: list[tuple[list[ScoreRequest], asyncio.Future[list[np.ndarray]]]] = []
        self._work = asyncio.Event()
        self.n_reads = 0
        """Texts read, each time one expert."""

    async def read(self, reads: list[ScoreRequest]) -> list[np.ndarray]:
        answer: asyncio.Future[list[np.ndarray]] = asyncio.get_running_loop().create_future()
        self._waiting.append((reads, answer))
        self._work.set()
        return await answer

    async def run(self) -> None:
        """Answer, for ever."""
        while True:
            await self._work.wait()
            self._work.clear()
            waiting, self._waiting = self._waiting, []
            await self._answer(waiting)

    async def _answer(self, waiting: list[tuple[list[ScoreRequest], asyncio.Future[list[np.ndarray]]]]) -> None:
        """Read for all in one go. Where that fails, read for each alone: only whose own reads fail gets the exception."""
        reads = [read for theirs, _ in waiting for read in theirs]
        try:
            found = iter(await asyncio.get_running_loop().run_in_executor(self._thread, self._scorer.score, reads))
        except Exception as problem:
            if len(waiting) > 1:
                for one in waiting:
                    await self._answer([one])
                return
            logger.exception("Reading texts for another group has failed.")
            ((_, answer),) = waiting
            if not answer.done():
                answer.set_exception(problem)
            return
        self.n_reads += len(reads)
        for theirs, answer in waiting:
            rows = [next(found) for _ in theirs]
            if not answer.done():  # whoever asked may have gone
                answer.set_result(rows)


class RemoteClient:
    """Asks other groups for an engine, which runs in a thread of its own."""

    def __init__(self, layout: Layout) -> None:
        self._layout, self._loop = layout, asyncio.get_running_loop()

    def ask(self, reads: list[ScoreRequest]) -> list[Future[np.ndarray]]:
        """See `RemoteExperts` in cbtm_ray/decode/engine.py."""
        answers: list[Future[np.ndarray]] = [Future() for _ in reads]
        by_group: dict[int, list[int]] = {}
        for number, read in enumerate(reads):
            by_group.setdefault(self._layout.group_of(read.expert), []).append(number)
        for group, numbers in by_group.items():
            theirs = [reads[number] for number in numbers], [answers[number] for number in numbers]
            asyncio.run_coroutine_threadsafe(self._pass_on(self._layout.names[group], *theirs), self._loop)
        return answers

    async def _pass_on(self, name: str, reads: list[ScoreRequest], answers: list[Future[np.ndarray]]) -> None:
        try:
            rows = await self._call(name, reads)
        except Exception as problem:
            logger.exception("%s could not be asked", name)
            for answer in answers:
                answer.set_exception(problem)
            return
        for answer, rows_CV in zip(answers, rows, strict=True):
            answer.set_result(rows_CV)

    async def _call(self, name: str, reads: list[ScoreRequest]) -> list[np.ndarray]:
        handle = serve.get_deployment_handle(name).options(_by_reference=False)
        for attempt in range(1, MAX_ATTEMPTS):
            try:
                return list(await handle.read.remote(reads))
            except REPLICA_LOST as lost:  # the next one reads the texts anew
                logger.warning("A replica of %s died under a question, attempt %d: %s", name, attempt, lost)
        return list(await handle.read.remote(reads))
