"""Experts spread over groups on one Serve: the text is that of one group, and goes on when replicas die or begin anew."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest
from ray import serve

from benchmarks.served_run import make_run
from cbtm_ray.corpus.tokenizer import encode
from cbtm_ray.decode.engine import generate
from cbtm_ray.decode.sampling import Sampling
from cbtm_ray.decode.sequence import Request
from cbtm_ray.merge.ensemble import load_ensemble
from serve.app import build
from serve.arguments import AppArguments
from serve.placement import spread
from tests.support.serving import stop_serve

pytestmark = pytest.mark.ray
PORT = 8732
ROOT = f"http://127.0.0.1:{PORT}"
LONG = "Return an array of the given shape and type, filled with ones; the order of the axes is that of the input."
NEAR = (
    "Return the sorted, unique values of an array and the indices that give them; see also sort and lexsort for more."
)
PROMPTS = ["The", LONG, NEAR]
"""Served by experts of both groups, or by experts of one."""


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
    options: dict[str, Any] = {"experts_per_group": 2, "top_k": 2, "group_cpus": 0, "drain_s": 5, **arguments}
    wanted = AppArguments(run_dir=random_run, **options)
    serve.run(build(wanted), route_prefix="/")


def ask(prompt: str, **change: Any) -> dict[str, Any]:
    body = {"model": "cbtm", "prompt": prompt, "max_tokens": 40, "temperature": 0, **change}
    answer = httpx.post(f"{ROOT}/v1/completions", json=body, timeout=240)
    assert answer.status_code == 200, answer.text
    return dict(answer.json()["choices"][0])


def describe(group: str) -> dict[str, int]:
    return dict(serve.get_deployment_handle(group, "default").describe.remote().result())


def replicas(group: str) -> int:
    return serve.status().applications["default"].deployments[group].replica_states.get("RUNNING", 0)


def wait_for(group: str, n_replicas: int, until_s: float = 240) -> None:
    until = time.monotonic() + until_s
    while replicas(group) != n_replicas:
        assert time.monotonic() < until, serve.status()
        time.sleep(0.2)


def greedy(random_run: str, prompt: str) -> str:
    """What one engine with all experts writes."""
    ensemble, tokenizer = load_ensemble(random_run)
    tokens = encode(tokenizer, [prompt])[0].tolist()
    request = Request(
        prompt=tokens,
        max_tokens=40,
        top_k=2,
        sampling=Sampling(temperature=0),
        strategy="lockstep",
    )
    return str(tokenizer.decode([step.token for step in generate(ensemble, request)]))


def test_experts_are_spread_in_order() -> None:
    assert spread(5, 2).clusters == [[0, 1], [2, 3], [4]]
    assert spread(5, 2).names == ["ExpertGroup0", "ExpertGroup1", "ExpertGroup2"]
    assert (spread(3, None).clusters, spread(3, None).names) == ([[0, 1, 2]], ["ExpertGroup"])


@pytest.mark.slow
def test_greedy_text_over_two_groups_is_that_of_one(instance: None, random_run: str) -> None:
    """And where both experts are in one group, the other is asked for nothing."""
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
        assert (reads == [0, 0]) == (len(groups) == 1)
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


@pytest.mark.slow
def test_streams_end_across_a_redeployment(instance: None, random_run: str) -> None:
    """New replicas take over while the old ones write on."""
    deploy(random_run, drain_s=200)
    expected, before = ask(LONG, max_tokens=400)["text"], describe("ExpertGroup0")["pid"]
    text, again = "", threading.Thread(target=deploy, args=(random_run,), kwargs={"drain_s": 200, "max_tokens": 500})
    body = {"model": "cbtm", "prompt": LONG, "max_tokens": 400, "temperature": 0, "stream": True}
    with httpx.stream("POST", f"{ROOT}/v1/completions", json=body, timeout=240) as answer:
        for number, line in enumerate(line for line in answer.iter_lines() if line.startswith("data: {")):
            text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
            if number == 3:
                again.start()
    again.join()
    assert text == expected
    assert describe("ExpertGroup0")["pid"] != before


@pytest.mark.slow
def test_a_cold_group_begins_with_the_first_request(instance: None, random_run: str) -> None:
    """Also: it goes again, and a request for the other group's experts leaves it where it is."""
    scaling = {"min_replicas": 0, "max_replicas": 1, "downscale_delay_s": 3, "downscale_to_zero_delay_s": 3,
               "metrics_interval_s": 1, "look_back_period_s": 2}  # fmt: skip
    deploy(random_run, autoscaling=scaling, top_k=1)
    for group in ("ExpertGroup0", "ExpertGroup1"):
        wait_for(group, 0)
    started = time.monotonic()
    answer = ask(LONG, cbtm={"return_routing": True})
    print(f"from zero replicas to the end of an answer: {time.monotonic() - started:.1f} s")
    (expert,) = answer["cbtm"]["weights"][-1]
    used = int(expert) // 2
    wait_for(f"ExpertGroup{used}", 1)
    assert replicas(f"ExpertGroup{1 - used}") == 0
    wait_for(f"ExpertGroup{used}", 0)


@pytest.mark.slow
def test_a_hot_expert_gets_its_second_replica(instance: None, random_run: str) -> None:
    scaling = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 2, "upscale_delay_s": 1,
               "downscale_delay_s": 3, "metrics_interval_s": 1, "look_back_period_s": 2}  # fmt: skip
    deploy(random_run, autoscaling=scaling, top_k=1)
    alone = ask(LONG, cbtm={"return_routing": True})
    (expert,) = alone["cbtm"]["weights"][-1]
    hot, over = int(expert) // 2, threading.Event()

    def load() -> None:
        while not over.is_set():
            ask(LONG, max_tokens=200)

    threads = [threading.Thread(target=load) for _ in range(8)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    try:
        wait_for(f"ExpertGroup{hot}", 2)
        print(f"from the load's start to a second replica: {time.monotonic() - started:.1f} s")
        assert replicas(f"ExpertGroup{1 - hot}") == 1
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert ask(LONG)["text"] == alone["text"]
