"""`serve run serve.app:build run_dir=runs/quickstart`: one replica that holds all experts of a finished run."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application

from cbtm_ray.ensemble import load_ensemble
from cbtm_ray.generate import generate
from cbtm_ray.sampling import Sampling
from cbtm_ray.sequence import Step

from .protocol import CompletionRequest, completion, error, events

MODEL = "cbtm"
web = FastAPI(title="cbtm-ray")


class AppArguments(BaseModel):
    """What `serve run serve.app:build name=value` takes."""

    model_config = ConfigDict(extra="forbid")

    run_dir: str
    """A finished run directory, path or URI."""
    top_k: int = Field(default=2, ge=1)
    """Experts mixed for a token, where the request does not say."""
    max_ongoing_requests: int = Field(default=8, ge=1)
    """Requests in the replica at once; they share its cores."""
    max_queued_requests: int = Field(default=32, ge=0)
    """Requests that wait; more are answered with 503."""


@web.exception_handler(RequestValidationError)
async def refuse(_: Request, problem: RequestValidationError) -> JSONResponse:
    first = problem.errors()[0]
    field = ".".join(part for part in first["loc"] if isinstance(part, str) and part != "body") or None
    return JSONResponse(error(f"{field or 'body'}: {first['msg']}", field, "invalid_value"), 400)


@serve.deployment
@serve.ingress(web)
class Gateway:
    """Validates, routes, decodes and streams."""

    def __init__(self, arguments: AppArguments) -> None:
        self.ensemble, self.tokenizer = load_ensemble(arguments.run_dir)
        self.top_k = min(arguments.top_k, len(self.ensemble.experts))

    @web.get("/healthz")
    async def healthz(self) -> dict[str, str]:
        return {"status": "ok"}

    @web.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "cbtm-ray"}]}

    @web.post("/v1/completions", response_model=None)
    async def completions(self, request: CompletionRequest) -> JSONResponse | StreamingResponse:
        """A continuation of the prompt; with `stream` as server-sent events."""
        if request.model != MODEL:
            message = f"model={request.model!r} does not exist here. Use {MODEL!r}."
            return JSONResponse(error(message, "model", "model_not_found"), 404)
        try:
            prompt = self._tokens(request.prompt)
            steps = generate(
                self.ensemble,
                prompt,
                top_k=request.top_k or self.top_k,
                max_tokens=request.max_tokens,
                sampling=Sampling(temperature=request.temperature, top_p=request.top_p, seed=request.seed),
            )
            first = await asyncio.to_thread(next, steps)
        except ValueError as problem:
            return JSONResponse(error(str(problem), str(problem).partition("=")[0], "invalid_value"), 400)
        pieces = self._pieces(first, steps)
        if request.stream:
            return StreamingResponse(events(request, pieces), media_type="text/event-stream")
        found = [piece async for piece in pieces]
        usage = {
            "prompt_tokens": len(prompt),
            "completion_tokens": len(found),
            "total_tokens": len(prompt) + len(found),
        }
        return JSONResponse(completion(request, "".join(text for text, _ in found), found[-1][1], usage))

    def _tokens(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        for token in prompt:
            if not 0 <= token < len(self.tokenizer):
                raise ValueError(f"prompt={token} must be token ids from 0 to {len(self.tokenizer) - 1}.")
        return prompt

    async def _pieces(self, first: Step, steps: Iterator[Step]) -> AsyncIterator[tuple[str, str]]:
        """Text as its characters are complete, token by token, with the reason to stop if it was the last one."""
        tokens: list[int] = []
        shown = ""
        step: Step | None = first
        while step is not None:
            ended = step.token == self.ensemble.end_of_text
            if not ended:
                tokens.append(step.token)
            text = str(self.tokenizer.decode(tokens))
            upcoming = await asyncio.to_thread(next, steps, None)
            # A character may be spread over tokens; until it is complete the decoder ends in a replacement mark.
            if upcoming is None or not text.endswith("\ufffd"):
                yield text[len(shown) :], "stop" if ended else "length"
                shown = text
            else:
                yield "", "length"
            step = upcoming


def build(arguments: AppArguments) -> Application:
    """The application for `serve run` and `serve deploy`."""
    gateway: Any = Gateway
    return gateway.options(
        max_ongoing_requests=arguments.max_ongoing_requests, max_queued_requests=arguments.max_queued_requests
    ).bind(arguments)
