"""Stock vLLM behind the router, by `serve run` in an environment of vLLM's own, with OpenAI's client."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pytest
import torch

from benchmarks.served_run import make_run
from benchmarks.vllm_servers import BIN, our_vllm
from cbtm_ray.corpus.tokenizer import encode
from cbtm_ray.decode.engine import generate
from cbtm_ray.decode.sampling import Sampling
from cbtm_ray.decode.sequence import Request
from cbtm_ray.merge.ensemble import load_ensemble
from cbtm_ray.models import load_model
from cbtm_ray.stages import DENSE_FOLDER, expert_folder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not BIN.exists(), reason="no .venv-vllm here; make .venv-vllm/cpu makes it"),
]
PORT = 8741
URL = f"http://127.0.0.1:{PORT}"
OFTEN = {"beta": 1.0, "gamma": 0.5, "reread_cost": 0.0}
"""Settings that change the expert often."""
PROMPT = "Return an array of the given shape and type, filled with ones"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four experts that were never trained, routed by settings that change them often."""
    folder = make_run(tmp_path_factory.mktemp("random"), "quickstart", seed=0)
    path = Path(folder) / "evaluation" / "results.json"
    results = json.loads(path.read_text())
    results["routers"]["ngram"]["1"] = OFTEN
    path.write_text(json.dumps(results))
    return folder


@pytest.fixture(scope="module")
def server(run_dir: str) -> Iterator[str]:
    """The endpoint with vLLM engines; administrators may come with "secret"."""
    os.environ["ADMIN"] = "secret"
    with our_vllm(run_dir, PORT, group_cpus=0.1, admin_tokens="env:ADMIN", vllm={"enforce_eager": True}) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0, timeout=600)


def ask(client: openai.OpenAI, **change: Any) -> Any:
    body: dict[str, Any] = {"model": "cbtm", "prompt": PROMPT, "max_tokens": 40, "temperature": 0, **change}
    return client.completions.create(**body).choices[0]


def test_texts_follow_the_router_over_changes_of_expert(client: openai.OpenAI, run_dir: str) -> None:
    """Sampled tokens have the log-probabilities that the chosen expert gives them by transformers, and the experts are those
    that the router chooses for the text."""
    ensemble, tokenizer = load_ensemble(run_dir)
    prompt = encode(tokenizer, [PROMPT])[0].tolist()
    texts = [str(tokenizer.decode([token])) for token in range(len(tokenizer))]
    only = {
        text: token for token, text in enumerate(texts) if texts.count(text) == 1
    }  # halves of characters read alike
    changes = 0
    for seed in range(5):
        choice = ask(
            client, prompt=prompt, temperature=2, seed=seed, logprobs=3, extra_body={"cbtm": {"return_routing": True}}
        )
        said = choice.model_extra["cbtm"]
        answer = [only[token] for token in takewhile(only.__contains__, said["tokens"])]
        router, experts = ensemble.router(1, range(4)), []
        router.append(prompt)
        for token in answer:
            experts.append(router.running[0])
            router.append([token])
        assert said["experts"][: len(answer)] == experts
        changes += int((np.diff(experts) != 0).sum())
        token_ids = torch.tensor([[ensemble.end_of_text, *prompt, *answer]])
        with torch.no_grad():
            rows = {
                expert: load_model(f"{run_dir}/{expert_folder(expert)}")(token_ids).logits[0].log_softmax(-1)
                for expert in set(experts)
            }
        expected = [
            float(rows[expert][len(prompt) + place, token])
            for place, (expert, token) in enumerate(zip(experts, answer, strict=True))
        ]
        assert choice.logprobs.token_logprobs[: len(answer)] == pytest.approx(expected, abs=2e-3)
        assert all(1 <= len(top) <= 4 for top in choice.logprobs.top_logprobs)  # texts that read alike are one
    assert changes > 5


def test_greedy_text_is_that_of_our_engine(client: openai.OpenAI, run_dir: str) -> None:
    ensemble, tokenizer = load_ensemble(run_dir)
    for prompt in ("The", PROMPT, "Sort along an axis"):
        token_ids = encode(tokenizer, [prompt])[0].tolist()
        request = Request(prompt=token_ids, max_tokens=40, top_k=1, sampling=Sampling(temperature=0))
        steps = generate(ensemble, request)
        assert ask(client, prompt=prompt).text == tokenizer.decode([step.token for step in steps])


