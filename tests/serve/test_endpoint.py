"""The endpoint over real HTTP, with OpenAI's own client, on one instance of Serve."""

from __future__ import annotations

import inspect
import itertools
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import openai
import psutil
import pytest
import ray
import torch
from ray import serve

from benchmarks.served_run import replicas
from cbtm_ray.cluster.shard_steps import squared_distances
from cbtm_ray.corpus.tokenizer import encode, load_tokenizer
from cbtm_ray.decode.engine import generate
from cbtm_ray.decode.sampling import Sampling
from cbtm_ray.decode.sequence import Request
from cbtm_ray.evaluate import perplexity
from cbtm_ray.merge.ensemble import Ensemble, load_ensemble
from cbtm_ray.merge.routers import Route
from cbtm_ray.merge.scores import ScoredHalf
from cbtm_ray.models import load_model
from cbtm_ray.run import Run
from cbtm_ray.stages import DENSE_FOLDER
from serve.app import build
from serve.arguments import AppArguments
from serve.limits import Refused
from serve.prompts import chat_prompt
from serve.protocol import ChatRequest
from tests.support.browser import CHROMIUM, open_page, screenshot, value_of
from tests.support.serving import stop_serve

pytestmark = pytest.mark.ray
PORT = 8731
ROOT = f"http://127.0.0.1:{PORT}"
CLIENT, ADMIN = "token-of-a-client", "token-of-an-administrator"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
GREEDY: dict[str, Any] = {"model": "cbtm", "prompt": "the captain watched the", "max_tokens": 24, "temperature": 0}
SEEDED: dict[str, Any] = {**GREEDY, "temperature": 0.9, "seed": 7}  # so small a model is dull when it is greedy


OF_ONE = {"temperature": 0.1, "beta": 0.01, "gamma": 0.5, "reread_cost": 0.0}
"""Settings that route this run's texts to other experts than the settings it tunes do."""


