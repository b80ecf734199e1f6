"""Experts spread over groups on one Serve: the text is that of one group, and goes on when a replica dies."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest
from ray import serve

from benchmarks.served_run import make_run
from cbtm_ray.ensemble import load_ensemble
from cbtm_ray.generate import run
from cbtm_ray.sampling import Sampling
from cbtm_ray.sequence import Request
from cbtm_ray.tokens import encode
from serve.app import build
from serve.arguments import AppArguments
from serve.groups import spread
from tests.serving import stop_serve

pytestmark = pytest.mark.ray
PORT = 8732
ROOT = f"http://127.0.0.1:{PORT}"
LONG = "Return an array of the given shape and type, filled with ones; the order of the axes is that of the input."
NEAR = (
    "Return the sorted, unique values of an array and the indices that give them; see also sort and lexsort for more."
)
PROMPTS = ["The", LONG, NEAR]
"""Shorter than the prefix; served by experts of both groups; by experts of one."""


@pytest.fixture(scope="module")
def random_run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four experts that were never trained."""
    return make_run(tmp_path_factory.mktemp("random"), "quickstart", seed=0)


@pytest.fixture(scope="module")
def instance(ray_cluster: str) -> Iterator[None]:
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    yield
    stop_serve()


def deploy(random_run: str, **arguments: Any) -> None:
    options: dict[str, Any] = {"experts_per_group": 2, "group_cpus": 0, "drain_s": 5, **arguments}
    wanted = AppArguments(run_dir=random_run, **options)
    serve.run(build(wanted), route_prefix="/")


def ask(prompt: str, **change: Any) -> dict[str, Any]:
    body = {"model": "cbtm", "prompt": prompt, "max_tokens": 40, "temperature": 0, **change}
    answer = httpx.post(f"{ROOT}/v1/completions", json=body, timeout=240)
    assert answer.status_code == 200, answer.text
    return dict(answer.json()["choices"][0])


def describe(group: str) -> dict[str, int]:
    return dict(serve.get_deployment_handle(group, "default").describe.remote().result())


def greedy(random_run: str, prompt: str, top_k: int = 2) -> str:
    """What one engine with all experts writes."""
    ensemble, tokenizer = load_ensemble(random_run)
    tokens = encode(tokenizer, [prompt])[0].tolist()
    request = Request(
        prompt=tokens,
        max_tokens=40,
        top_k=top_k,
        sampling=Sampling(temperature=0),
        strategy="lockstep",
        refresh_tokens=1,
    )
    return str(tokenizer.decode([step.token for step in run(ensemble, request)]))


def test_experts_are_spread_in_order() -> None:
    assert spread(5, 2).clusters == [[0, 1], [2, 3], [4]]
    assert spread(5, 2).names == ["ExpertGroup0", "ExpertGroup1", "ExpertGroup2"]
    assert spread(5, 2).by_group([0, 3, 4]) == {0: [0], 1: [3], 2: [4]}
    assert (spread(3, None).clusters, spread(3, None).names) == ([[0, 1, 2]], ["ExpertGroup"])


@pytest.mark.slow
def test_greedy_text_over_two_groups_is_that_of_one(instance: None, random_run: str) -> None:
    """And where both experts are in one group, the other is asked for the prefix only, once for each of its experts."""
    deploy(random_run, resident_experts=1)
    seen = set()
    for prompt in PROMPTS:
        before = [describe(group)["reads"] for group in ("ExpertGroup0", "ExpertGroup1")]
        answer = ask(prompt, cbtm={"return_routing": True})
        reads = [
            describe(group)["reads"] - n for group, n in zip(("ExpertGroup0", "ExpertGroup1"), before, strict=True)
        ]
        assert answer["text"] == greedy(random_run, prompt)
        assert answer["finish_reason"] == "length"
        groups = {int(expert) // 2 for weights in answer["cbtm"]["weights"] for expert in weights}
        assert (reads == [2, 2]) == (len(groups) == 1)
        seen.add(len(groups))
        echoed = ask(prompt, echo=True, logprobs=0, max_tokens=1)["logprobs"]
        assert len(echoed["token_logprobs"]) == len(echoed["tokens"]) > 1
    assert seen == {1, 2}, "the prompts should need one group and both"
    assert ask(LONG, model="dense", max_tokens=4)["finish_reason"] == "length"


@pytest.mark.slow
@pytest.mark.parametrize("group", ["ExpertGroup0", "ExpertGroup1"])
def test_streams_go_on_when_a_groups_replica_is_killed(instance: None, random_run: str, group: str) -> None:
    deploy(random_run)
    expected = {prompt: ask(prompt, max_tokens=100)["text"] for prompt in PROMPTS}
    before, texts, pieces = describe(group)["pid"], dict.fromkeys(PROMPTS, ""), itertools.count(1)

    def stream(prompt: str) -> None:
        body = {"model": "cbtm", "prompt": prompt, "max_tokens": 100, "temperature": 0, "stream": True}
        with httpx.stream("POST", f"{ROOT}/v1/completions", json=body, timeout=240) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    texts[prompt] += event["choices"][0]["text"] if "choices" in event else str(event)
                    if next(pieces) == 10:
                        psutil.Process(before).kill()

    threads = [threading.Thread(target=stream, args=(prompt,)) for prompt in PROMPTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == expected
    assert describe(group)["pid"] != before
