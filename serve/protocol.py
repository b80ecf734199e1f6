"""The wire format of /v1/completions, in OpenAI's names and order; unknown fields are errors."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class CompletionRequest(BaseModel):
    """What this server understands of OpenAI's completion request; top_k is how many experts are mixed."""

    model_config = ConfigDict(extra="forbid")

    model: str
    prompt: str | list[int]
    max_tokens: int = Field(default=16, ge=1)
    seed: int = Field(default=0, ge=0)
    stream: bool = False
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=1)


def completion(request: CompletionRequest, text: str, finish_reason: str, usage: dict[str, int]) -> dict[str, Any]:
    """A completion object."""
    body = chunk(request, f"cmpl-{uuid.uuid4().hex}", text, finish_reason)
    return {**body, "usage": usage}


def chunk(request: CompletionRequest, completion_id: str, text: str, finish_reason: str | None) -> dict[str, Any]:
    """A piece of a streamed completion; all pieces of one have its id."""
    return {
        "id": completion_id,
        "object": "text_completion",
        "created": int(time.time()),
        "model": request.model,
        "choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}],
    }


def error(message: str, param: str | None, code: str, kind: str = "invalid_request_error") -> dict[str, Any]:
    """An error in OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


async def events(request: CompletionRequest, pieces: AsyncIterator[tuple[str, str]]) -> AsyncIterator[str]:
    """Server-sent events: a chunk for each (text, finish reason so far), one that says why it ended, and [DONE]."""
    completion_id, reason = f"cmpl-{uuid.uuid4().hex}", "length"
    async for text, reason_so_far in pieces:
        reason = reason_so_far
        yield f"data: {json.dumps(chunk(request, completion_id, text, None))}\n\n"
    yield f"data: {json.dumps(chunk(request, completion_id, '', reason))}\n\n"
    yield "data: [DONE]\n\n"
