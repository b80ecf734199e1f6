"""Sequences side by side give what they give alone; they join, leave and reroute."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cbtm_ray.decode.engine import PROMPT_TOKENS, Engine, generate
from cbtm_ray.decode.sampling import Sampling
from cbtm_ray.decode.sequence import Request, remaining
from cbtm_ray.errors import UserError
from tests.support.tiny_ensemble import drain, make_ensemble, make_request, tokens_of, with_experts

PROMPTS = [[3, 4, 5], [7] * 30, [], [9, 8, 7, 6, 5, 4, 3, 2], [11, 12], [30, 31, 32, 33, 34, 35, 36]]


def mixed_requests() -> list[Request]:
    """Different lengths, strategies, settings and numbers of experts."""
    strategies = ["lockstep", "ancestral", "speculative"] * 2
    return [
        make_request(
            prompt,
            strategy=strategy,
            max_tokens=4 + 3 * index,
            top_k=1 + index % 3,
            sampling=Sampling(seed=index, temperature=1.0 if strategy == "ancestral" else 0.2 * index),
        )
        for index, (prompt, strategy) in enumerate(zip(PROMPTS, strategies, strict=True))
    ]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "opt"])
def test_a_batch_gives_what_each_gives_alone(architecture: str) -> None:
    """With room for three at a time, and slots that earlier sequences have left in pieces."""
    ensemble, requests = make_ensemble(architecture=architecture), mixed_requests()
    alone = [list(generate(ensemble, request)) for request in requests]
    together = drain(Engine(ensemble, max_sequences=3, cache_tokens=75), requests)
    for ours, theirs in zip(together, alone, strict=True):
        assert [step.token for step in ours] == [step.token for step in theirs]
        assert [step.finish_reason for step in ours] == [step.finish_reason for step in theirs]
        np.testing.assert_allclose([s.weights_K for s in ours], [s.weights_K for s in theirs], atol=1e-5)


def test_a_long_prompt_does_not_hold_up_the_others() -> None:
    ensemble = make_ensemble()
    engine = Engine(ensemble, max_sequences=2, cache_tokens=2000)
    long = engine.add(make_request([5] * (3 * PROMPT_TOKENS), max_tokens=1, sampling=Sampling(temperature=0)))
    short = engine.add(make_request([6], max_tokens=8, sampling=Sampling(temperature=0), strategy="lockstep"))
    order: list[int] = []
    while long not in order:
        order += [number for number, _ in engine.step()]
    assert order.count(short) >= 3


def test_an_expert_that_few_wait_for_gets_its_turn() -> None:
    """Seven sequences of one expert, and one of another, which keep them: it goes on too, if not at every step."""
    ensemble = make_ensemble()
    ensemble.routes[1].settings["reread_cost"] = 1000.0
    wanted = make_request([], max_tokens=60, top_k=1, sampling=Sampling(temperature=0), strategy="lockstep")
    requests = {}
    for token in range(1, 50):
        request = replace(wanted, prompt=[token] * 20)
        requests[next(generate(ensemble, request)).expert] = request
    common, rare = list(requests.values())[:2]
    engine = Engine(ensemble, max_sequences=8, cache_tokens=1000)
    for _ in range(7):
        engine.add(common)
    lonely = engine.add(rare)
    order = [[number for number, _ in engine.step()] for _ in range(40)]
    turns = [step for step, numbers in enumerate(order) if lonely in numbers]
    assert len(turns) >= 4
    assert turns[0] < 20  # its prompt takes longer to read than the others' tokens
    assert max(np.diff(turns)) <= 9


@pytest.mark.parametrize("n_experts", [3, 8])
def test_a_pass_is_for_many(n_experts: int) -> None:
    """More tokens to a step in the mean than if at every step one expert read for those that had drawn it."""
    engine = Engine(make_ensemble(n_experts), max_sequences=12, cache_tokens=1000)
    for seed in range(12):
        engine.add(make_request([6], max_tokens=40, top_k=3, sampling=Sampling(seed=seed), strategy="ancestral"))
    made = []
    while engine.running or engine.waiting:
        made.append(len(engine.step()))
    assert np.mean(made) > 12 / 3


def test_sequences_wait_for_room_and_leave_it_behind() -> None:
    engine = Engine(make_ensemble(), max_sequences=2, cache_tokens=40)
    request = make_request([1, 2, 3], max_tokens=12, sampling=Sampling(temperature=0))  # 15 slots
    for _ in range(3):
        engine.add(request)
    engine.step()
    assert (engine.running, engine.waiting) == (2, 1)
    large = Engine(make_ensemble(), max_sequences=9, cache_tokens=40)
    for _ in range(3):
        large.add(request)
    large.step()
    assert (large.running, large.waiting) == (2, 1)  # a third has no slots


def test_an_interrupted_text_goes_on_as_it_would_have() -> None:
    """Penalties count what was given, draws go on where they were, and the experts are those of the unbroken text: who has
    read what decides them."""
    ensemble = make_ensemble()
    assert ensemble.routes[2].reread_cost > 0
    sampling = Sampling(seed=8, temperature=0.8, presence_penalty=0.3)
    request = make_request(PROMPTS[0], strategy="lockstep", sampling=sampling, max_tokens=20)
    whole = list(generate(ensemble, request))
    assert len({tuple(np.flatnonzero(step.weights_K)) for step in whole}) > 2
    for given in range(len(whole)):
        rest = list(generate(ensemble, remaining(request, whole[:given])))
        assert [step.token for step in rest] == [step.token for step in whole[given:]]
        np.testing.assert_allclose([s.weights_K for s in rest], [s.weights_K for s in whole[given:]], atol=1e-9)


def test_an_interrupted_echo_goes_on_after_the_steps_that_were_given() -> None:
    """Breaks in the prompt, before the first new token and after it: no step is lost or comes twice."""
    ensemble = make_ensemble()
    prompt = np.random.default_rng(3).integers(1, 50, 30).tolist()
    request = make_request(prompt, strategy="lockstep", max_tokens=20, echo_logprobs=True, top_logprobs=1)
    whole = list(generate(ensemble, request))
    assert [step.token for step in whole[: len(prompt)]] == prompt
    assert len(whole) > len(prompt) + 2
    for given in range(len(whole)):
        rest = list(generate(ensemble, remaining(request, whole[:given])))
        assert [(step.token, step.in_prompt) for step in rest] == [(s.token, s.in_prompt) for s in whole[given:]]
        np.testing.assert_allclose([step.logprob for step in rest], [s.logprob for s in whole[given:]], atol=1e-5)


@pytest.mark.parametrize("strategy", ["lockstep", "ancestral", "speculative"])
@pytest.mark.parametrize(("n_prompt", "max_tokens"), [(60, 4), (63, 1), (63, 0)])
def test_a_request_may_fill_the_positions_of_the_model(strategy: str, n_prompt: int, max_tokens: int) -> None:
    """Exactly: one token more is refused, whether the model's positions or the cache's slots are fewer."""
    ensemble = make_ensemble(architecture="gpt2")  # 64 positions, each with weights of its own
    request = make_request(
        [5] * n_prompt,
        max_tokens=max_tokens,
        strategy=strategy,
        sampling=Sampling(seed=1),
        echo_logprobs=max_tokens == 0,
    )
    [steps] = drain(Engine(ensemble, max_sequences=1, cache_tokens=64), [request])
    assert (len(steps), steps[-1].finish_reason) == (max_tokens or n_prompt, "length")
    for cache_tokens, longer in ((63, request), (65, replace(request, prompt=[5] * (n_prompt + 1)))):
        with pytest.raises(UserError, match="Shorten the prompt or ask for less"):
            Engine(ensemble, max_sequences=1, cache_tokens=cache_tokens).add(longer)


def test_cancelled_sequences_leave_at_once() -> None:
    ensemble = make_ensemble()
    engine = Engine(ensemble, max_sequences=2, cache_tokens=60)
    requests = [make_request(PROMPTS[0], strategy="lockstep", sampling=Sampling(seed=s), max_tokens=20) for s in (0, 1)]
    expected = tokens_of(ensemble, PROMPTS[0], strategy="lockstep", sampling=Sampling(seed=1), max_tokens=20)
    first, second = (engine.add(request) for request in requests)
    third = engine.add(requests[0])
    tokens = [step.token for number, step in engine.step() if number == second]
    engine.cancel(first)
    engine.cancel(third)
    engine.cancel(99)
    assert (engine.running, engine.waiting) == (1, 0)
    while engine.running:
        for number, step in engine.step():
            assert number == second
            tokens.append(step.token)
    assert tokens == expected


@pytest.mark.parametrize("strategy", ["lockstep", "ancestral", "speculative"])
@pytest.mark.parametrize("prompt", [PROMPTS[0], PROMPTS[1]])
def test_experts_leave_and_come_back_while_sequences_run(strategy: str, prompt: list[int]) -> None:
    """What follows is what an ensemble gives that never had the others, for the same text so far."""
    ensemble = make_ensemble()
    engine = Engine(ensemble, max_sequences=1, cache_tokens=100)
    greedy = Sampling(temperature=0) if strategy != "ancestral" else Sampling(seed=2)
    engine.add(make_request(prompt, max_tokens=30, strategy=strategy, sampling=greedy, top_k=2))
    text = list(prompt)
    for active in ({0, 1, 2, 3}, {1, 3}, {2}, {0, 2, 3}):
        engine.set_active(active)
        before, found = list(text), []
        while len(found) < 3 and (engine.running or engine.waiting):
            found += [step for _, step in engine.step()]
        text += [step.token for step in found]
        for step in found:
            assert set(np.flatnonzero(step.weights_K)) <= active
        members = sorted(active)
        others = with_experts(ensemble, members)
        request = make_request(
            prompt, answer=before[len(prompt) :], max_tokens=30, top_k=min(2, len(members)), sampling=greedy
        )
        again = next(generate(others, request))
        np.testing.assert_allclose(found[0].weights_K[members], again.weights_K, atol=1e-5)
        if strategy != "ancestral":
            assert found[0].token == again.token


def test_prompts_are_given_as_steps_where_asked() -> None:
    ensemble, prompt = make_ensemble(), PROMPTS[3]
    request = make_request(prompt, echo_logprobs=True, top_logprobs=2, max_tokens=2, strategy="lockstep")
    steps = list(generate(ensemble, request))
    assert [step.token for step in steps[: len(prompt)]] == prompt
    assert [step.in_prompt for step in steps] == [True] * len(prompt) + [False] * (len(steps) - len(prompt))
    for step in steps:
        assert step.top_logprobs is not None
        assert step.logprob is not None
        (best, highest), (_, second) = step.top_logprobs
        assert highest >= max(second, step.logprob)
        assert (step.token == best) == (step.logprob == highest)
    assert [step.finish_reason for step in steps[:-1]] == [None] * (len(steps) - 1)


def test_experts_may_change_while_a_prompt_is_given_as_steps() -> None:
    ensemble, prompt = make_ensemble(), [index % 49 + 1 for index in range(PROMPT_TOKENS + 20)]
    engine = Engine(ensemble, max_sequences=1, cache_tokens=200)
    engine.add(make_request(prompt, echo_logprobs=True, max_tokens=0))
    steps = engine.step()
    engine.set_active({1, 2})
    while engine.running:
        steps += engine.step()
    assert [step.token for _, step in steps] == prompt
    assert steps[-1][1].finish_reason == "length"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": 1000}, "max_tokens=1000 with a prompt of 3 tokens takes 1003 .*at most 100 .cache_tokens."),
        ({"max_tokens": 3000}, "with a prompt of 3 tokens takes 3003 .*at most 2048 .max_position_embeddings."),
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        ({"max_tokens": 0, "echo_logprobs": True, "prompt": []}, "max_tokens=0 must be at least 1"),
        ({"top_k": 5}, "top_k=5 must be between 1 and 4, the numbers of experts"),
        ({"prompt": [50]}, "prompt=50 must be token ids from 0 to 49"),
        ({"strategy": "greedy"}, "strategy='greedy' must be one of lockstep, ancestral, speculative or auto"),
        ({"strategy": "ancestral", "sampling": Sampling(top_p=0.9)}, "strategy='ancestral' must be asked for without"),
        ({"strategy": "ancestral", "top_logprobs": 0}, "strategy='ancestral' must be asked for without"),
    ],
)
def test_requests_that_can_never_run_are_refused(change: dict[str, Any], message: str) -> None:
    engine = Engine(make_ensemble(), max_sequences=1, cache_tokens=100)
    with pytest.raises(UserError, match=message):
        engine.add(make_request(**({"prompt": [1, 2, 3]} | change)))
    assert engine.waiting == 0


def test_no_experts_no_room_and_windows_are_refused() -> None:
    ensemble = make_ensemble()
    engine = Engine(ensemble, max_sequences=1, cache_tokens=10)
    for experts in (set(), {4}):
        with pytest.raises(UserError, match=r"experts=\[4?\] must be some of 0 to 3"):
            engine.set_active(experts)
    with pytest.raises(UserError, match="max_sequences=0 must be at least 1"):
        Engine(ensemble, max_sequences=0, cache_tokens=10)
    with pytest.raises(UserError, match="cache_tokens=0 must be at least 1"):
        Engine(ensemble, max_sequences=1, cache_tokens=0)
    ensemble.experts[0].config.sliding_window = 8
    with pytest.raises(UserError, match="sliding_window=8 of a llama model must be null"):
        Engine(ensemble, max_sequences=1, cache_tokens=10)