@pytest.fixture(scope="module")
def served_run(finished_run: Run, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The finished run with a chat template, and settings of their own for n-gram routing of one expert."""
    folder = tmp_path_factory.mktemp("served") / "run"
    shutil.copytree(finished_run.dir, folder, ignore=shutil.ignore_patterns("checkpoints", "corpus"))
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "tokenizer")
    path = folder / "evaluation" / "results.json"
    results = json.loads(path.read_text())
    results["routers"]["ngram"]["1"] = OF_ONE
    for row in results["rows"]:
        row["served"] = (row["system"], row["routing"], row["top_k"]) == ("cbtm", "ngram", 1)
        if row["served"]:
            row["settings"] = OF_ONE
    path.write_text(json.dumps(results))
    return str(folder)


@pytest.fixture(scope="module")
def endpoint(served_run: str) -> Iterator[openai.OpenAI]:
    folder = Path(served_run)
    folder.joinpath("clients").write_text(f"{CLIENT}\nanother\n")
    folder.joinpath("admins").write_text(ADMIN)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    arguments = AppArguments(
        run_dir=served_run, top_k=2, max_in_flight=8, max_choices=8, max_tokens=120, max_prompt_tokens=110,
        max_body_bytes=20_000,
        client_tokens=f"file:{folder / 'clients'}", admin_tokens=f"file:{folder / 'admins'}", drain_s=5,
    )  # fmt: skip
    serve.run(build(arguments), route_prefix="/")
    yield openai.OpenAI(base_url=f"{ROOT}/v1", api_key=CLIENT, max_retries=0)
    stop_serve()


@pytest.fixture(scope="module")
def ensemble(served_run: str) -> Ensemble:
    return load_ensemble(served_run)[0]


@pytest.fixture(scope="module")
def tokenizer(served_run: str) -> Any:
    return load_tokenizer(f"{served_run}/tokenizer")


def call(method: str, path: str, token: str | None = CLIENT, **options: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    headers |= options.pop("headers", {})
    return httpx.request(method, f"{ROOT}{path}", headers=headers, timeout=60, **options)


def group() -> dict[str, Any]:
    """What the expert group says of itself."""
    return serve.get_deployment_handle("ExpertGroup", "default").describe.remote().result()


# What a completion is


def test_serve_run_finds_the_class_of_the_arguments() -> None:
    """It reads the annotation as it stands, where a postponed one would be text, and `build` would be given a dict."""
    assert inspect.signature(build).parameters["arguments"].annotation is AppArguments


def test_greedy_text_is_that_of_the_library(endpoint: openai.OpenAI, ensemble: Ensemble, tokenizer: Any) -> None:
    prompt = encode(tokenizer, [GREEDY["prompt"]])[0].tolist()
    sampling = Sampling(temperature=0, frequency_penalty=1.5)
    steps = list(generate(ensemble, Request(prompt=prompt, max_tokens=24, top_k=2, sampling=sampling)))
    answer = endpoint.completions.create(**GREEDY, frequency_penalty=1.5)
    assert answer.choices[0].text == tokenizer.decode([step.token for step in steps])
    assert answer.choices[0].finish_reason == steps[-1].finish_reason
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == len(steps)
    assert answer.usage.total_tokens == len(prompt) + len(steps)
    assert answer.choices[0].text != endpoint.completions.create(**GREEDY).choices[0].text


def test_a_stream_adds_up_to_the_whole_answer(endpoint: openai.OpenAI) -> None:
    request: dict[str, Any] = {**SEEDED, "n": 3, "logprobs": 2}
    whole = endpoint.completions.create(**request)
    chunks = list(endpoint.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].choices == []
    assert len({chunk.id for chunk in chunks}) == 1
    for index, choice in enumerate(whole.choices):
        parts = [part for chunk in chunks for part in chunk.choices if part.index == index]
        assert "".join(part.text for part in parts) == choice.text
        assert [token for part in parts for token in part.logprobs.tokens] == choice.logprobs.tokens
        assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + [choice.finish_reason]
    assert len({choice.text for choice in whole.choices}) == 3


def test_prompts_come_in_four_forms_and_seeds_repeat(endpoint: openai.OpenAI, tokenizer: Any) -> None:
    tokens = encode(tokenizer, [SEEDED["prompt"]])[0].tolist()
    forms = [SEEDED["prompt"], [SEEDED["prompt"]] * 2, tokens, [tokens, tokens]]
    request = {**SEEDED, "max_tokens": 8}
    answers = [endpoint.completions.create(**{**request, "prompt": form, "n": 2}) for form in forms]
    texts = [[choice.text for choice in answer.choices] for answer in answers]
    assert texts[0] == texts[2]
    assert texts[1] == texts[3] == texts[0] * 2
    assert texts[0][1] == endpoint.completions.create(**{**request, "seed": 8}).choices[0].text
    assert [choice.index for choice in answers[1].choices] == [0, 1, 2, 3]
    unseeded = {endpoint.completions.create(**{**request, "seed": None}).choices[0].text for _ in range(4)}
    assert len(unseeded) > 1


def test_text_ends_before_a_stop_string(endpoint: openai.OpenAI) -> None:
    text = endpoint.completions.create(**SEEDED).choices[0].text
    stop = text[9:13]
    for stream in (False, True):
        answer = endpoint.completions.create(**SEEDED, stop=["never this", stop], stream=stream, logprobs=0)
        choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
        assert "".join(choice.text for choice in choices) == text[: text.index(stop)]
        assert choices[-1].finish_reason == "stop"
        tokens = [token for choice in choices for token in choice.logprobs.tokens]
        assert "".join(tokens).startswith(text[: text.index(stop)])
        assert max(offset for choice in choices for offset in choice.logprobs.text_offset) < text.index(stop)


def reported_route(run_dir: str, top_k: int) -> Route:
    """What the evaluation reports for n-gram routing."""
    results = json.loads(Path(run_dir, "evaluation", "results.json").read_text())
    named = {"system": "cbtm", "routing": "ngram", "top_k": top_k}
    [row] = [row for row in results["rows"] if named.items() <= row.items()]
    return Route(routing="ngram", top_k=top_k, settings=row["settings"], prefix_tokens=results["prefix_tokens"])


def reported_logprobs(ensemble: Ensemble, tokens: np.ndarray, route: Route) -> np.ndarray:
    """The mixture's log-probability of every token, computed as the evaluation computes a row."""
    logprobs_TK = np.stack(
        [
            perplexity.score_documents(
                model, [tokens], sequence_length=100, end_of_text=ensemble.end_of_text, batch_tokens=1000
            )
            for model in ensemble.experts.values()
        ],
        axis=1,
    )
    prefixes_TD = torch.from_numpy(ensemble.embedder.prefix_embeddings(tokens))
    distances_TK = squared_distances(prefixes_TD, ensemble.centers_KD).numpy()
    assert ensemble.ngrams is not None
    held_out = ScoredHalf(np.array([len(tokens)]), logprobs_TK, distances_TK, ensemble.ngrams.evidence(tokens))
    return perplexity.mixture_logprobs(held_out, route)


def test_echoed_logprobs_are_those_of_the_evaluation(
    endpoint: openai.OpenAI, served_run: str, ensemble: Ensemble, tokenizer: Any
) -> None:
    text = "the captain watched the harbour lights beyond the reef and the ship sailed over the waves"
    tokens = encode(tokenizer, [text])[0]
    one = endpoint.completions.create(
        model="cbtm", prompt=text, max_tokens=0, echo=True, logprobs=1, extra_body={"cbtm": {"top_k": 1}}
    )
    expected_T = reported_logprobs(ensemble, tokens, reported_route(served_run, 1))
    np.testing.assert_allclose(one.choices[0].logprobs.token_logprobs, expected_T, atol=1e-4)
    of_two = replace(reported_route(served_run, 1), settings=reported_route(served_run, 2).settings)
    assert not np.allclose(expected_T, reported_logprobs(ensemble, tokens, of_two), atol=1e-3)
    expected_T = reported_logprobs(ensemble, tokens, reported_route(served_run, 2))
    for prompt in (text, tokens.tolist()):
        answer = endpoint.completions.create(model="cbtm", prompt=prompt, max_tokens=0, echo=True, logprobs=1)
        found = answer.choices[0].logprobs
        np.testing.assert_allclose(found.token_logprobs, expected_T, atol=1e-4)
        assert answer.choices[0].text == "".join(found.tokens) == text
        assert found.text_offset == np.cumsum([0, *map(len, found.tokens[:-1])]).tolist()
        assert answer.usage.completion_tokens == 0
    # What an evaluation harness sends: token ids, one token generated and ignored.
    request = {"model": "cbtm", "prompt": [tokens.tolist()], "max_tokens": 1, "echo": True, "logprobs": 1}
    answer = endpoint.completions.create(**request, temperature=0, seed=1234)
    found = answer.choices[0].logprobs
    assert len(found.tokens) == len(tokens) + 1  # also where the one generated is the end of text
    np.testing.assert_allclose(found.token_logprobs[:-1], expected_T, atol=1e-4)
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert top[token] == pytest.approx(logprob)
        assert 1 <= len(top) <= 2
        assert max(top.values()) <= 0


def test_a_seeded_text_is_the_librarys_and_has_the_logprobs_of_its_echo(
    endpoint: openai.OpenAI, ensemble: Ensemble, tokenizer: Any
) -> None:
    prompt = encode(tokenizer, [SEEDED["prompt"]])[0].tolist()
    sampling = Sampling(temperature=0.9, seed=7)
    request = Request(prompt=prompt, max_tokens=24, top_k=2, sampling=sampling, strategy="lockstep", top_logprobs=0)
    steps = list(generate(ensemble, request))
    written = endpoint.completions.create(**SEEDED, logprobs=1).choices[0]
    assert written.text == tokenizer.decode([step.token for step in steps if step.finish_reason != "stop"])
    np.testing.assert_allclose(written.logprobs.token_logprobs, [step.logprob for step in steps], atol=1e-4)
    text = prompt + [step.token for step in steps]
    read = endpoint.completions.create(model="cbtm", prompt=text, max_tokens=0, echo=True, logprobs=0).choices[0]
    np.testing.assert_allclose(read.logprobs.token_logprobs[len(prompt) :], written.logprobs.token_logprobs, atol=1e-4)


def test_an_echo_without_logprobs_is_the_prompt(endpoint: openai.OpenAI) -> None:
    answer = endpoint.completions.create(**SEEDED, echo=True)
    assert answer.choices[0].text == SEEDED["prompt"] + endpoint.completions.create(**SEEDED).choices[0].text
    nothing = endpoint.completions.create(**{**SEEDED, "max_tokens": 0})
    assert (nothing.choices[0].text, nothing.choices[0].finish_reason) == ("", "length")


def test_a_chat_is_a_completion_of_its_template(endpoint: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "system", "content": "a ship"}, {"role": "user", "content": "the sea?"}]
    options: dict[str, Any] = {"model": "cbtm", "temperature": 0, "max_tokens": 12}
    chat = endpoint.chat.completions.create(**options, messages=messages, logprobs=True, top_logprobs=2)
    prompt = "system: a ship\nuser: the sea?\nassistant:"
    plain = endpoint.completions.create(**options, prompt=prompt, logprobs=2)
    assert chat.object == "chat.completion"
    assert chat.choices[0].message.content == plain.choices[0].text
    found = chat.choices[0].logprobs.content
    np.testing.assert_allclose([token.logprob for token in found], plain.choices[0].logprobs.token_logprobs)
    assert all(len(token.top_logprobs) == 2 for token in found)
    stream = endpoint.chat.completions.create(**options, messages=messages, stream=True)
    assert "".join(chunk.choices[0].delta.content for chunk in stream) == plain.choices[0].text


