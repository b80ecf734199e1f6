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

CONFIG = EvaluateConfig(top_k=(1, 2, 5, 9))
SETTINGS = {
    "temperature": 0.5,
    "beta": 0.3,
    "gamma": 0.8,
    "legacy_d4": True,
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
        ("uniform", [5], [5]),
        ("bayes", [1, 2, 3, 4, 5], [1, 2, 5]),
    ],
)
def test_sizes_that_a_router_mixes_and_reports(routing: str, mixed: list[int], reported: list[int]) -> None:
    router = ROUTERS[routing]
    assert list(router.sizes(5)) == mixed
    assert router.reported_sizes(5, CONFIG) == reported


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

    def router(self, route: Route, active: set[int] | None = None) -> ContextRouter:
        takes_part = range(len(self.centers_KD)) if active is None else active
        return ContextRouter(route, self.embedder.context(), self.centers_KD.astype(float), takes_part, self.ngrams)


texts = st.builds(Text, st.integers(1, 6), st.integers(1, 25), st.integers(0, 10_000))


def route_of(routing: str, top_k: int, prefix_tokens: int) -> Route:
    known = {"embedding": ("temperature", "legacy_d4"), "uniform": (), "bayes": ()}
    settings = {name: SETTINGS[name] for name in known.get(routing, ("temperature", "beta", "gamma", "reread_cost"))}
    return Route(routing=routing, top_k=top_k, settings=settings, prefix_tokens=prefix_tokens)


SERVABLE = [name for name, router in ROUTERS.items() if router.servable]


@pytest.mark.parametrize("routing", SERVABLE)
@given(text=texts, data=st.data())
def test_weights_of_a_growing_text_are_those_of_the_batch(routing: str, text: Text, data: st.DataObject) -> None:
    """An expert that is not `running` has no weight."""
    route = route_of(routing, data.draw(st.integers(1, len(text.centers_KD))), 1)
    router, found_TK = text.router(route), []
    for token in text.tokens.tolist():
        assert set(np.flatnonzero(router.weights())) == set(router.running)
        found_TK.append(router.weights())
        router.append([token])
    np.testing.assert_allclose(found_TK, route.weights(text.held_out), atol=1e-5)


@pytest.mark.parametrize("routing", SERVABLE)
@given(text=texts, cut=st.integers(0, 12))
def test_tokens_that_come_together_give_the_same_weights(routing: str, text: Text, cut: int) -> None:
    """Of a prompt, where no expert reads before its end."""
    route = route_of(routing, 1, 1)
    route.settings.pop("reread_cost", None)
    router, tokens = text.router(route), text.tokens.tolist()[:-1]
    for part in (tokens[:cut], tokens[cut:]):
        router.append(part)
    np.testing.assert_allclose(router.weights(), route.weights(text.held_out)[-1], atol=1e-5)


def test_an_expert_that_is_out_is_left_out() -> None:
    text = Text(4, 12, seed=1)
    route = route_of("ngram", 2, 1)
    whole = text.router(route)
    whole.append(text.tokens.tolist())
    best = int(whole.weights().argmax())
    rest = text.router(route, active=set(range(4)) - {best})
    rest.append(text.tokens.tolist())
    assert best not in rest.running
    assert rest.weights().sum() == pytest.approx(1)
    assert len(rest.running) == 2
