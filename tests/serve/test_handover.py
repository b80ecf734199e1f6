"""Two groups of one expert each: every token arrives though texts are handed on and replicas die; errors say what they may."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import ray
from ray import serve
from transformers import MiniMaxConfig, MiniMaxForCausalLM

from benchmarks.served_run import replicas
from cbtm_ray.corpus.tokenizer import encode, load_tokenizer
from cbtm_ray.decode.engine import generate
from cbtm_ray.decode.sampling import Sampling
from cbtm_ray.decode.sequence import Request, Step
from cbtm_ray.merge.ensemble import Ensemble, load_ensemble
from cbtm_ray.run import Run
from cbtm_ray.stages import DENSE_FOLDER
from serve.app import build
from serve.arguments import AppArguments
from tests.support.serving import stop_serve

pytestmark = pytest.mark.ray
PORT = 8733
ADMIN = "token-of-an-administrator"
CACHE_TOKENS = 100
GROUPS = ["ExpertGroup0", "ExpertGroup1"]
TEXT = "the captain watched the harbour lights beyond the reef"


@pytest.fixture(scope="module")
def served_run(finished_run: Run, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The finished run with a chat template and a dense model that both raise ValueError when they are used. The model
    has fewer tokens than the tokenizer."""
    folder = tmp_path_factory.mktemp("spread") / "run"
    shutil.copytree(finished_run.dir, folder, ignore=shutil.ignore_patterns("checkpoints", "corpus"))
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    tokenizer.chat_template = "{{ messages[0].content.index('no such text') }}"
    tokenizer.save_pretrained(folder / "tokenizer")
    config = MiniMaxConfig(vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                           num_attention_heads=2, num_key_value_heads=2, head_dim=8, num_local_experts=2)  # fmt: skip
    MiniMaxForCausalLM(config).save_pretrained(folder / DENSE_FOLDER)
    (folder / "admins").write_text(ADMIN)
    return str(folder)


@pytest.fixture(scope="module")
def client(ray_cluster: str, served_run: str) -> Iterator[httpx.Client]:
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    arguments = AppArguments(
        run_dir=served_run, top_k=2, experts_per_group=1, group_cpus=0, cache_tokens=CACHE_TOKENS, drain_s=5,
        admin_tokens=f"file:{served_run}/admins",
    )  # fmt: skip
    serve.run(build(arguments), route_prefix="/")
    headers = {"Authorization": f"Bearer {ADMIN}"}
    with httpx.Client(base_url=f"http://127.0.0.1:{PORT}/v1", timeout=120, headers=headers) as client:
        yield client
    stop_serve()


@pytest.fixture(scope="module")
def ensemble(served_run: str) -> Ensemble:
    return load_ensemble(served_run)[0]


@pytest.fixture(scope="module")
def tokenizer(served_run: str) -> Any:
    return load_tokenizer(f"{served_run}/tokenizer")


def describe(group: str) -> dict[str, int]:
    return dict(serve.get_deployment_handle(group, "default").describe.remote().result())


def body_of(prompt: list[int], **change: Any) -> dict[str, Any]:
    """Asks for the tokens of prompt and answer, each with its log-probability."""
    wanted = {"max_tokens": 60, "temperature": 0.9, "seed": 7, "echo": True, "logprobs": 1}
    return {"model": "cbtm", "prompt": prompt, **wanted, **change}


def whole(client: httpx.Client, body: dict[str, Any]) -> list[dict[str, Any]]:
    answer = client.post("/completions", json=body)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["choices"])


def events(client: httpx.Client, body: dict[str, Any]) -> list[dict[str, Any]]:
    with client.stream("POST", "/completions", json={**body, "stream": True}) as answer:
        lines = list(answer.iter_lines())
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]