def test_a_chat_needs_a_template(finished_run: Run) -> None:
    request = ChatRequest.model_validate(chat()["json"])
    with pytest.raises(Refused, match="no chat template"):
        chat_prompt(load_tokenizer(finished_run.uri("tokenizer")), request)


def test_routing_is_told_on_request(endpoint: openai.OpenAI) -> None:
    for top_k in (1, 2):
        answer = endpoint.completions.create(**SEEDED, extra_body={"cbtm": {"top_k": top_k, "return_routing": True}})
        routing = answer.choices[0].cbtm
        assert len(routing["experts"]) == len(routing["weights"]) == answer.usage.completion_tokens
        for expert, weights in zip(routing["experts"], routing["weights"], strict=True):
            assert len(weights) == top_k
            assert sum(weights.values()) == pytest.approx(1)
            assert weights[str(expert)] == max(weights.values())
    assert "cbtm" not in (endpoint.completions.create(**SEEDED).choices[0].model_extra or {})


def test_models_and_the_dense_control(endpoint: openai.OpenAI) -> None:
    assert [model.id for model in endpoint.models.list()] == ["cbtm", "dense"]
    answer = endpoint.completions.create(**{**SEEDED, "model": "dense"}, extra_body={"cbtm": {"return_routing": True}})
    assert answer.choices[0].cbtm["weights"][0] == {"0": 1.0}
    assert answer.choices[0].text != endpoint.completions.create(**SEEDED).choices[0].text


