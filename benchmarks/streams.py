"""Clients of a completions endpoint that keep a number of streams open, and what they see."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

ANSWER_S = 120.0
"""The longest that a client waits for anything."""
RETRY_S = 0.25
"""How long one that was refused waits before it asks again."""


@dataclass
class Answer:
    """One streamed answer."""

    asked_s: float
    """On the clock of time.perf_counter, as all of these."""
    arrived_s: list[float] = field(default_factory=list)
    """When pieces of text came."""
    n_tokens: int = 0
    status: int = 0
    ended_s: float = 0.0

    @property
    def ttft_s(self) -> float:
        return self.arrived_s[0] - self.asked_s

    @property
    def itl_s(self) -> float:
        """Mean seconds between two tokens; pieces may hold several."""
        return (self.arrived_s[-1] - self.arrived_s[0]) / (self.n_tokens - 1)

    def tokens_by(self, end_s: float) -> float:
        """Tokens that came up to a time, as if all pieces held as many."""
        return self.n_tokens * sum(at <= end_s for at in self.arrived_s) / max(len(self.arrived_s), 1)


@dataclass
class Load:
    """What all streams together saw."""

    tokens_per_s: float
    ttft_p50_s: float
    itl_p50_s: float
    answers: int


async def ask(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> Answer:
    """One request, streamed to its end; what is refused has a status and no tokens."""
    answer = Answer(time.perf_counter())
    async with client.stream("POST", url, json=body) as response:
        answer.status = response.status_code
        if response.status_code != 200:
            await response.aread()
            return answer
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise RuntimeError(f"a stream broke off: {event['error']}")
            if any(choice["text"] for choice in event["choices"]):
                answer.arrived_s.append(time.perf_counter())
            answer.n_tokens = (event.get("usage") or {}).get("completion_tokens", answer.n_tokens)
    answer.ended_s = time.perf_counter()
    return answer


async def ask_whole(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> Answer:
    """One request whose answer comes in one piece."""
    answer = Answer(time.perf_counter())
    response = await client.post(url, json=body)
    answer.status, answer.ended_s = response.status_code, time.perf_counter()
    if response.status_code == 200:
        answer.arrived_s.append(answer.ended_s)
        answer.n_tokens = response.json()["usage"]["completion_tokens"]
    return answer


async def keep_asking(
    url: str, bodies: Iterator[dict[str, Any]], n_streams: int, seconds: float, *, whole: bool = False
) -> tuple[list[Answer], float]:
    """So many streams at once, each asking again until the time is over; all answers, to their ends, and when it was over."""
    answers, end_s = list[Answer](), time.perf_counter() + seconds

    async def one_stream(client: httpx.AsyncClient) -> None:
        while time.perf_counter() < end_s:
            answer = await (ask_whole if whole else ask)(client, url, next(bodies))
            answers.append(answer)
            if answer.status != 200:
                await asyncio.sleep(RETRY_S)

    limits = httpx.Limits(max_connections=n_streams)
    async with httpx.AsyncClient(timeout=ANSWER_S, limits=limits) as client:
        await asyncio.gather(*(one_stream(client) for _ in range(n_streams)))
    return answers, end_s


def measure(
    url: str, body: dict[str, Any], prompts: list[str], n_streams: int, seconds: float, *, whole: bool = False
) -> Load:
    """Speed over the time, latencies of all answers begun in it; a whole answer's are those of its only piece.

    Raises:
        RuntimeError: something was refused.
    """
    bodies = ({**body, "prompt": prompt} for prompt in itertools.cycle(prompts))
    started = time.perf_counter()
    answers, end_s = asyncio.run(keep_asking(url, bodies, n_streams, seconds, whole=whole))
    if refused := {answer.status for answer in answers} - {200}:
        raise RuntimeError(f"{url} answered {sorted(refused)}")
    long = [answer for answer in answers if answer.n_tokens > 1 and answer.arrived_s]
    return Load(
        tokens_per_s=sum(answer.tokens_by(end_s) for answer in answers) / (end_s - started),
        ttft_p50_s=float(np.median([answer.ttft_s for answer in long])),
        itl_p50_s=float(np.median([answer.itl_s for answer in long])),
        answers=len(answers),
    )
