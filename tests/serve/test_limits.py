"""Who may ask, and what the endpoint refuses to start with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from ray.exceptions import RayTaskError

from cbtm_ray.errors import UserError
from serve.app import build
from serve.arguments import AppArguments
from serve.limits import Refused, among, invalid, read_tokens, refusal
from serve.protocol import CompletionRequest


def test_tokens_come_from_a_file_or_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.joinpath("tokens").write_text("one\n  two\n\n")
    monkeypatch.setenv("SOME_TOKENS", "three four")
    assert read_tokens(f"file:{tmp_path / 'tokens'}", "client_tokens") == [b"one", b"two"]
    assert read_tokens("env:SOME_TOKENS", "client_tokens") == [b"three", b"four"]
    assert read_tokens(None, "client_tokens") is None


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("secret", r"client_tokens='secret' must be file:PATH or env:NAME"),
        ("env:", r"client_tokens='env:' must be file:PATH or env:NAME"),
        ("file:/no/such/file", "there is no such file"),
        ("env:NO_SUCH_VARIABLE", "holds no token"),
    ],
)
def test_tokens_that_are_not_there_are_refused(source: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_tokens(source, "client_tokens")


def test_a_token_must_be_one_of_them() -> None:
    assert among(b"two", [b"one", b"two"])
    assert not among(b"tw", [b"one", b"two"])
    assert not among(b"", [b"one"])


@pytest.mark.parametrize(
    ("status", "kind", "header"),
    [
        (401, "invalid_request_error", "WWW-Authenticate"),
        (503, "server_error", "Retry-After"),
        (400, "invalid_request_error", None),
    ],
)
def test_a_refusal_has_openais_shape(status: int, kind: str, header: str | None) -> None:
    refused = Refused(status, "why", param="field", code="x")
    assert refused.body() == {"error": {"message": "why", "type": kind, "param": "field", "code": "x"}}
    response = refused.response()
    assert response.status_code == status
    assert header is None or header in response.headers


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"temperature": 2.5}, "temperature", "temperature=2.5: Input should be less than or equal to 2"),
        ({"n": True}, "n", "n=True: Input should be a valid integer"),
        ({"top_p": float("nan")}, "top_p", "top_p=nan: Input should be a finite number"),
        ({"temprature": 1}, "temprature", "temprature: temprature is not a field. Did you mean temperature?"),
        ({"cbtm": {"topk": 1}}, "cbtm.topk", "cbtm.topk: topk is not a field. Did you mean top_k?"),
        ({"prompt": "\ud800"}, "prompt", r"prompt='\ud800': must have no half of a surrogate pair"),
    ],
)
def test_the_field_the_value_and_the_bound_are_named(change: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(ValidationError) as problem:
        CompletionRequest.model_validate({"model": "cbtm", "prompt": "a", **change})
    refused = invalid(problem.value)
    assert (refused.status, refused.param, str(refused)) == (400, param, message)


def test_an_unfinished_run_is_not_served(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run_dir=\S+ is not a finished run\. Run first: python -m jobs\.run_all"):
        build(AppArguments(run_dir=str(tmp_path)))


@pytest.mark.parametrize("change", [{"top_k": 0}, {"max_sequences": 0}, {"drain_s": 0}, {"topk": 2}])
def test_wrong_arguments_are_named(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(change))):
        AppArguments(run_dir="runs/a", **change)


def from_a_replica(problem: Exception) -> Exception:
    """As it arrives through Ray."""
    return RayTaskError(
        "generate", "Traceback: of the replica", problem, "replica", 1, "127.0.0.1"
    ).as_instanceof_cause()


@pytest.mark.parametrize("arrive", [lambda problem: problem, from_a_replica])
def test_only_a_users_mistake_is_a_400(arrive: Callable[[Exception], Exception]) -> None:
    mistake = refusal(arrive(UserError("top_k=9 must be at most 2.")))
    assert (mistake.status, str(mistake), mistake.param) == (400, "top_k=9 must be at most 2.", "top_k")
    assert refusal(arrive(UserError("No such thing."))).param is None
    for defect in (ValueError("top_k=9 of a library"), KeyError("x")):
        failed = refusal(arrive(defect))
        assert (failed.status, failed.param, failed.body()["error"]["type"]) == (500, None, "server_error")
        assert "library" not in str(failed)