def test_the_dense_control_has_its_own_logprobs(endpoint: openai.OpenAI, served_run: str, tokenizer: Any) -> None:
    text = "stir the butter into the flour then bake the cake"
    tokens, model = encode(tokenizer, [text])[0], load_model(f"{served_run}/{DENSE_FOLDER}")
    expected_T = perplexity.score_documents(
        model, [tokens], sequence_length=100, end_of_text=tokenizer.eos_token_id, batch_tokens=1000
    )
    answer = endpoint.completions.create(model="dense", prompt=text, max_tokens=0, echo=True, logprobs=0)
    np.testing.assert_allclose(answer.choices[0].logprobs.token_logprobs, expected_T, atol=1e-4)


def test_the_openapi_page_is_for_those_who_may_ask_and_names_the_models(endpoint: openai.OpenAI) -> None:
    assert call("GET", "/openapi.json", token=None).status_code == 401
    page = call("GET", "/openapi.json").json()
    assert page["components"]["schemas"]["CompletionRequest"]["properties"]["model"]["enum"] == ["cbtm", "dense"]
    assert page["security"] == [{"bearer": []}]
    assert {path for path in page["paths"] if path.startswith("/v1")} == {
        "/v1/models", "/v1/experts", "/v1/experts/{cluster}", "/v1/completions", "/v1/chat/completions",
    }  # fmt: skip


# The experts


