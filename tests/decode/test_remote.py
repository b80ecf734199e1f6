"""Experts in two places give what they give in one; caches of texts and weights are only caches."""

from __future__ import annotations

import asyncio
import dataclasses
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cbtm_ray.decode.engine import Engine
from cbtm_ray.decode.remote import RemoteScorer, ScoreRequest
from cbtm_ray.decode.sampling import Sampling
from cbtm_ray.decode.sequence import Request
from cbtm_ray.errors import UserError
from cbtm_ray.merge import paging
from cbtm_ray.merge.ensemble import Ensemble
from cbtm_ray.merge.paging import PagedExperts
from cbtm_ray.models import load_model
from serve.remote_experts import RemoteServer
from tests.support.tiny_ensemble import drain, make_ensemble, make_request, text_logprobs, tokens_of

PROMPTS = [[3, 4, 5], [7] * 30, [9, 8, 7, 6, 5, 4, 3, 2], [11, 12]]


def part_of(ensemble: Ensemble, clusters: list[int]) -> Ensemble:
    return dataclasses.replace(ensemble, experts={k: ensemble.experts[k] for k in clusters})


class Other:
    """A second place, whose answers come from another thread."""

    def __init__(self, ensemble: Ensemble, cache_tokens: int = 200) -> None:
        self.scorer, self.thread, self.n_requests = RemoteScorer(ensemble, cache_tokens), ThreadPoolExecutor(1), 0

    def ask(self, requests: list[ScoreRequest]) -> list[Future[Tensor]]:
        self.n_requests += len(requests)
        return [self.thread.submit(lambda one=one: self.scorer.score([one])[0]) for one in requests]


def requests(**changes: object) -> list[Request]:
    return [make_request(prompt, max_tokens=14, **changes) for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("strategy", "routing"),
    [
        ("lockstep", "ngram"),
        ("ancestral", "ngram"),
        ("speculative", "ngram"),
        ("ancestral", "embedding"),
    ],
)
def test_experts_in_two_places_give_what_they_give_in_one(strategy: str, routing: str) -> None:
    ensemble = make_ensemble(routing=routing)
    asked = requests(strategy=strategy, sampling=Sampling(seed=3))
    for here, there in (([0, 1], [2, 3]), ([2], [0, 1, 3])):
        other = Other(part_of(ensemble, there))
        engine = Engine(part_of(ensemble, here), max_sequences=3, cache_tokens=150, remote=other.ask)
        found = drain(engine, asked)
        whole = drain(Engine(ensemble, max_sequences=3, cache_tokens=150), asked)
        assert [[step.token for step in steps] for steps in found] == [
            [step.token for step in steps] for steps in whole
        ]
        assert other.n_requests > 0


def test_an_echo_over_two_places_has_the_same_logprobs() -> None:
    ensemble, text = make_ensemble(), [5, 9, 3, 7, 11, 2, 8, 6, 4, 30, 12]
    other = Other(part_of(ensemble, [1, 2]))
    engine = Engine(part_of(ensemble, [0, 3]), max_sequences=1, cache_tokens=50, remote=other.ask)
    [steps] = drain(engine, [make_request(text, max_tokens=0, echo_logprobs=True)])
    np.testing.assert_allclose([step.logprob for step in steps], text_logprobs(ensemble, text), atol=1e-5)


def test_a_sequence_whose_remote_expert_is_lost_fails_alone() -> None:
    ensemble = make_ensemble()

    def lost(requests: list[ScoreRequest]) -> list[Future[Tensor]]:
        answers = [Future[Tensor]() for _ in requests]
        for answer in answers:
            answer.set_exception(ConnectionError("gone"))
        return answers

    request = make_request([1, 2, 3], top_k=1, sampling=Sampling(temperature=0), max_tokens=4)
    [alone] = drain(Engine(ensemble, max_sequences=1, cache_tokens=50), [request])
    here = sorted({step.expert for step in alone})
    engine = Engine(part_of(ensemble, here), max_sequences=2, cache_tokens=100, remote=lost)
    bad = engine.add(dataclasses.replace(request, top_k=4))
    good = engine.add(request)
    tokens = 0
    while engine.running or engine.waiting:
        found = engine.step()
        assert all(number == good for number, _ in found)
        tokens += len(found)
    assert tokens > 0
    [(failed, problem)] = engine.failed
    assert (failed, str(problem)) == (bad, "gone")


