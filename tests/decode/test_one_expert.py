"""One expert at a time, in engines that know no router: the text is the one that our engine decodes with one expert."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from cbtm_ray.decode.engine import generate
from cbtm_ray.decode.one_expert import ExpertRequest, ExpertTokens, RoutedText, unlike_one_expert
from cbtm_ray.decode.sampling import Sampling
from cbtm_ray.decode.sequence import Request, Step
from cbtm_ray.merge.ensemble import Ensemble, ensemble_of_one
from tests.support.tiny_ensemble import make_ensemble, make_request

ENSEMBLE = make_ensemble()
PROMPT = [7, 3, 9, 22, 41]


def expert_engine(ensemble: Ensemble, asked: ExpertRequest) -> Iterator[ExpertTokens]:
    """What an engine with this expert alone gives, in messages of `message_tokens`."""
    alone = ensemble_of_one(ensemble, {0: ensemble.experts[asked.expert]}, ensemble.model_config)
    request = make_request(
        asked.token_ids[1:], max_tokens=asked.max_tokens, top_k=1, sampling=asked.sampling, strategy="lockstep",
        top_logprobs=asked.top_logprobs,
    )  # fmt: skip
    steps = generate(alone, request)
    while message := list(islice(steps, asked.message_tokens)):
        yield ExpertTokens(
            token_ids=[step.token for step in message],
            logprobs=[step.logprob or 0.0 for step in message],
            top_logprobs=[step.top_logprobs or [] for step in message],
            finish_reason=message[-1].finish_reason,
        )


def decode(ensemble: Ensemble, request: Request, message_tokens: int, lost_after: int | None = None) -> list[Step]:
    """As a gateway does it. The engine is lost once, after so many messages."""
    text, found, messages = RoutedText(ensemble, request, {0, 1, 2, 3}, message_tokens=message_tokens), list[Step](), 0
    asked = text.next_request()
    while True:
        goes_on = True
        for tokens in expert_engine(ensemble, asked):
            if messages == lost_after:
                break
            messages += 1
            steps, goes_on = text.take(tokens)
            found += steps
            if found and found[-1].finish_reason:
                return found
            if not goes_on:
                break
        asked = text.next_request() if messages != lost_after or not goes_on else text.repeated_request()
        lost_after = None if messages == lost_after else lost_after


def test_messages_join() -> None:
    first = ExpertTokens(token_ids=[1], logprobs=[-1.0], top_logprobs=[[(1, -1.0)]], cached_tokens=3)
    second = ExpertTokens(token_ids=[2, 3], logprobs=[-2.0, -3.0], top_logprobs=[[], []], finish_reason="stop")
    assert first.followed_by(second) == ExpertTokens(
        token_ids=[1, 2, 3], logprobs=[-1.0, -2.0, -3.0], top_logprobs=[[(1, -1.0)], [], []], finish_reason="stop",
        cached_tokens=3,
    )  # fmt: skip


@settings(max_examples=20)
@given(message_tokens=some.integers(1, 9), prompt=some.lists(some.integers(1, 49), max_size=12))
def test_greedy_text_is_that_of_our_engine(message_tokens: int, prompt: list[int]) -> None:
    """Whatever the messages' size, over changes of expert, with the same experts and log-probabilities."""
    request = make_request(
        prompt, top_k=1, max_tokens=30, sampling=Sampling(temperature=0), strategy="lockstep", top_logprobs=3
    )
    ours, routed = list(generate(ENSEMBLE, request)), decode(ENSEMBLE, request, message_tokens)
    assert [step.token for step in routed] == [step.token for step in ours]
    assert [step.expert for step in routed] == [step.expert for step in ours]
    assert routed[-1].finish_reason == ours[-1].finish_reason
    for one, other in zip(routed, ours, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert dict(one.top_logprobs or []) == pytest.approx(dict(other.top_logprobs or []), abs=1e-4)
        assert (one.weights_K == other.weights_K).all()


def test_these_texts_change_their_expert() -> None:
    request = make_request(PROMPT, top_k=1, max_tokens=30, sampling=Sampling(temperature=0), strategy="lockstep")
    assert len({step.expert for step in decode(ENSEMBLE, request, 4)}) > 1


@pytest.mark.parametrize("lost_after", [0, 1, 2, 5])
@pytest.mark.parametrize("sampling", [Sampling(seed=5, temperature=0.9), Sampling(temperature=0)])
def test_text_is_the_same_when_an_engine_is_lost(sampling: Sampling, lost_after: int) -> None:
    request = make_request(PROMPT, top_k=1, max_tokens=30, sampling=sampling)
    whole = [step.token for step in decode(ENSEMBLE, request, 3)]
    assert [step.token for step in decode(ENSEMBLE, request, 3, lost_after)] == whole


def test_what_was_sent_stands_when_another_engine_draws_otherwise() -> None:
    """Rounded otherwise, say: the text goes on after the tokens that the client has."""
    request = make_request(PROMPT, top_k=1, max_tokens=30, sampling=Sampling(seed=5))
    text = RoutedText(ENSEMBLE, request, {2}, message_tokens=1)
    text.next_request()
    text.take(ExpertTokens(token_ids=[4, 5]))
    assert text.repeated_request().token_ids == [0, *PROMPT]
    assert text.take(ExpertTokens(token_ids=[4, 6])) == ([], False)
    again = text.next_request()
    assert again.token_ids == [0, *PROMPT, 4, 5]
    assert again.max_tokens == 28
    assert again.sampling.seed not in (5, None)


def test_seeds_differ_after_a_change_of_expert() -> None:
    """An engine draws a request's tokens from its seed on: the same numbers must not come twice in a text."""
    text = RoutedText(ENSEMBLE, make_request(PROMPT, top_k=1, sampling=Sampling(seed=5)), {2}, message_tokens=1)
    seeds = [text.next_request().sampling.seed]
    for token in (4, 5):
        text.take(ExpertTokens(token_ids=[token]))
        seeds.append(text.next_request().sampling.seed)
    assert seeds[0] == 5
    assert len(set(seeds)) == 3
    unseeded = make_request(PROMPT, top_k=1, sampling=Sampling(seed=None), answer=[1])
    assert RoutedText(ENSEMBLE, unseeded, {2}, message_tokens=1).next_request().sampling.seed is None


def test_an_expert_that_is_taken_out_answers_no_more() -> None:
    text = RoutedText(ENSEMBLE, make_request(PROMPT, top_k=1), {0, 1, 2, 3}, message_tokens=1)
    first = text.expert
    text.reroute({0, 1, 2, 3} - {first})
    assert text.next_request().expert == text.expert != first


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"top_k": 2}, "top_k=2"),
        ({"echo_logprobs": True}, "echo=True"),
        ({"sampling": Sampling(frequency_penalty=0.5)}, "frequency_penalty=0.5"),
        ({"sampling": Sampling(presence_penalty=-1)}, "presence_penalty=-1"),
        ({"sampling": Sampling(temperature=0.001)}, "temperature=0.001"),
        ({"max_tokens": 60}, "max_tokens=60"),
    ],
)
def test_what_needs_more_is_named(change: dict[str, object], field: str) -> None:
    request = make_request(PROMPT, top_k=1)
    assert unlike_one_expert(request, 64) is None
    assert unlike_one_expert(replace(request, max_tokens=58), 64) is None
    reason = unlike_one_expert(replace(request, **change), 64)  # type: ignore[arg-type]
    assert reason is not None
    assert reason.startswith(field)