def test_the_dense_control_is_served_too(client: openai.OpenAI, run_dir: str) -> None:
    _, tokenizer = load_ensemble(run_dir, [])
    token_ids = torch.tensor([[tokenizer.eos_token_id, *encode(tokenizer, [PROMPT])[0]]])
    model = load_model(f"{run_dir}/{DENSE_FOLDER}")
    expected = model.generate(token_ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    choice = ask(client, model="dense", max_tokens=12)
    assert choice.text == tokenizer.decode(expected[0, token_ids.shape[1] :])
    assert choice.finish_reason == "length"


def test_seeds_stops_streams_and_samples(client: openai.OpenAI) -> None:
    seeded: dict[str, Any] = {"temperature": 2, "seed": 3, "n": 2}
    body: dict[str, Any] = {"model": "cbtm", "prompt": PROMPT, "max_tokens": 40, **seeded}
    first, second = client.completions.create(**body).choices
    assert [first.text, second.text] == [choice.text for choice in client.completions.create(**body).choices]
    assert first.text != second.text
    one = {**body, "n": 1}
    pieces = [event.choices[0].text for event in client.completions.create(**one, stream=True)]
    assert "".join(pieces) == first.text
    stop = first.text[12:15]
    stopped = client.completions.create(**one, stop=[stop]).choices[0]
    assert (stopped.text, stopped.finish_reason) == (first.text[: first.text.index(stop)], "stop")
    free = client.completions.create(model="cbtm", prompt=[PROMPT] * 4, max_tokens=40, temperature=2).choices
    assert len({choice.text for choice in free}) == 4, "without a seed, equal prompts have samples of their own"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"extra_body": {"cbtm": {"top_k": 2}}}, "top_k"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"temperature": 0.001}, "temperature"),
        ({"max_tokens": 1024 - 14}, "max_tokens"),
    ],
)
def test_what_vllm_would_do_otherwise_is_refused_by_name(
    client: openai.OpenAI, change: dict[str, Any], field: str
) -> None:
    with pytest.raises(openai.BadRequestError, match="own_engine=true") as refused:
        ask(client, **change)
    assert refused.value.param == field


def test_an_expert_out_of_service_answers_nothing(client: openai.OpenAI) -> None:
    routing: dict[str, Any] = {"extra_body": {"cbtm": {"return_routing": True}}}
    before = ask(client, **routing).model_extra["cbtm"]["experts"]
    gone = before[0]

    def put(active: bool) -> None:
        address, body = f"{URL}/v1/experts/{gone}", {"active": active}
        answer = httpx.put(address, json=body, headers={"Authorization": "Bearer secret"}, timeout=60)
        assert answer.status_code == 200, answer.text

    put(False)
    time.sleep(1.5)  # the gateway hears of it within a second
    assert gone not in ask(client, **routing).model_extra["cbtm"]["experts"]
    put(True)
    time.sleep(1.5)
    assert ask(client, **routing).model_extra["cbtm"]["experts"] == before
    served = httpx.get(f"{URL}/v1/experts").json()
    assert served["engine"] == "vllm"
    assert sum(row["tokens"] for row in served["data"]) > 0


def test_text_is_the_same_when_an_engine_dies_in_it(client: openai.OpenAI) -> None:
    body: dict[str, Any] = {"model": "cbtm", "prompt": PROMPT, "max_tokens": 400, "temperature": 2, "seed": 11}
    whole = client.completions.create(**body, extra_body={"cbtm": {"return_routing": True}}).choices[0]
    first = whole.model_extra["cbtm"]["experts"][0]  # type: ignore[index]
    text = ""
    for number, event in enumerate(client.completions.create(**body, stream=True)):
        text += event.choices[0].text
        if number == 1:
            engine_process(f"Expert{first}").kill()
    assert text == whole.text


def engine_process(name: str) -> psutil.Process:
    ours = psutil.Process().children(recursive=True)
    [found] = [one for one in ours if f"cbtm:{name}" in " ".join(one.cmdline())]
    return found
