"""Routers: what they can mix and report, and their weights token by token beside those of a whole batch."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cbtm_ray.cluster.embed import TokenTfidf
from cbtm_ray.cluster.shard_steps import squared_distances
from cbtm_ray.config import EvaluateConfig, Routing
from cbtm_ray.merge.context_router import ContextRouter
from cbtm_ray.merge.routers import ROUTERS, Route
from cbtm_ray.merge.scores import ScoredHalf
from tests.support.tiny_ensemble import make_ngrams

CONFIG = EvaluateConfig(top_k=(1, 2, 5, 9), prefix_experts=2)
SETTINGS = {
    "temperature": 0.5,
    "beta": 0.3,
    "gamma": 0.8,
    "legacy_d4": True,
    "prefix_experts": 2.0,
    "reread_cost": 0.02,
}


def test_every_router_can_be_asked_for() -> None:
    assert set(get_args(Routing)) == set(ROUTERS)


@pytest.mark.parametrize(
    ("routing", "mixed", "reported"),
    [
        ("embedding", [1, 2, 3, 4, 5], [1, 2, 5]),
        ("ngram", [1, 2, 3, 4, 5], [1, 2, 5]),
        ("posterior", [1, 2, 3, 4, 5], [1, 2, 5]),
        ("prefix", [1, 2, 3, 4, 5], [1, 2]),  # with all experts it is posterior routing
        ("nearest_prefix", [1, 2], [1, 2]),  # only its two readers can be held
        ("uniform", [5], [5]),
        ("bayes", [1, 2, 3, 4, 5], [1, 2, 5]),
    ],
)
def test_sizes_that_a_router_mixes_and_reports(routing: str, mixed: list[int], reported: list[int]) -> None:
    router = ROUTERS[routing]
    assert list(router.sizes(5, CONFIG)) == mixed
    assert router.reported_sizes(5, CONFIG) == reported
    assert list(router.sizes(5, EvaluateConfig())) == (mixed if routing != "nearest_prefix" else [])


class Text:
    """A text, what the experts think of it, and how far it is from their clusters' centers."""

    def __init__(self, n_experts: int, n_tokens: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.embedder = TokenTfidf(random.normal(size=(20, 3)))
        self.centers_KD = random.normal(size=(n_experts, 3)).astype(np.float32)
        self.tokens = random.integers(0, 20, n_tokens)
        self.logprobs_TK = -random.exponential(2, (n_tokens, n_experts)).astype(np.float32)
        contexts_TD = torch.from_numpy(self.embedder.prefix_embeddings(self.tokens))
        distances_TK = squared_distances(contexts_TD, torch.from_numpy(self.centers_KD)).numpy()
        self.ngrams = make_ngrams(n_experts, 20, seed)
        ngrams_TK = self.ngrams.evidence(self.tokens)
        self.held_out = ScoredHalf(np.array([n_tokens]), self.logprobs_TK, distances_TK, ngrams_TK)

    def router(self, route: Route) -> ContextRouter:
        active = range(len(self.centers_KD))
        return ContextRouter(route, self.embedder.context(), self.centers_KD.astype(float), active, self.ngrams)

    def observe(self, router: ContextRouter) -> None:
        """What the running experts, and only they, think of the text so far."""
        router.observe({expert: self.logprobs_TK[: router.length, expert].tolist() for expert in router.running})


texts = st.builds(Text, st.integers(1, 6), st.integers(1, 25), st.integers(0, 10_000))


def route_of(routing: str, top_k: int, prefix_tokens: int) -> Route:
    known = {"embedding": ("temperature", "legacy_d4"), "uniform": (), "bayes": ()}
    settings = {
        name: SETTINGS[name]
        for name in known.get(routing, ("temperature", "beta", "gamma", "prefix_experts", "reread_cost"))
    }
    return Route(routing=routing, top_k=top_k, settings=settings, prefix_tokens=prefix_tokens)


@pytest.mark.parametrize("routing", list(ROUTERS))
@given(text=texts, prefix_tokens=st.integers(1, 12), data=st.data())
def test_weights_of_a_growing_text_are_those_of_the_batch(
    routing: str, text: Text, prefix_tokens: int, data: st.DataObject
) -> None:
    """Where all evidence is observed at once; an expert that is not `running` has no weight and need not be asked."""
    n_experts = len(text.centers_KD)
    top_k = data.draw(st.integers(1, min(n_experts, 2) if routing == "nearest_prefix" else n_experts))
    route = route_of(routing, top_k, prefix_tokens)
    router, found_TK = text.router(route), []
    for token in text.tokens.tolist():
        if router.due(1):
            text.observe(router)
        assert set(np.flatnonzero(router.weights())) <= set(router.running)
        found_TK.append(router.weights())
        router.append([token])
    np.testing.assert_allclose(found_TK, route.weights(text.held_out), atol=1e-5)


@pytest.mark.parametrize("routing", list(ROUTERS))
@given(text=texts, prefix_tokens=st.integers(1, 12), most=st.integers(1, 9))
def test_evidence_that_comes_in_pieces_gives_the_same_weights(
    routing: str, text: Text, prefix_tokens: int, most: int
) -> None:
    """Late, but taken in up to the end: also where other experts ran meanwhile. (What an expert has read depends on them.)"""
    route = route_of(routing, 1, prefix_tokens)
    route.settings.pop("reread_cost", None)
    router, tokens = text.router(route), text.tokens.tolist()
    for token in tokens[:-1]:
        if router.due(most):
            text.observe(router)
        router.append([token])
    if router.due(1):
        text.observe(router)
    np.testing.assert_allclose(router.weights(), route.weights(text.held_out)[-1], atol=1e-5)


@pytest.mark.parametrize(
    ("routing", "runs"), [("embedding", 2), ("posterior", 5), ("prefix", 5), ("nearest_prefix", 2)]
)
def test_as_many_experts_run_as_the_router_needs(routing: str, runs: int) -> None:
    """In the prefix, and after it."""
    text = Text(5, 12, seed=3)
    route = route_of(routing, 2, prefix_tokens=4)
    router = text.router(route)
    router.append(text.tokens[:4].tolist())
    assert len(router.running) == runs
    if router.due(1):
        text.observe(router)
    assert len(router.running) == (2 if route.held_after else runs)
    assert not router.due(1)


def test_an_expert_that_comes_near_has_its_evidence_asked_for_at_once() -> None:
    """Without it, it would be weighed as if it had thought every token certain."""
    text = Text(3, 12, seed=0)
    text.embedder, text.tokens = TokenTfidf(np.eye(2)), np.array([0] * 4 + [1] * 8)
    text.centers_KD = np.array([[0.7, 0.7], [1, 0], [0, 1]], np.float32)
    router = text.router(route_of("nearest_prefix", 2, prefix_tokens=100))
    router.append(text.tokens[:4].tolist())
    assert router.running == [0, 1]
    text.observe(router)
    router.append([1, 1])
    assert (router.running, router.due(3), router.due(2)) == ([0, 1], False, True)
    router.append(text.tokens[6:].tolist())
    assert (router.running, router.due(1000)) == ([0, 2], True)
    text.observe(router)
    assert not router.due(1)
