"""Who may ask, how much at once, and how a refusal looks: checks that come before any model runs."""

from __future__ import annotations

import hmac
import os
import reprlib
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from ray import serve
from ray.exceptions import RayTaskError
from ray.serve.context import _get_serve_request_context  # there is no public name
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cbtm_ray import files
from cbtm_ray.errors import UserError

from .protocol import UNKNOWN_FIELD, Error, Problem

RETRY_AFTER_S = 1
SERVER_ERROR = "server_error"


class Refused(HTTPException):
    """A refused request: HTTP status, and the fields of OpenAI's error object.

    An HTTPException, since FastAPI makes a 400 of any other exception that is raised while it reads a body.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(status, message)
        self.status, self.param, self.code = status, param, code

    def __str__(self) -> str:
        return self.detail

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's shape."""
        kind = SERVER_ERROR if self.status >= 500 else "invalid_request_error"
        return Error(error=Problem(message=str(self), type=kind, param=self.param, code=self.code)).model_dump()

    def response(self) -> JSONResponse:
        headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": str(RETRY_AFTER_S)}}
        return JSONResponse(self.body(), self.status, headers.get(self.status))


def refusal(problem: Exception) -> Refused:
    """What a client learns of an exception: the message of a UserError; of any other, such as a plain ValueError, only the id
    of the request, beside which the log of each replica has the traceback, and which Serve sends as X-Request-ID."""
    if isinstance(problem, Refused):
        return problem
    if isinstance(problem, HTTPException):
        return Refused(problem.status_code, problem.detail, code="invalid_request")
    if isinstance(problem, RequestValidationError):
        return invalid(problem)
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


class BodyLimits:
    """Middleware that refuses a body by its content type, or as soon as it is known to be too large.

    Starlette's `max_body_size` is fixed before the arguments are known, and answers in plain text. A JSON content type is
    demanded, because a browser asks the server before it lets a strange page send one.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT"):
            await self.app(scope, receive, send)
            return
        gateway: Any = serve.get_replica_context().servable_object
        max_bytes, headers, n_bytes = gateway.arguments.max_body_bytes, Request(scope).headers, 0
        too_large = Refused(413, f"The body must have at most {max_bytes} bytes.", code="request_too_large")
        announced = headers.get("content-length", "0")
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            refused = Refused(415, "Content-Type must be application/json.", code="invalid_content_type")
            await refused.response()(scope, receive, send)
            return
        if announced.isdecimal() and int(announced[:20]) > max_bytes:
            await too_large.response()(scope, receive, send)
            return

        async def limited() -> Message:
            nonlocal n_bytes
            message = await receive()
            n_bytes += len(message.get("body", b""))
            if n_bytes > max_bytes:
                raise too_large
            return message

        await self.app(scope, limited, send)


def invalid(problem: ValidationError | RequestValidationError) -> Refused:
    """The first thing wrong with a body, by the name of its field; 404 where it is the path that is wrong."""
    first = problem.errors()[0]
    where, *path = first["loc"] if isinstance(problem, RequestValidationError) else ("body", *first["loc"])
    if first["type"] == "json_invalid":
        return Refused(400, f"body: no JSON: {first['ctx']['error']}", code="invalid_value")
    unknown = [first["ctx"]["name"]] if first["type"] == UNKNOWN_FIELD else []
    field = ".".join(str(part) for part in [*path, *unknown])
    value = "" if unknown or first["type"] == "missing" else f"={reprlib.repr(first['input'])}"
    message = f"{field or where}{value}: {first['msg'].removeprefix('Value error, ')}"
    return Refused(404 if where == "path" else 400, message, param=field or None, code="invalid_value")


def out_of_bounds(param: str | None, message: str) -> Refused:
    return Refused(400, message, param=param, code="invalid_value")
