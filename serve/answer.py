"""From token ids to an answer: sequences decoded in the expert group, their tokens put together to text, choice by choice."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from cbtm_ray.decode.sampling import Sampling
from cbtm_ray.decode.sequence import Request, Step, remaining
from cbtm_ray.decode.strategies import strategy_for
from cbtm_ray.decode.text import TextAssembler

from .limits import Refused, refusal
from .placement import Placement
from .protocol import ChatRequest, CompletionRequest, Piece, TokenPiece, choice_of, lists_tokens
from .remote_experts import MAX_ATTEMPTS, REPLICA_LOST

logger = logging.getLogger("ray.serve")


async def decode(placement: Placement, model: str, request: Request) -> AsyncGenerator[list[Step]]:
    """The steps of one sequence. When the replica that decodes it dies, another goes on after the tokens it had given.

    Raises:
        UserError: it can never run.
        Refused: replicas died under it again and again.
    """
    rest, lost = request, 0
    while lost < MAX_ATTEMPTS:
        response = None
        try:
            group = await placement.plan(model, rest)
            response = group.generate.remote(model, rest)
            async for batch in response:
                rest = remaining(rest, batch)
                yield batch
                if batch[-1].finish_reason:
                    return
        except REPLICA_LOST as death:
            lost += 1
            logger.warning("A replica died under a request, %d of %d: %s", lost, MAX_ATTEMPTS, death)
        finally:
            # Serve misses some clients that leave; without this the group would decode on for nobody.
            if response is not None:
                response.cancel()
    raise Refused(503, "The model is not available.", code="unavailable")


async def choice_pieces(
    index: int,
    wanted: Request,
    request: CompletionRequest | ChatRequest,
    tokenizer: PreTrainedTokenizerBase,
    decoded: AsyncGenerator[list[Step]],
    usage: dict[str, int],
) -> AsyncGenerator[Piece]:
    """One choice of an answer, as it becomes certain, of the steps of `wanted`; its tokens are added to `usage`."""
    choice = Choice(index, tokenizer, request.stop, lists_tokens=lists_tokens(request))
    if isinstance(request, CompletionRequest) and request.echo and not wanted.echo_logprobs:
        yield choice.echo(wanted.prompt)
    if wanted.max_tokens == 0 and not wanted.echo_logprobs:
        yield Piece(index, finish_reason="length")
        return
    async with aclosing(decoded) as steps:
        async for batch in steps:
            piece, n_tokens = choice.take(batch)
            usage["completion_tokens"] += n_tokens
            yield piece
            if piece.finish_reason:
                return


def sequence_request(
    request: CompletionRequest | ChatRequest, prompt: list[int], *, max_tokens: int, top_k: int, seed: int | None
) -> Request:
    """The engine's request for one choice.

    Raises:
        UserError: the strategy does not go with the rest.
    """
    if isinstance(request, ChatRequest):
        top_logprobs = request.top_logprobs if request.logprobs else None
    else:
        top_logprobs = request.logprobs
    echo = isinstance(request, CompletionRequest) and request.echo and bool(prompt)
    wanted = Request(
        prompt=prompt,
        max_tokens=max_tokens,
        top_k=top_k,
        sampling=Sampling(
            temperature=request.temperature,
            top_p=request.top_p,
            frequency_penalty=request.frequency_penalty,
            presence_penalty=request.presence_penalty,
            seed=seed,
        ),
        strategy=request.cbtm.strategy,
        top_logprobs=top_logprobs,
        echo_logprobs=echo and (top_logprobs is not None or request.cbtm.return_routing),
    )
    strategy = strategy_for(wanted)
    if request.cbtm.strategy == "auto" and strategy != "ancestral":
        strategy = (
            "lockstep"  # its text can go on in another replica; speculative sampling is for one sequence at a time
        )
    return replace(wanted, strategy=strategy)


class Choice:
    """One choice of an answer: the text that is certain so far, and the tokens whose text is not yet."""

    def __init__(
        self, index: int, tokenizer: PreTrainedTokenizerBase, stop: list[str], *, lists_tokens: bool = True
    ) -> None:
        """
        Args:
            lists_tokens: whether pieces have their tokens beside their text, which costs more than the text.
        """
        self.index, self._by_token = index, lists_tokens or bool(stop)
        self._tokenizer = tokenizer
        self._prompt, self._answer = TextAssembler(tokenizer), TextAssembler(tokenizer, stop)
        self._prompt_open, self._length = True, 0
        self._unsure: list[TokenPiece] = []

    def echo(self, prompt: list[int]) -> Piece:
        """The prompt, where nobody asks what the model thinks of it."""
        text = self._read(prompt)
        self._length += len(text)
        return Piece(self.index, text)

    def take(self, steps: list[Step]) -> tuple[Piece, int]:
        """The text that has become certain, with the tokens that begin in it and why it ended; how many tokens were new."""
        if not self._by_token:
            return self._take_text(steps), len(steps)
        new, reason, n_tokens = "", None, 0
        for step in steps:
            n_tokens += not step.in_prompt
            text = self._prompt if step.in_prompt else self._answer
            if self._prompt_open and not step.in_prompt:
                new, self._prompt_open = new + self._prompt.finish(), False
            self._unsure.append(self._token(step, self._length + len(new) + text.held))
            if step.finish_reason != "stop":  # the end-of-text token is a token, but no text
                new += text.push(step.token)
            reason = "stop" if text.stopped else step.finish_reason
            if reason:
                new += text.finish()
                break
        self._length += len(new)
        at_end = reason is not None and not self._answer.stopped
        sure = [token for token in self._unsure if at_end or token.offset < self._length]
        self._unsure = self._unsure[len(sure) :]
        return Piece(self.index, new, sure, reason), n_tokens

    def _take_text(self, steps: list[Step]) -> Piece:
        """As `take`, all tokens at once."""
        reason = steps[-1].finish_reason
        new = self._answer.push(*(step.token for step in steps if step.finish_reason != "stop"))
        return Piece(self.index, new + (self._answer.finish() if reason else ""), finish_reason=reason)

    def _token(self, step: Step, offset: int) -> TokenPiece:
        return TokenPiece(
            text=self._read([step.token]),
            offset=offset,
            logprob=step.logprob,
            top=[(self._read([token]), logprob) for token, logprob in step.top_logprobs or []],
            expert=step.expert,
            weights={int(k): float(step.weights_K[k]) for k in np.flatnonzero(step.weights_K)},
        )

    def _read(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens))


async def merged(streams: list[AsyncGenerator[Piece]]) -> AsyncGenerator[Piece]:
    """The pieces of all choices as they come."""
    arrived: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue()

    async def pass_on(stream: AsyncGenerator[Piece]) -> None:
        async with aclosing(stream):
            async for piece in stream:
                arrived.put_nowait(piece)

    def ended(task: asyncio.Task[None]) -> None:
        arrived.put_nowait(None if task.cancelled() else task.exception())

    tasks = [asyncio.create_task(pass_on(stream)) for stream in streams]
    for task in tasks:
        task.add_done_callback(ended)
    open_streams = len(tasks)
    try:
        while open_streams:
            piece = await arrived.get()
            if isinstance(piece, BaseException):
                raise piece
            if piece is None:
                open_streams -= 1
            else:
                yield piece
    finally:
        for task in tasks:
            task.cancel()


async def events(
    request: CompletionRequest | ChatRequest,
    first: Piece,
    rest: AsyncGenerator[Piece],
    head: dict[str, Any],
    usage: dict[str, int],
) -> AsyncGenerator[str]:
    """Server-sent events: a chunk for each piece, the usage if asked for, and [DONE]; or what went wrong, and the end."""

    def event(choices: list[dict[str, Any]], counted: dict[str, int] | None = None) -> str:
        chunk = {**head, "choices": choices, **({"usage": counted} if request.include_usage else {})}
        return f"data: {json.dumps(chunk)}\n\n"

    async with aclosing(rest):
        try:
            yield event([choice_of(first, request, whole=False)])
            async for piece in rest:
                yield event([choice_of(piece, request, whole=False)])
            if request.include_usage:
                yield event([], total(usage))
            yield "data: [DONE]\n\n"
        except Exception as problem:
            if (refused := refusal(problem)).status == 500:
                logger.exception("A stream broke off.")
            yield f"data: {json.dumps(refused.body())}\n\n"


def total(usage: dict[str, int]) -> dict[str, int]:
    """OpenAI's `usage`."""
    return {**usage, "total_tokens": sum(usage.values())}
