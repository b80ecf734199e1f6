"""The endpoint over real HTTP, with OpenAI's own client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from ray import serve

from cbtm_ray.ensemble import load_ensemble
from cbtm_ray.generate import generate
from cbtm_ray.run import Run
from cbtm_ray.sampling import Sampling
from serve.app import AppArguments, build

pytestmark = pytest.mark.ray
PORT = 8731
URL = f"http://127.0.0.1:{PORT}/v1"


@pytest.fixture(scope="module")
def endpoint(finished_run: Run) -> Iterator[openai.OpenAI]:
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    serve.run(build(AppArguments(run_dir=finished_run.dir)), route_prefix="/")
    yield openai.OpenAI(base_url=URL, api_key="none", max_retries=0)
    serve.shutdown()


def test_greedy_text_is_that_of_the_library(endpoint: openai.OpenAI, finished_run: Run) -> None:
    ensemble, tokenizer = load_ensemble(finished_run.dir)
    prompt = tokenizer("the captain watched", add_special_tokens=False)["input_ids"]
    steps = list(generate(ensemble, prompt, top_k=2, max_tokens=10, sampling=Sampling(temperature=0)))
    expected = tokenizer.decode([step.token for step in steps])
    answer = endpoint.completions.create(model="cbtm", prompt="the captain watched", max_tokens=10, temperature=0)
    assert answer.choices[0].text == expected
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == 10


def test_a_stream_adds_up_to_the_whole_text(endpoint: openai.OpenAI) -> None:
    request: dict[str, Any] = {"model": "cbtm", "prompt": "stir the", "max_tokens": 20, "seed": 4}
    whole = endpoint.completions.create(**request)
    chunks = list(endpoint.completions.create(**request, stream=True))
    assert len(chunks) == 21
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_models_are_listed(endpoint: openai.OpenAI) -> None:
    assert [model.id for model in endpoint.models.list()] == ["cbtm"]


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"model": "gpt"}, 404, "model"),
        ({"prompt": None}, 400, "prompt"),
        ({"prompt": [300]}, 400, "prompt"),
        ({"prompt": [-1]}, 400, "prompt"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 10**6}, 400, "max_tokens"),
        ({"temperature": -1}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"top_k": 3}, 400, "top_k"),
        ({"logit_bias": {}}, 400, "logit_bias"),
    ],
)
def test_wrong_requests_are_refused_in_openai_form(
    endpoint: openai.OpenAI, change: dict[str, Any], status: int, param: str
) -> None:
    answer = httpx.post(f"{URL}/completions", json={"model": "cbtm", "prompt": "a", "max_tokens": 2, **change})
    assert answer.status_code == status
    problem = answer.json()["error"]
    assert problem["param"].startswith(param)
    assert set(problem) == {"message", "type", "param", "code"}
    assert endpoint.completions.create(model="cbtm", prompt="a", max_tokens=1).choices


def test_a_body_that_is_no_json_is_refused(endpoint: openai.OpenAI) -> None:
    assert httpx.post(f"{URL}/completions", content=b"{bad").status_code == 400