def test_an_expert_is_taken_out_and_put_back(endpoint: openai.OpenAI) -> None:
    def experts_used() -> set[str]:
        answer = endpoint.completions.create(**SEEDED, extra_body={"cbtm": {"return_routing": True}})
        return {expert for weights in answer.choices[0].cbtm["weights"] for expert in weights}

    def wait_for(used: set[str]) -> None:
        until = time.monotonic() + 30
        while experts_used() != used:
            assert time.monotonic() < until
            time.sleep(0.1)

    assert experts_used() == {"0", "1"}
    listed = call("GET", "/v1/experts").json()
    assert (listed["routing"], listed["top_k"]) == ("ngram", 2)
    before = listed["data"]
    assert [row["cluster"] for row in before] == [0, 1]
    assert all(row["state"] == "active" and row["top_terms"] and row["documents"] > 0 for row in before)
    assert call("PUT", "/v1/experts/1", json={"active": False}).status_code == 401  # a client is no administrator
    taken = call("PUT", "/v1/experts/1", ADMIN, json={"active": False})
    assert (taken.status_code, taken.json()["state"]) == (200, "out")
    wait_for({"0"})
    last = call("PUT", "/v1/experts/0", ADMIN, json={"active": False})
    assert (last.status_code, last.json()["error"]["code"]) == (409, "last_expert")
    assert call("PUT", "/v1/experts/1", ADMIN, json={"active": True}).json()["state"] == "active"
    wait_for({"0", "1"})
    after = call("GET", "/v1/experts").json()["data"]
    assert sum(row["tokens"] for row in after) > sum(row["tokens"] for row in before)
    assert sum(row["requests"] for row in after) > sum(row["requests"] for row in before)


# Refusals


def changed(**change: Any) -> dict[str, Any]:
    return {"json": {"model": "cbtm", "prompt": "a", "max_tokens": 2, **change}}


def chat(**change: Any) -> dict[str, Any]:
    return {
        "path": "/v1/chat/completions",
        "json": {"model": "cbtm", "messages": [{"role": "user", "content": "a"}], **change},
    }


def raw(content: bytes, **headers: str) -> dict[str, Any]:
    return {"content": content, "headers": {"Content-Type": "application/json", **headers}}


