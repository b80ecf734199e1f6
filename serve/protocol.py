"""The wire format: OpenAI's completions and chat completions, in its names and order; unknown fields are errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from cbtm_ray.errors import unknown_key

MAX_STOPS, MAX_STOP_LENGTH = 4, 200
MAX_TOP_LOGPROBS = 20
UNKNOWN_FIELD = "unknown_field"


class Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, body: Any) -> Any:
        unknown = [name for name in body if name not in cls.model_fields] if isinstance(body, dict) else []
        if unknown:
            name = unknown[0][:80].encode(errors="replace").decode()  # JSON can write half of a surrogate pair
            advice = unknown_key(name, cls.model_fields, "", "a field")
            raise PydanticCustomError(UNKNOWN_FIELD, "{advice}", {"name": name, "advice": advice})
        return body


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must have no half of a surrogate pair") from None
    return text


Text = Annotated[str, AfterValidator(_whole)]
"""FastAPI parses with Python's json module, which lets halves of surrogate pairs pass."""


class RoutingOptions(Wire):
    """Ours: how the experts are mixed for this request."""

    top_k: int | None = Field(default=None, ge=1)
    """Experts mixed for a token; None: what the server was started with."""
    strategy: Literal["auto", "lockstep", "ancestral", "speculative"] = "auto"
    """How tokens are drawn; auto: ancestral at temperature 1 without more, else lockstep (cbtm_ray/decode/strategies.py)."""
    return_routing: bool = False
    """Whether the answer says, for every token, which experts it came from and with what weights."""


class StreamOptions(Wire):
    include_usage: bool = False


def _prompts(value: Any) -> Any:
    """A list of prompts, each text or token ids, from the four forms that OpenAI knows."""
    if isinstance(value, str):
        return [_whole(value)]
    if isinstance(value, list) and value:
        if all(isinstance(part, str) for part in value):
            return [_whole(part) for part in value]
        if all(_token_ids(part) for part in value):
            return value
        if _token_ids(value):
            return [value]
    raise ValueError("must be a string, a list of strings, token ids or a list of token ids, not empty")


def _token_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(part) is int and part >= 0 for part in value)


_TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        _TOKENS,
        {"type": "array", "items": _TOKENS, "minItems": 1},
    ]
}
_STOP = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}
STOP_SCHEMA = {"anyOf": [_STOP, {"type": "array", "items": _STOP, "maxItems": MAX_STOPS}, {"type": "null"}]}


def _stops(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise ValueError(f"must be a string or a list of at most {MAX_STOPS}")
    if not all(isinstance(stop, str) and 0 < len(stop) <= MAX_STOP_LENGTH for stop in stops):
        raise ValueError(f"must be of strings of 1 to {MAX_STOP_LENGTH} characters")
    return stops


class DecodingOptions(Wire):
    """What completions and chat completions share."""

    model: Text
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    n: int = Field(default=1, ge=1)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    """Choice i of a prompt is drawn with seed + i; None: no two choices are drawn alike."""
    stop: Annotated[list[Text], BeforeValidator(_stops), WithJsonSchema(STOP_SCHEMA)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    cbtm: RoutingOptions = RoutingOptions()

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(DecodingOptions):
    """The body of POST /v1/completions."""

    KIND: ClassVar = ("text_completion", "text_completion", "cmpl")
    """The answer's `object`, whole and in part, and what its id begins with."""

    prompt: Annotated[list[str] | list[list[int]], BeforeValidator(_prompts), WithJsonSchema(PROMPT_SCHEMA)]
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    max_tokens: int = Field(default=16, ge=0)
    """0 generates nothing: with `echo` and `logprobs` it scores the prompt."""


class Message(Wire):
    role: Literal["system", "user", "assistant"]
    content: Text


class ChatRequest(DecodingOptions):
    """The body of POST /v1/chat/completions."""

    KIND: ClassVar = ("chat.completion", "chat.completion.chunk", "chatcmpl")

    messages: list[Message] = Field(min_length=1)
    logprobs: bool = False
    max_completion_tokens: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    """The older name of the field before it."""
    top_logprobs: int = Field(default=0, ge=0, le=MAX_TOP_LOGPROBS)


class ExpertState(Wire):
    """The body of PUT /v1/experts/{cluster}."""

    active: bool


class Problem(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """What a refused request is answered with."""

    error: Problem


@dataclass
class TokenPiece:
    """One token of an answer."""

    text: str
    """What it reads alone."""
    offset: int
    """Characters of the choice's text before it."""
    logprob: float | None
    """Under the mixture, nats, before temperature and penalties; None where it was not asked for."""
    top: list[tuple[str, float]]
    """The most probable tokens instead of it, most probable first."""
    expert: int
    weights: dict[int, float]
    """By cluster; those of weight 0 are left out."""


@dataclass
class Piece:
    """Part of one choice of an answer, or all of it: pieces of a choice add up."""

    index: int
    text: str = ""
    tokens: list[TokenPiece] = field(default_factory=list)
    finish_reason: str | None = None

    def __add__(self, later: Piece) -> Piece:
        reason = later.finish_reason or self.finish_reason
        return Piece(self.index, self.text + later.text, self.tokens + later.tokens, reason)


def choice_of(piece: Piece, request: CompletionRequest | ChatRequest, *, whole: bool) -> dict[str, Any]:
    """A choice of an answer, whole or a part that is streamed."""
    if isinstance(request, ChatRequest):
        return _chat_choice(piece, request, "message" if whole else "delta")
    return {
        "index": piece.index,
        "text": piece.text,
        "logprobs": None if request.logprobs is None else _completion_logprobs(piece.tokens),
        "finish_reason": piece.finish_reason,
        **_routing(piece, request),
    }


def _chat_choice(piece: Piece, request: ChatRequest, key: str) -> dict[str, Any]:
    return {
        "index": piece.index,
        key: {"role": "assistant", "content": piece.text},
        "logprobs": {"content": [_chat_logprob(token) for token in piece.tokens]} if request.logprobs else None,
        "finish_reason": piece.finish_reason,
        **_routing(piece, request),
    }


def _completion_logprobs(tokens: Sequence[TokenPiece]) -> dict[str, Any]:
    return {
        "text_offset": [token.offset for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "tokens": [token.text for token in tokens],
        "top_logprobs": [_by_text([*token.top, (token.text, token.logprob or 0.0)]) for token in tokens],
    }


def _by_text(alternatives: Sequence[tuple[str, float]]) -> dict[str, float]:
    """The form has one number for a text: of tokens that read alike, such as halves of a character, the likeliest."""
    best: dict[str, float] = {}
    for text, logprob in alternatives:
        best[text] = max(logprob, best.get(text, logprob))
    return best


def _chat_logprob(token: TokenPiece) -> dict[str, Any]:
    return {
        **_chat_token(token.text, token.logprob),
        "top_logprobs": [_chat_token(text, logprob) for text, logprob in token.top],
    }


def _chat_token(text: str, logprob: float | None) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def lists_tokens(request: CompletionRequest | ChatRequest) -> bool:
    """Whether the answer has more of its tokens than their text."""
    logprobs = request.logprobs if isinstance(request, ChatRequest) else request.logprobs is not None
    return logprobs or request.cbtm.return_routing


def _routing(piece: Piece, request: DecodingOptions) -> dict[str, Any]:
    if not request.cbtm.return_routing:
        return {}
    return {
        "cbtm": {
            "tokens": [token.text for token in piece.tokens],
            "experts": [token.expert for token in piece.tokens],
            "weights": [{str(cluster): weight for cluster, weight in token.weights.items()} for token in piece.tokens],
        }
    }
