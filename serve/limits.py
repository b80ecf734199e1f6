"""Who may ask, how much at once, and how a refusal looks: checks that come before any model runs."""

from __future__ import annotations

import hmac
import os
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from ray.exceptions import RayTaskError
from ray.serve.context import _get_serve_request_context  # there is no public name

from cbtm_ray import files
from cbtm_ray.errors import UserError

RETRY_AFTER_S = 1
SERVER_ERROR = "server_error"

Model = TypeVar("Model", bound=BaseModel)


class Refused(Exception):
    """A request that is not answered: HTTP status, and what OpenAI's error object says."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's shape."""
        kind = SERVER_ERROR if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": str(RETRY_AFTER_S)}}
        return JSONResponse(self.body(), self.status, headers.get(self.status))


def refusal(problem: Exception) -> Refused:
    """What a client learns of an exception: the message of a UserError; of any other, such as a plain ValueError, only the id
    of the request, beside which the log of each replica has the traceback, and which Serve sends as X-Request-ID."""
    if isinstance(problem, Refused):
        return problem
    if isinstance(problem, UserError):
        message = str(problem.cause if isinstance(problem, RayTaskError) else problem)  # without a replica's traceback
        field, equals, _ = message.partition("=")
        return out_of_bounds(field if equals else None, message)
    request_id = _get_serve_request_context().request_id
    return Refused(500, f"The server failed to answer request {request_id}. Its log says why.", code="internal_error")


def read_tokens(source: str | None, field: str) -> list[bytes] | None:
    """The bearer tokens of `file:PATH_OR_URI`, one a line, or of `env:NAME`, separated by spaces; None of None.

    Raises:
        UserError: there is no such file or variable, or no token in it.
    """
    if source is None:
        return None
    kind, _, place = source.partition(":")
    if kind not in ("file", "env") or not place:
        raise UserError(f"{field}={source!r} must be file:PATH or env:NAME.")
    if kind == "file" and not files.exists(place):
        raise UserError(f"{field}={source!r}: there is no such file. Write one token a line into it.")
    tokens = (files.read_bytes(place) if kind == "file" else os.environ.get(place, "").encode()).split()
    if not tokens:
        raise UserError(f"{field}={source!r} holds no token. Put one there, such as: openssl rand -hex 32")
    return tokens


def bearer_of(request: Request) -> bytes:
    """What the client sent as its bearer token; empty if it sent none."""
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip().encode("utf-8", "surrogateescape") if kind.lower() == "bearer" else b""


def among(token: bytes, allowed: list[bytes]) -> bool:
    """Whether it is one of them, in a time that does not tell how much of it was right."""
    return sum(hmac.compare_digest(token, one) for one in allowed) > 0


async def read_body(request: Request, model: type[Model], max_bytes: int) -> Model:
    """The request's JSON body, validated; what is too large is refused as soon as that is known.

    A JSON content type is demanded, because a browser asks the server before it lets a strange page send one.

    Raises:
        Refused: 413 too large, 415 of another type, 400 no such object.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "Content-Type must be application/json.", code="invalid_content_type")
    too_large = Refused(413, f"The body must have at most {max_bytes} bytes.", code="request_too_large")
    body = bytearray()
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced[:20]) > max_bytes:
        raise too_large
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise too_large
    try:
        return model.model_validate_json(bytes(body))
    except ValidationError as problem:
        raise invalid(problem) from None


def invalid(problem: ValidationError) -> Refused:
    """The first thing wrong with a body, by the name of its field."""
    first = problem.errors(include_url=False, include_context=False, include_input=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return Refused(400, f"{field or 'body'}: {message}", param=field or None, code="invalid_value")


def out_of_bounds(param: str | None, message: str) -> Refused:
    return Refused(400, message, param=param, code="invalid_value")
