"""One model in stock vLLM: a replica is one engine, in the replica's own process, that decodes many texts at once.

Ray Serve's own LLM deployments speak OpenAI's format, which the gateway speaks already; between the two go token ids.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from typing import Any

import ray
from ray import serve

from cbtm_ray.decode.one_expert import ExpertRequest, ExpertTokens

from .replica import MESSAGE_S
from .vllm_calls import engine_arguments, fetch_adapters, make_engine, step


@serve.deployment(health_check_period_s=2)
class VLLMEngine:
    """An engine, which one thread steps, and the queue of each text that it decodes."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        model_uri: str,
        end_of_text: int,
        *,
        max_sequences: int,
        cache_tokens: int,
        vllm: dict[str, Any],
        adapters: dict[int, str] | None = None,
    ) -> None:
        """
        Args:
            adapters: folders or URIs, by expert; None: the model itself is the expert.
        """
        self._end_of_text, self._texts = end_of_text, dict[str, _Text]()
        self._added, self._left = list[tuple[str, ExpertRequest]](), list[str]()
        self._work, self.n_tokens = asyncio.Event(), 0
        self._adapters = dict[int, Any]()  # vLLM's LoRARequest, by expert
        self._thread = ThreadPoolExecutor(1)  # for good: PyTorch keeps a team of threads for each thread that calls it
        arguments = engine_arguments(model_uri, max_sequences, cache_tokens, vllm, gpu=bool(ray.get_gpu_ids()))
        if adapters:
            self._adapters, wanted = await self._in_thread(fetch_adapters, adapters)
            arguments = wanted | arguments
        self._engine = await self._in_thread(make_engine, model_uri, arguments)
        self._stepping = asyncio.create_task(self._step_for_ever())

    async def check_health(self) -> None:
        """Serve's health check: an engine that failed is not mended by waiting."""
        if self._stepping.done():
            raise RuntimeError("the engine has failed") from self._stepping.exception()

    async def describe(self) -> dict[str, int]:
        """State of the replica: pid, running (texts), tokens decoded since it started."""
        return {"pid": os.getpid(), "running": len(self._texts), "tokens": self.n_tokens}

    async def generate(self, request: ExpertRequest) -> AsyncIterator[ExpertTokens]:
        """Decode a text: its next tokens, together those that were made since the last message."""
        await self.check_health()
        name, text = uuid.uuid4().hex, _Text(request)
        self._texts[name] = text
        self._added.append((name, request))
        self._work.set()
        ended, pause_s = False, 0.0
        try:
            while not ended:
                tokens = await text.next_message(pause_s)
                ended = tokens.finish_reason is not None
                yield tokens
                pause_s = MESSAGE_S * (len(self._texts) - 1) if request.message_tokens == 1 else 0.0
        finally:
            del self._texts[name]
            if not ended:
                self._left.append(name)
                self._work.set()

    async def _in_thread(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    async def _step_for_ever(self) -> None:
        """Step the engine while there is work, and hand every token to its text."""
        try:
            while True:
                await self._work.wait()
                added, self._added = self._added, []
                left, self._left = self._left, []
                made = await self._in_thread(step, self._engine, added, left, self._end_of_text, self._adapters)
                for name, tokens in made:
                    self.n_tokens += len(tokens.token_ids) if isinstance(tokens, ExpertTokens) else 0
                    if (text := self._texts.get(name)) is not None:
                        text.add(tokens)
                if not (self._added or self._left or self._engine.has_unfinished_requests()):
                    self._work.clear()
        except BaseException as problem:
            for text in self._texts.values():
                text.add(RuntimeError(f"the engine has failed: {problem}"))
            raise


class _Text:
    """A text that the engine decodes, and its tokens since the last message."""

    def __init__(self, request: ExpertRequest) -> None:
        self.request = request
        self._made = list[ExpertTokens]()
        self._problem: Exception | None = None
        self._enough, self._ended = asyncio.Event(), asyncio.Event()

    def add(self, tokens: ExpertTokens | Exception) -> None:
        if isinstance(tokens, Exception):
            self._problem = tokens
        else:
            self._made.append(tokens)
        if isinstance(tokens, Exception) or tokens.finish_reason:
            self._ended.set()
        # Each part has a token, or more.
        if self._ended.is_set() or len(self._made) >= self.request.message_tokens:
            self._enough.set()

    async def next_message(self, after_s: float) -> ExpertTokens:
        """The tokens since the last message: as many as the request wants, not before a time is over; or all to the end."""
        if after_s:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), after_s)
        await self._enough.wait()
        if self._problem is not None:
            raise RuntimeError("decoding has failed") from self._problem
        made, self._made = self._made, []
        self._enough.clear()
        return reduce(ExpertTokens.followed_by, made)