NESTED = b'{"model": "cbtm", "prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}"
MALFORMED: dict[str, tuple[int, dict[str, Any]]] = {
    "unknown model": (404, changed(model="gpt")),
    "model of another type": (400, changed(model=3)),
    "no model": (400, {"json": {"prompt": "a"}}),
    "no prompt": (400, {"json": {"model": "cbtm"}}),
    "prompt null": (400, changed(prompt=None)),
    "prompt number": (400, changed(prompt=7)),
    "prompt object": (400, changed(prompt={"text": "a"})),
    "prompt empty list": (400, changed(prompt=[])),
    "prompt empty token list": (400, changed(prompt=[[]])),
    "prompt mixed": (400, changed(prompt=["a", 1])),
    "prompt mixed lists": (400, changed(prompt=[[1], "a"])),
    "prompt too deep": (400, changed(prompt=[[[1]]])),
    "prompt floats": (400, changed(prompt=[1.5])),
    "prompt booleans": (400, changed(prompt=[True])),
    "token outside": (400, changed(prompt=[300])),
    "token negative": (400, changed(prompt=[-1])),
    "token huge": (400, changed(prompt=[2**70])),
    "prompt too long": (400, changed(prompt=[5] * 111)),
    "prompt and answer too long": (400, changed(prompt=[5] * 100, max_tokens=100)),
    "text too long": (400, changed(prompt="word " * 3000)),
    "too many prompts": (400, changed(prompt=["a"] * 9)),
    "max_tokens negative": (400, changed(max_tokens=-1)),
    "max_tokens huge": (400, changed(max_tokens=10**30)),
    "max_tokens over the limit": (400, changed(max_tokens=121)),
    "max_tokens text": (400, changed(max_tokens="2")),
    "max_tokens fraction": (400, changed(max_tokens=1.5)),
    "max_tokens boolean": (400, changed(max_tokens=True)),
    "temperature negative": (400, changed(temperature=-0.1)),
    "temperature high": (400, changed(temperature=2.1)),
    "temperature text": (400, changed(temperature="hot")),
    "temperature infinite": (400, raw(b'{"model": "cbtm", "prompt": "a", "temperature": Infinity}')),
    "temperature no number": (400, raw(b'{"model": "cbtm", "prompt": "a", "temperature": NaN}')),
    "top_p zero": (400, changed(top_p=0)),
    "top_p high": (400, changed(top_p=1.1)),
    "n zero": (400, changed(n=0)),
    "n high": (400, changed(n=9)),
    "n huge": (400, changed(n=10**20)),
    "seed negative": (400, changed(seed=-1)),
    "seed huge": (400, changed(seed=2**63)),
    "seed text": (400, changed(seed="x")),
    "stop number": (400, changed(stop=3)),
    "stop empty string": (400, changed(stop="")),
    "stop too many": (400, changed(stop=list("abcde"))),
    "stop long": (400, changed(stop="a" * 201)),
    "stop of numbers": (400, changed(stop=[1])),
    "logprobs negative": (400, changed(logprobs=-1)),
    "logprobs many": (400, changed(logprobs=21)),
    "logprobs boolean": (400, changed(logprobs=True)),
    "echo text": (400, changed(echo="yes")),
    "stream text": (400, changed(stream="yes")),
    "stream options": (400, changed(stream=True, stream_options={"usage": True})),
    "presence penalty": (400, changed(presence_penalty=2.5)),
    "frequency penalty": (400, changed(frequency_penalty=-2.5)),
    "best_of": (400, changed(best_of=2)),
    "logit_bias": (400, changed(logit_bias={})),
    "suffix": (400, changed(suffix="b")),
    "unknown field": (400, changed(temprature=1)),
    "experts too many": (400, changed(cbtm={"top_k": 3})),
    "experts none": (400, changed(cbtm={"top_k": 0})),
    "dense has one expert": (400, changed(model="dense", cbtm={"top_k": 2})),
    "strategy unknown": (400, changed(cbtm={"strategy": "guess"})),
    "strategy not exact": (400, changed(temperature=0.5, cbtm={"strategy": "ancestral"})),
    "routing unknown field": (400, changed(cbtm={"topk": 1})),
    "routing text": (400, changed(cbtm="yes")),
    "no JSON": (400, raw(b"{bad")),
    "empty body": (400, raw(b"")),
    "null": (400, raw(b"null")),
    "list": (400, raw(b"[]")),
    "invalid UTF-8": (400, raw(b'{"model": "cbtm", "prompt": "\xff\xfe"}')),
    "lone surrogate": (400, raw(b'{"model": "cbtm", "prompt": "\\ud800"}')),
    "lone surrogate, model": (400, raw(b'{"model": "\\ud800", "prompt": "a"}')),
    "lone surrogate, stop": (400, raw(b'{"model": "cbtm", "prompt": "a", "stop": "\\ud800"}')),
    "lone surrogate, field": (400, raw(b'{"model": "cbtm", "prompt": "a", "\\ud800": 1}')),
    "lone surrogate, message": (
        400, {**raw(b'{"model": "cbtm", "messages": [{"role": "user", "content": "\\ud800"}]}'), "path": chat()["path"]},
    ),
    "nested": (400, raw(NESTED)),
    "number of many digits": (400, raw(b'{"model": "cbtm", "prompt": "a", "seed": ' + b"9" * 6000 + b"}")),
    "big body": (413, raw(b'{"model": "cbtm", "prompt": "' + b"a" * 20_000 + b'"}')),
    "big body, unannounced": (413, {"content": iter([b" " * 15_000] * 3), "headers": {"Content-Type": "application/json"}}),
    "form": (415, {"data": {"model": "cbtm", "prompt": "a"}}),
    "text": (415, {"content": b'{"model": "cbtm", "prompt": "a"}', "headers": {"Content-Type": "text/plain"}}),
    "no token": (401, {**changed(), "token": None}),
    "wrong token": (401, {**changed(), "token": "guess"}),
    "token of another kind": (401, {**changed(), "token": None, "headers": {"Authorization": f"Basic {CLIENT}"}}),
    "token that is no text": (401, {**changed(), "token": None, "headers": {"Authorization": b"Bearer \xff\xfe"}}),
    "no messages": (400, chat(messages=[])),
    "messages text": (400, chat(messages="hello")),
    "unknown role": (400, chat(messages=[{"role": "king", "content": "a"}])),
    "message without content": (400, chat(messages=[{"role": "user"}])),
    "content number": (400, chat(messages=[{"role": "user", "content": 3}])),
    "chat top_logprobs": (400, chat(logprobs=True, top_logprobs=21)),
    "chat max_tokens": (400, chat(max_completion_tokens=121)),
    "chat too long": (400, chat(messages=[{"role": "user", "content": "stir the butter " * 60}])),
    "tools": (400, chat(tools=[])),
    "no route": (404, {**changed(), "path": "/v1/embeddings"}),
    "wrong method": (405, {"method": "GET"}),
    "no expert": (404, {"method": "PUT", "path": "/v1/experts/2", "token": ADMIN, "json": {"active": True}}),
    "no expert's number": (404, {"method": "PUT", "path": "/v1/experts/x", "token": ADMIN, "json": {"active": True}}),
    "no expert's number, of many digits": (
        404, {"method": "PUT", "path": "/v1/experts/000000000999", "token": ADMIN, "json": {"active": True}},
    ),
    "expert's state": (400, {"method": "PUT", "path": "/v1/experts/1", "token": ADMIN, "json": {"active": "no"}}),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_requests_are_refused_in_openai_form(endpoint: openai.OpenAI, name: str) -> None:
    status, options = MALFORMED[name]
    options = {"method": "POST", "path": "/v1/completions", **options}
    answer = call(options.pop("method"), options.pop("path"), **options)
    assert answer.status_code == status, answer.text
    problem = answer.json()["error"]
    assert set(problem) == {"message", "type", "param", "code"}
    assert problem["type"] == "invalid_request_error"
    assert not any(word in problem["message"] for word in ("Traceback", "site-packages", "pydantic", ".py"))
    assert call("GET", "/healthz", token=None).json() == {"status": "ok"}


def test_the_server_answers_after_all_that(endpoint: openai.OpenAI) -> None:
    assert len(MALFORMED) > 60
    assert endpoint.completions.create(**SEEDED).choices[0].text


def refused_call(port: int) -> grpc.StatusCode:
    """How a port refuses what Serve's replicas ask each other, from somebody without the cluster's token."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary("/ray.serve.ASGIService/HandleRequest")(b"", timeout=20)
    return refused.value.code()


def test_a_replica_s_port_wants_the_cluster_s_token(endpoint: openai.OpenAI) -> None:
    """Serve opens it to all interfaces, whatever Ray is told; another one is Ray's own, which knows no such call."""
    connections = [one for process in replicas() for one in process.net_connections("tcp")]
    codes = Counter(refused_call(one.laddr.port) for one in connections if one.status == psutil.CONN_LISTEN)
    assert codes == {grpc.StatusCode.UNAUTHENTICATED: 3, grpc.StatusCode.UNIMPLEMENTED: 3}


def test_too_much_at_once_is_refused_and_comes_in_later(endpoint: openai.OpenAI) -> None:
    with endpoint.completions.create(**{**SEEDED, "max_tokens": 100}, n=8, stream=True) as stream:
        next(stream)
        refused = call("POST", "/v1/completions", json=SEEDED)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "overloaded"
        assert int(refused.headers["Retry-After"]) >= 1
        for _ in stream:
            pass
    assert call("POST", "/v1/completions", json=SEEDED).status_code == 200


# Clients and replicas that go


@pytest.mark.parametrize("stream", [True, False])
def test_sequences_end_when_their_client_leaves(endpoint: openai.OpenAI, stream: bool) -> None:
    body, before = {**SEEDED, "max_tokens": 110, "n": 8, "stream": stream}, group()["tokens"]
    headers = {"Authorization": f"Bearer {CLIENT}"}
    with httpx.Client() as client:
        if stream:
            with client.stream("POST", f"{ROOT}/v1/completions", json=body, headers=headers, timeout=60) as answer:
                next(answer.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(f"{ROOT}/v1/completions", json=body, headers=headers, timeout=0.1)
    until = time.monotonic() + 30
    while (state := group())["running"] or state["waiting"]:
        assert time.monotonic() < until
        time.sleep(0.02)
    assert state["tokens"] - before < 8 * 110
    assert call("POST", "/v1/completions", json=SEEDED).status_code == 200


def test_a_stream_goes_on_when_its_replica_is_killed(endpoint: openai.OpenAI) -> None:
    request: dict[str, Any] = {
        **SEEDED,
        "max_tokens": 100,
        "n": 4,
        "presence_penalty": 0.2,
        "temperature": 0.8,
        "seed": 11,
    }
    expected = [choice.text for choice in endpoint.completions.create(**request).choices]
    before = group()["pid"]
    texts = ["", "", "", ""]
    with endpoint.completions.create(**request, stream=True) as stream:
        for number, chunk in enumerate(stream):
            if number == 4:
                psutil.Process(before).kill()
            texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == expected
    assert group()["pid"] != before


def test_metrics_are_exported_for_prometheus(endpoint: openai.OpenAI) -> None:
    port = ray.nodes()[0]["MetricsExportPort"]
    wanted = {"cbtm_tokens", "cbtm_expert_tokens", "cbtm_running_sequences", "cbtm_waiting_sequences", "cbtm_ttft_s",
              "cbtm_in_flight_sequences"}  # fmt: skip
    until = time.monotonic() + 60
    metrics = f"http://127.0.0.1:{port}/metrics"
    while missing := {name for name in wanted if name not in httpx.get(metrics, timeout=60).text}:
        assert time.monotonic() < until, missing
        call("POST", "/v1/completions", json=SEEDED)  # a gauge that nobody sets for a while is not exported
        time.sleep(0.5)


# The playground

DRIVE = """(async () => {
  const get = id => document.getElementById(id);
  const until = async test => { while (!test()) await new Promise(wake => setTimeout(wake, 20)); };
  get("bearer").value = "TOKEN";
  get("bearer").dispatchEvent(new Event("change"));
  await until(() => document.querySelectorAll("#experts li").length);
  get("prompt").value = "the captain watched the";
  get("temperature").value = "0.9";
  get("seed").value = "7";
  get("max_tokens").value = "24";
  get("dense").checked = true;
  document.dispatchEvent(new KeyboardEvent("keydown", {key: "Enter", ctrlKey: true}));
  await until(() => /tokens in/.test(get("status").textContent) || get("status").className === "wrong");
  get("cbtm").dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight"}));
  const tokens = [...document.querySelectorAll("#cbtm .token")], root = document.documentElement;
  const right = one => one.getBoundingClientRect().right;
  const outside = [...document.querySelectorAll("body *")].filter(one => right(one) > root.clientWidth + 0.5);
  return {
    status: get("status").textContent, text: tokens.map(token => token.textContent).join(""),
    dense: get("dense-text").textContent, served: get("served").textContent, legend: get("experts").textContent,
    experts: tokens.map(token => Number(token.dataset.expert)), titles: tokens.map(token => token.title),
    numbered: tokens.filter(token => token.matches(".first")).map(token => Number(token.dataset.expert)),
    shares: [...document.querySelectorAll(".share")].map(share => Number(share.textContent)),
    chosen: tokens.findIndex(token => token.matches(".chosen")), scroll_width: root.scrollWidth,
    client_width: root.clientWidth, outside: outside.map(one => one.outerHTML.slice(0, 120))};
})()"""


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs the program chromium (apt-get install chromium)")
@pytest.mark.parametrize("width", [1280, 390])
def test_playground_writes_and_says_which_expert(endpoint: openai.OpenAI, tmp_path: Path, width: int) -> None:
    with open_page(ROOT, tmp_path / "profile", width) as command:
        seen = value_of(command, DRIVE.replace("TOKEN", CLIENT))
        screenshot(command, tmp_path / f"playground-{width}.png")
    answer = endpoint.completions.create(**SEEDED, extra_body={"cbtm": {"return_routing": True}})
    assert seen["text"] == "".join(answer.choices[0].cbtm["tokens"]), seen["status"]
    assert seen["dense"] == endpoint.completions.create(**{**SEEDED, "model": "dense"}).choices[0].text
    experts = answer.choices[0].cbtm["experts"]
    assert seen["experts"] == experts
    assert seen["numbered"] == [expert for expert, _ in itertools.groupby(experts)]  # told without color
    assert all(title.startswith(f"expert {expert} (") for expert, title in zip(experts, seen["titles"], strict=True))
    assert all(row["top_terms"][0] in seen["legend"] for row in call("GET", "/v1/experts").json()["data"])
    assert sum(seen["shares"]) == pytest.approx(1, abs=0.02)
    assert seen["chosen"] == 0
    assert seen["served"] == "Served: ngram routing, 2 experts for a token."
    assert seen["client_width"] == width
    assert seen["outside"] == []
    assert seen["scroll_width"] <= width