def streamed(client: httpx.Client, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The one choice of a stream, put together."""
    parts = [event["choices"][0] for event in events(client, body)]
    logprobs = {key: [one for part in parts for one in part["logprobs"][key]] for key in parts[0]["logprobs"]}
    text = "".join(part["text"] for part in parts)
    return [{"text": text, "finish_reason": parts[-1]["finish_reason"], "logprobs": logprobs}]


ASKING = [whole, streamed]


def undisturbed(ensemble: Ensemble, prompt: list[int], *, top_k: int, max_tokens: int = 60) -> list[Step]:
    """What one engine with all experts gives."""
    request = Request(
        prompt=prompt, max_tokens=max_tokens, top_k=top_k, sampling=Sampling(temperature=0.9, seed=7),
        strategy="lockstep", top_logprobs=1, echo_logprobs=True,
    )  # fmt: skip
    return list(generate(ensemble, request))


def check_is(choice: dict[str, Any], steps: list[Step], tokenizer: Any) -> None:
    """Every token of prompt and answer is there, and its log-probability is right."""
    assert choice["logprobs"]["tokens"] == [tokenizer.decode([step.token]) for step in steps]
    np.testing.assert_allclose(choice["logprobs"]["token_logprobs"], [step.logprob for step in steps], atol=1e-3)
    assert choice["text"] == tokenizer.decode([step.token for step in steps if step.finish_reason != "stop"])
    assert choice["finish_reason"] == steps[-1].finish_reason


@pytest.mark.parametrize("ask", ASKING)
@pytest.mark.parametrize("top_k", [1, 2])
def test_a_text_that_is_handed_on_loses_no_token(
    client: httpx.Client, ensemble: Ensemble, tokenizer: Any, ask: Callable[..., list[dict[str, Any]]], top_k: int
) -> None:
    """Experts of both groups are mixed, or the text changes from one to the other."""
    tokens = encode(tokenizer, [TEXT])[0].tolist()
    for length in (1, 8, len(tokens)):
        prompt = tokens[:length]
        [choice] = ask(client, body_of(prompt, cbtm={"top_k": top_k}))
        check_is(choice, undisturbed(ensemble, prompt, top_k=top_k), tokenizer)


def test_a_new_roster_does_not_forget_who_is_out(client: httpx.Client) -> None:
    assert client.put("/experts/1", json={"active": False}).json()["state"] == "out"
    [registry] = replicas("ExpertRegistry")
    registry.kill()
    registry.wait(60)
    answer = client.put("/experts/0", json={"active": False})
    until = time.monotonic() + 60
    while answer.status_code >= 500:  # the registry dies under it, or the new one knows nothing yet
        assert time.monotonic() < until
        answer = client.put("/experts/0", json={"active": False})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "last_expert")
    assert client.put("/experts/1", json={"active": True}).json()["state"] == "active"
    assert [row["state"] for row in client.get("/experts").json()["data"]] == ["active", "active"]


def interrupted(client: httpx.Client, body: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The answers, whole and streamed, to a request whose group is killed when it decodes both."""
    with ThreadPoolExecutor(2) as threads:
        while True:  # until both are seen at work together
            answers = [threads.submit(ask, client, body) for ask in ASKING]
            while not any(answer.done() for answer in answers):
                for group in GROUPS:
                    if (state := describe(group))["running"] == 2:
                        psutil.Process(state["pid"]).kill()
                        found = [answer.result() for answer in answers]
                        assert describe(group)["pid"] != state["pid"]
                        return found
            wait(answers)


def test_no_token_is_lost_when_a_replica_dies(client: httpx.Client, ensemble: Ensemble, tokenizer: Any) -> None:
    prompt = encode(tokenizer, [TEXT])[0].tolist()[:10]
    steps = undisturbed(ensemble, prompt, top_k=2, max_tokens=38)  # there is room for two of them
    for [choice] in interrupted(client, body_of(prompt, max_tokens=38)):
        check_is(choice, steps, tokenizer)


def test_the_cache_may_be_filled_and_no_more(client: httpx.Client) -> None:
    [choice] = whole(client, body_of([5] * (CACHE_TOKENS - 1), max_tokens=0))
    assert len(choice["logprobs"]["tokens"]) == CACHE_TOKENS - 1
    answer = client.post("/completions", json=body_of([5] * CACHE_TOKENS, max_tokens=0))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "max_tokens")


def test_what_a_groups_engine_refuses_is_a_400(client: httpx.Client) -> None:
    answer = client.post("/completions", json=body_of([19, 20], model="dense"))
    message = "prompt=20 must be token ids from 0 to 19."
    error = {"message": message, "type": "invalid_request_error", "param": "prompt", "code": "invalid_value"}
    assert (answer.status_code, answer.json()) == (400, {"error": error})


def logged(request_id: str) -> str:
    """What the logs of Serve's replicas have of a request, with the tracebacks that follow."""
    folder = Path(ray._private.worker._global_node.get_session_dir_path(), "logs", "serve")
    records = [record for path in folder.glob("replica_*.log") for record in path.read_text().split("\nERROR ")]
    return "\n".join(record for record in records if request_id in record.partition("\n")[0])


def check_is_defect(error: dict[str, Any], reason: str) -> None:
    """OpenAI's shape, nothing of the reason but an id, and the traceback beside that id in the log."""
    request_id = error["message"].removeprefix("The server failed to answer request ").partition(".")[0]
    assert (error["type"], error["param"], error["code"]) == ("server_error", None, "internal_error")
    assert reason not in error["message"]
    until = time.monotonic() + 30
    while reason not in (found := logged(request_id)):
        assert time.monotonic() < until, found
        time.sleep(0.1)
    assert "Traceback" in found


def test_a_value_error_of_the_tokenizer_is_a_500(client: httpx.Client) -> None:
    body = {"model": "cbtm", "messages": [{"role": "user", "content": "hello"}]}
    answer = client.post("/chat/completions", json=body)
    assert answer.status_code == 500
    check_is_defect(answer.json()["error"], "substring not found")


def test_a_value_error_of_a_model_is_a_500(client: httpx.Client) -> None:
    """Whole, streamed before anything was sent, and as the last event of a stream."""
    reason, body = "MiniMax uses cache of its own", body_of([5], model="dense")
    for stream in (False, True):
        answer = client.post("/completions", json={**body, "stream": stream})
        assert answer.status_code == 500
        assert answer.headers["X-Request-ID"] in answer.json()["error"]["message"]
        check_is_defect(answer.json()["error"], reason)
    first, last = events(client, {**body, "logprobs": None})
    assert first["choices"][0]["text"]
    check_is_defect(last["error"], reason)
