"""Experts behind the endpoint: a replica holds some of them, or all, and decodes many sequences at once."""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import ray
import torch
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.util import metrics

from cbtm_ray import files
from cbtm_ray.decode.engine import Engine
from cbtm_ray.decode.remote import RemoteScorer, ScoreRequest
from cbtm_ray.decode.sequence import Request, Step
from cbtm_ray.merge.ensemble import ensemble_of_one, load_ensemble
from cbtm_ray.models import load_model
from cbtm_ray.stages import DENSE_FOLDER

from .placement import DENSE_MODEL, ENSEMBLE, Layout
from .registry import REPORT_EVERY_S, Reporter
from .remote_experts import RemoteClient, RemoteServer

logger = logging.getLogger("ray.serve")

MESSAGE_S = 0.002
"""Between two messages of a stream, for every other stream: a little more than a message costs two cores, 1.3 ms by the speeds
with and without the endpoint (docs/LOG.md). Many streams would spend more on messages than on tokens."""


@serve.deployment(health_check_period_s=2)
class ExpertGroup:
    """Engines for the ensemble and, if asked for, the dense control, which one thread steps in turn."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        run_dir: str,
        layout: Layout,
        index: int,
        *,
        routing: str,
        dense: bool,
        max_sequences: int,
        cache_tokens: int,
        resident_experts: int | None,
        registry: DeploymentHandle,
    ) -> None:
        device = "cuda" if ray.get_gpu_ids() else "cpu"
        here = layout.clusters[index]
        ensemble, _ = load_ensemble(run_dir, here, routing=routing, resident=resident_experts, device=device)
        room: dict[str, Any] = {"max_sequences": max_sequences, "cache_tokens": cache_tokens}
        self.engines = {ENSEMBLE: Engine(ensemble, **room, remote=RemoteClient(layout).ask)}
        if dense and index == 0:
            model = torch.nn.Module.to(load_model(files.join(run_dir, DENSE_FOLDER)).eval(), device)
            self.engines[DENSE_MODEL] = Engine(ensemble_of_one(ensemble, {0: model}, model.config), **room)
        self.remote_server = RemoteServer(RemoteScorer(ensemble, cache_tokens))
        self.n_experts, self.n_tokens = ensemble.n_experts, 0
        self.reporter = Reporter(registry)
        self._streams: dict[tuple[str, int], asyncio.Queue[Step | BaseException]] = {}
        self._left: list[tuple[str, int]] = []
        self._between_steps, self._work = asyncio.Lock(), asyncio.Event()
        # One thread for good: PyTorch keeps a team of threads for each thread that calls it.
        self._thread = ThreadPoolExecutor(1)
        self._measured = _metrics()
        await self.refresh()
        self._tasks = [asyncio.create_task(loop) for loop in (self._decode(), self._report(), self.remote_server.run())]

    async def check_health(self) -> None:
        """Serve's health check: a loop that failed is not mended by waiting."""
        for task in self._tasks:
            if task.done():
                raise RuntimeError("a loop of the expert group has failed") from task.exception()

    async def describe(self) -> dict[str, int]:
        """State of the replica: pid, running and waiting (sequences); since it started, tokens (decoded) and reads (for
        other groups)."""
        engines = self.engines.values()
        return {
            "pid": os.getpid(),
            "running": sum(engine.running for engine in engines),
            "waiting": sum(engine.waiting for engine in engines),
            "tokens": self.n_tokens,
            "reads": self.remote_server.n_reads,
        }

    async def read(self, reads: list[ScoreRequest]) -> list[np.ndarray]:
        """Log-probabilities of this group's experts, for sequences that another group decodes."""
        return await self.remote_server.read(reads)

    async def generate(self, model: str, request: Request) -> AsyncIterator[list[Step]]:
        """Decode one sequence: its steps, together those that were made since the last message.

        Raises:
            UserError: it can never run.
        """
        await self.check_health()
        async with self._between_steps:
            sequence = model, self.engines[model].add(request)
            steps = self._streams[sequence] = asyncio.Queue()
        self._work.set()
        experts, ended = set[int](), False
        try:
            while not ended:
                batch = await _made(steps)
                ended = batch[-1].finish_reason is not None
                experts.update(step.expert for step in batch)
                yield batch
                if not ended:
                    await asyncio.sleep(MESSAGE_S * (len(self._streams) - 1))
        finally:
            del self._streams[sequence]
            if not ended:
                self._left.append(sequence)
                self._work.set()
            if model == ENSEMBLE:
                self.reporter.requests.update(experts)

    async def refresh(self) -> None:
        """Report to the registry, and let those experts take part that it names."""
        disabled = await self.reporter.report()
        if disabled is not None and disabled != self.reporter.disabled:
            async with self._between_steps:
                self.engines[ENSEMBLE].set_active(set(range(self.n_experts)) - disabled)
                self.reporter.disabled = disabled

    async def _decode(self) -> None:
        """Step the engines while there is work, and hand every token to its stream."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                await self._work.wait()
                async with self._between_steps:
                    for model, sequence in self._left:
                        self.engines[model].cancel(sequence)
                    self._left.clear()
                    for model, engine in self.engines.items():
                        if engine.running or engine.waiting:
                            self._hand_out(model, await loop.run_in_executor(self._thread, engine.step))
                if not any(engine.running or engine.waiting for engine in self.engines.values()) and not self._left:
                    self._work.clear()
        except BaseException as problem:
            for steps in self._streams.values():
                steps.put_nowait(problem)
            raise

    def _hand_out(self, model: str, made: list[tuple[int, Step]]) -> None:
        engine = self.engines[model]
        for sequence, problem in engine.failed:
            if (steps := self._streams.get((model, sequence))) is not None:
                steps.put_nowait(problem)
        engine.failed.clear()
        for sequence, step in made:
            if (steps := self._streams.get((model, sequence))) is not None:
                steps.put_nowait(step)
        experts = Counter(step.expert for _, step in made)
        self.n_tokens += len(made)
        if made:  # a step of a long prompt makes none, and counters refuse to add nothing
            self._measured["tokens"].inc(len(made), {"model": model})
        if model == ENSEMBLE:
            self.reporter.tokens.update(experts)
            for expert, count in experts.items():
                self._measured["expert_tokens"].inc(count, {"expert": str(expert)})
        self._measured["running"].set(engine.running, {"model": model})
        self._measured["waiting"].set(engine.waiting, {"model": model})

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(REPORT_EVERY_S)
            await self.refresh()


async def _made(steps: asyncio.Queue[Step | BaseException]) -> list[Step]:
    """The steps of one sequence since the last message, at least one. RuntimeError: decoding has failed."""
    found = list[Step]()
    while not found or not steps.empty():
        step = await steps.get()
        if isinstance(step, BaseException):
            raise RuntimeError("decoding has failed") from step
        found.append(step)
    return found


def _metrics() -> dict[str, Any]:
    """Metrics on the node's Prometheus port, beside Serve's own."""
    return {
        "tokens": metrics.Counter("cbtm_tokens", "Tokens generated, or scored for echo.", ("model",)),
        "expert_tokens": metrics.Counter("cbtm_expert_tokens", "Tokens by the expert behind them.", ("expert",)),
        "running": metrics.Gauge("cbtm_running_sequences", "Sequences being decoded.", ("model",)),
        "waiting": metrics.Gauge("cbtm_waiting_sequences", "Sequences waiting for room.", ("model",)),
    }