def test_cached_sequences_are_only_a_cache() -> None:
    """Room for two texts; what came back changed, or was put out, is read anew."""
    ensemble = make_ensemble()
    scorer, plain = RemoteScorer(ensemble, 20), RemoteScorer(ensemble, 100)
    texts = {"a": [0, 5, 6, 7, 8, 9], "b": [0, 1, 2, 3], "c": [0] * 12, "d": [0, 30, 31, 32]}
    for round_ in range(3):
        for key, text in texts.items():
            grown = [*text[:-1], *range(10 + round_, 13 + round_)]
            request = ScoreRequest(1, grown, len(grown) - 2, key)
            [found] = scorer.score([request])
            [expected] = plain.score([dataclasses.replace(request, key=f"{key}{round_}", start=0)])
            torch.testing.assert_close(found, expected[-2:], atol=1e-4, rtol=0)
    together = [ScoreRequest(2, [*text, 4], 0, key) for key, text in texts.items()]  # more than there is room for
    for found, request in zip(scorer.score(together), together, strict=True):
        torch.testing.assert_close(found, plain.score([dataclasses.replace(request, key="")])[0], atol=1e-4, rtol=0)
    with pytest.raises(UserError, match="cache_tokens=20 must be at least 21, the tokens of a text"):
        scorer.score([ScoreRequest(0, [0] * 21, 0, "long")])


def fail(*_: object) -> None:
    raise ValueError("the model has failed")


def test_a_text_whose_read_failed_is_read_again() -> None:
    ensemble, text = make_ensemble(), [0, 5, 6, 7, 8]
    scorer = RemoteScorer(ensemble, 20)
    hook = ensemble.experts[1].register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="the model has failed"):
        scorer.score([ScoreRequest(1, text, 0, "a")])
    hook.remove()
    [found] = scorer.score([ScoreRequest(1, [*text, 9], 5, "a")])
    [expected] = RemoteScorer(ensemble, 20).score([ScoreRequest(1, [*text, 9], 5, "a")])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_a_read_that_fails_fails_alone() -> None:
    """One caller's text is too long, another's expert is broken; the others, and whoever comes later, are answered."""
    ensemble = make_ensemble()
    texts = {
        "good": ScoreRequest(0, [0, 5, 6], 0, "good"),
        "long": ScoreRequest(0, [0] * 21, 0, "long"),
        "broken": ScoreRequest(1, [0, 5, 6], 0, "broken"),
        "also good": ScoreRequest(2, [0, 7], 0, "also good"),
    }

    async def answers() -> list[list[object]]:
        answering = RemoteServer(RemoteScorer(ensemble, 20))
        loop, hook = asyncio.create_task(answering.run()), ensemble.experts[1].register_forward_pre_hook(fail)
        found = []
        for _ in range(2):
            reading = [answering.read([read]) for read in texts.values()]
            async with asyncio.timeout(60):
                found.append(await asyncio.gather(*reading, return_exceptions=True))
            hook.remove()
        loop.cancel()
        return found

    first, second = (dict(zip(texts, found, strict=True)) for found in asyncio.run(answers()))
    assert isinstance(first["long"], UserError)
    assert isinstance(second["long"], UserError)
    assert repr(first["broken"]) == "ValueError('the model has failed')"
    plain = RemoteScorer(ensemble, 100)
    for name, found in [("good", first), ("also good", first), ("good", second), ("broken", second)]:
        torch.testing.assert_close(found[name], plain.score([texts[name]]), atol=1e-4, rtol=0)


def save_experts(ensemble: Ensemble, folder: Path) -> dict[int, str]:
    for cluster, model in ensemble.experts.items():
        model.save_pretrained(folder / str(cluster))
    return {cluster: str(folder / str(cluster)) for cluster in ensemble.experts}


def test_only_what_reads_a_text_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine, and each request that it takes, must know vocabulary and positions; for that no weights are loaded."""
    ensemble, loaded = make_ensemble(), list[str]()
    folders = save_experts(ensemble, tmp_path)
    monkeypatch.setattr(paging, "load_model", lambda folder: (loaded.append(folder), load_model(folder))[1])
    experts = PagedExperts(folders, resident=1)
    engine = Engine(dataclasses.replace(ensemble, experts=experts), max_sequences=2, cache_tokens=50)
    engine.set_active({1})
    for _ in range(3):
        drain(engine, [make_request([1, 2, 3], top_k=1)])
    assert loaded == [folders[0], folders[1]]  # the first one when the engine begins


def test_experts_that_do_not_fit_are_paged(tmp_path: Path) -> None:
    ensemble = make_ensemble()
    experts = PagedExperts(save_experts(ensemble, tmp_path), resident=2)
    assert experts.loaded == [0, 1]
    experts[0], experts[3]
    assert experts.loaded == [0, 3]
    paged = dataclasses.replace(ensemble, experts=experts)
    [found] = drain(Engine(paged, max_sequences=1, cache_tokens=50), [make_request([1, 2, 3], top_k=3)])
    assert [step.token for step in found] == tokens_of(ensemble, [1, 2, 3], top_k=3)
    assert len(experts.loaded) == 2
