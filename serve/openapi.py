"""What the endpoint takes, as an OpenAPI document: the models that check a request are the schema that it shows."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from .protocol import ChatRequest, CompletionRequest, ExpertState

REFERENCE = "#/components/schemas/{model}"
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
CLUSTER = {"name": "cluster", "in": "path", "required": True, "schema": {"type": "integer", "minimum": 0}}


def describe(model_names: list[str], *, open_to_all: bool) -> dict[str, Any]:
    """The document. Limits that a server was started with are not in it.

    Args:
        open_to_all: whether calls need no token, but for those of an administrator.
    """
    models: Any = [(model, "validation") for model in (CompletionRequest, ChatRequest, ExpertState)]
    _, schema = models_json_schema(models, ref_template=REFERENCE)
    for request in (CompletionRequest, ChatRequest):
        schema["$defs"][request.__name__]["properties"]["model"]["enum"] = model_names
    bearer: list[dict[str, list[str]]] = [{"bearer": []}]
    stream = {"text/event-stream": {"schema": {"type": "string"}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "cbtm-ray", "version": "1"},
        "security": [] if open_to_all else bearer,
        "paths": {
            "/healthz": {"get": _call("Whether it answers", security=[])},
            "/v1/models": {"get": _call("The ensemble, and the dense control if it is served")},
            "/v1/experts": {"get": _call("Every expert: cluster, traffic, state")},
            "/v1/experts/{cluster}": {
                "put": _call(
                    "Take an expert out or back in", body=ExpertState.__name__, parameters=[CLUSTER], security=bearer
                )
            },
            "/v1/completions": {"post": _call("Continue prompts", body=CompletionRequest.__name__, content=stream)},
            "/v1/chat/completions": {"post": _call("Answer a chat", body=ChatRequest.__name__, content=stream)},
        },
        "components": {
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
            "schemas": {**schema["$defs"], "Error": ERROR},
        },
    }


def _call(
    summary: str, *, body: str | None = None, content: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    error = {"description": "Refused", "content": _json({"$ref": REFERENCE.format(model="Error")})}
    answer = {"description": "Answered", "content": {**_json({"type": "object"}), **(content or {})}}
    call = {"summary": summary, "responses": {"200": answer, "4XX": error, "503": error}, **more}
    if body is not None:
        call["requestBody"] = {"required": True, "content": _json({"$ref": REFERENCE.format(model=body)})}
    return call


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
