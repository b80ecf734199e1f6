"""The gateway's part of engine=vllm: it routes a text to one expert's engine, and to another's where the router says so."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from ray.serve.handle import DeploymentHandle
from ray.util import metrics

from cbtm_ray.decode.one_expert import ExpertRequest, RoutedText
from cbtm_ray.decode.sequence import Request, Step
from cbtm_ray.merge.ensemble import Ensemble

from .limits import Refused
from .placement import DENSE_MODEL, ENSEMBLE
from .registry import REPORT_EVERY_S, Reporter
from .remote_experts import MAX_ATTEMPTS, REPLICA_LOST

logger = logging.getLogger("ray.serve")

WHOLE_ANSWER_TOKENS = 16
"""Of a message, where the client waits for all of them. What comes after a change of expert is decoded in vain."""


class ExpertEngines:
    """Engines by model, which know no router, and the experts that may take part now."""

    def __init__(
        self,
        handles: dict[str, list[DeploymentHandle]],
        ensemble: Ensemble,
        dense: Ensemble,
        registry: DeploymentHandle,
    ) -> None:
        """
        Args:
            handles: the engines of each model's experts; the dense control has one.
            ensemble: routes; its experts are not loaded.
            dense: routes to the dense control, an ensemble of one.
        """
        # By gRPC: a streamed token costs a sixth of what it does through the object store.
        self._streams = {
            model: [handle.options(stream=True, _by_reference=False) for handle in found]
            for model, found in handles.items()
        }
        self._ensembles = {ENSEMBLE: ensemble, DENSE_MODEL: dense}
        self._reporter, self._measured = Reporter(registry), _metrics()
        self._counted = Counter[tuple[str, int]]()  # tokens by model and expert since the last report

    def _active(self, model: str) -> set[int]:
        n_experts = self._ensembles[model].n_experts
        return set(range(n_experts)) - (self._reporter.disabled or set() if model == ENSEMBLE else set())

    async def report_for_ever(self) -> None:
        """As `refresh`, every second."""
        while True:
            await asyncio.sleep(REPORT_EVERY_S)
            await self.refresh()

    async def refresh(self) -> None:
        """Tell the registry what was served, and learn from it which experts are out of service."""
        for (model, expert), count in self._counted.items():
            self._measured["tokens"].inc(count, {"model": model})
            if model == ENSEMBLE:
                self._measured["expert_tokens"].inc(count, {"expert": str(expert)})
                self._reporter.tokens[expert] += count
        self._counted.clear()
        self._reporter.disabled = await self._reporter.report()

    async def decode(self, model: str, request: Request, *, streamed: bool) -> AsyncGenerator[list[Step]]:
        """The steps of one text. When an engine's replica dies, another goes on after the tokens it had given.

        Raises:
            Refused: replicas died under it again and again.
        """
        message_tokens = 1 if streamed else WHOLE_ANSWER_TOKENS
        text = RoutedText(self._ensembles[model], request, self._active(model), message_tokens=message_tokens)
        lost = 0
        asked, takes_over, experts = text.next_request(), False, set[int]()
        while lost < MAX_ATTEMPTS:
            experts.add(asked.expert)
            try:
                async with aclosing(self._answer(model, text, asked, takes_over)) as answer:
                    async for steps in answer:
                        yield steps
                        if steps[-1].finish_reason:
                            self._reporter.requests.update(experts if model == ENSEMBLE else ())
                            return
                asked, takes_over = text.next_request(), True
            except REPLICA_LOST as death:
                lost += 1
                logger.warning("An engine died under a request, %d of %d: %s", lost, MAX_ATTEMPTS, death)
                asked, takes_over = text.repeated_request(), False
        raise Refused(503, "The model is not available.", code="unavailable")

    async def _answer(
        self, model: str, text: RoutedText, asked: ExpertRequest, takes_over: bool
    ) -> AsyncGenerator[list[Step]]:
        """The steps that one engine gives, until they end or another expert is to go on."""
        active = self._active(model)
        response: Any = self._streams[model][asked.expert].generate.remote(asked)
        try:
            async for tokens in response:
                if takes_over and (unread := len(asked.token_ids) - tokens.cached_tokens):
                    self._measured["reread"].inc(unread)
                takes_over = False
                steps, goes_on = text.take(tokens)
                if steps:
                    self._counted.update((model, step.expert) for step in steps)
                    yield steps
                if self._active(model) != active:
                    text.reroute(self._active(model))
                    return
                if not goes_on:
                    return
        finally:
            # Serve misses some clients that leave; without this the engine would decode on for nobody.
            response.cancel()


def _metrics() -> dict[str, Any]:
    return {
        "tokens": metrics.Counter("cbtm_tokens", "Tokens generated, or scored for echo.", ("model",)),
        "expert_tokens": metrics.Counter("cbtm_expert_tokens", "Tokens by the expert behind them.", ("expert",)),
        "reread": metrics.Counter("cbtm_reread_tokens", "Tokens that an expert read when it took over from another."),
    }
