"""What is served is what the evaluation tuned for each router and top_k, or refused by a line that says what is missing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cbtm_ray import files
from cbtm_ray.cluster.shard_steps import squared_distances
from cbtm_ray.config import EvaluateConfig
from cbtm_ray.errors import UserError
from cbtm_ray.evaluate import perplexity
from cbtm_ray.evaluate.mixture_rows import mark_served
from cbtm_ray.merge.ensemble import Ensemble, servable_routers, served_route, tuned_routes
from cbtm_ray.merge.routers import Route
from cbtm_ray.merge.scores import ScoredHalf
from serve.app import build
from serve.arguments import AppArguments
from tests.support.tiny_ensemble import make_ensemble, text_logprobs

CONFIG = EvaluateConfig(top_k=(1, 4), prefix_tokens=6)


def held_out(ensemble: Ensemble, texts: list[np.ndarray]) -> ScoredHalf:
    scores = [
        perplexity.score_documents(model, texts, sequence_length=60, end_of_text=0, batch_tokens=1000)
        for model in ensemble.experts.values()
    ]
    embeddings_TD = np.concatenate([ensemble.embedder.prefix_embeddings(text) for text in texts])
    distances_TK = squared_distances(torch.from_numpy(embeddings_TD), ensemble.centers_KD).numpy()
    assert ensemble.ngrams is not None
    ngrams_TK = np.concatenate([ensemble.ngrams.evidence(text) for text in texts])
    return ScoredHalf(np.array([len(text) for text in texts]), np.stack(scores, axis=1), distances_TK, ngrams_TK)


def finish_evaluation(folder: Path, results: dict[str, Any]) -> str:
    files.write_json(str(folder / "evaluation" / "results.json"), results)
    files.write_json(str(folder / "evaluation" / "manifest.json"), {})
    return str(folder)


@pytest.mark.parametrize("routing", ["embedding", "ngram"])
def test_every_top_k_is_served_with_the_settings_tuned_for_it(tmp_path: Path, routing: str) -> None:
    """Also those that `evaluate.top_k` leaves out of the report."""
    ensemble, random = make_ensemble(), np.random.default_rng(0)
    texts = [random.integers(1, 50, length) for length in (30, 4, 25, 40)]
    tuned = perplexity.tune(held_out(ensemble, texts), CONFIG, routing)
    assert list(tuned) == [1, 2, 3, 4]
    routers = {routing: {str(top_k): route.settings for top_k, route in tuned.items()}}
    run_dir = finish_evaluation(tmp_path, {"routers": routers, "prefix_tokens": 6})
    served = dataclasses.replace(ensemble, routes=tuned_routes(run_dir, routing))
    text = random.integers(1, 50, 20)
    for top_k, route in tuned.items():
        expected_T = perplexity.mixture_logprobs(held_out(ensemble, [text]), route)
        np.testing.assert_allclose(text_logprobs(served, text.tolist(), top_k=top_k), expected_T, atol=1e-4)
    with pytest.raises(UserError, match=rf"top_k=5 must be between 1 and {max(tuned)}, the numbers of experts"):
        text_logprobs(served, [1, 2], top_k=5)


def test_prefix_routing_of_all_experts_is_tuned_as_posterior_routing() -> None:
    ensemble, random = make_ensemble(), np.random.default_rng(1)
    given = held_out(ensemble, [random.integers(1, 50, length) for length in (30, 4, 25, 40)])
    prefix, posterior = (perplexity.tune(given, CONFIG, routing) for routing in ("prefix", "posterior"))
    assert prefix[4].settings == posterior[4].settings
    assert any(prefix[top_k].settings != posterior[top_k].settings for top_k in (1, 2, 3))


OF_NGRAMS = {"beta": 0.3, "reread_cost": 0.1}
ROUTERS = {"posterior": {"1": {}}, "embedding": {"1": {"temperature": 1.0}, "2": {}}, "ngram": {"1": OF_NGRAMS}}
ROWS = [
    {"routing": "posterior", "top_k": 1, "chosen": True},
    {"routing": "embedding", "top_k": 1},
    {"routing": "ngram", "top_k": 1, "served": True},
]


def test_a_run_is_served_by_the_row_that_its_evaluation_marks(tmp_path: Path) -> None:
    run_dir = finish_evaluation(tmp_path, {"rows": ROWS, "routers": ROUTERS, "prefix_tokens": 6})
    assert served_route(run_dir) == Route(routing="ngram", top_k=1, settings=OF_NGRAMS, prefix_tokens=6)
    assert list(servable_routers(run_dir)) == ["embedding", "ngram"]


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({"rows": []}, r"older version .* delete \S+/evaluation and run: python -m jobs\.evaluate_m"),
        (
            {"rows": ROWS[:2], "routers": ROUTERS},
            r"older version .* delete \S+/evaluation and run: python -m jobs\.eva",
        ),
        (
            {"rows": ROWS, "routers": ROUTERS | {"nearest_prefix": {"1": {}}}},  # a router that there is no more
            r"older version .* delete \S+/evaluation and run: python -m jobs\.eva",
        ),
        (
            {"rows": ROWS[:1], "routers": {"posterior": {}, "prefix": {}}},
            r"none of its routers \(posterior, prefix\) can be served\. Add 'ngram' to evaluate\.routings, delete",
        ),
    ],
)
def test_an_evaluation_that_does_not_say_how_to_serve_it_is_refused(
    tmp_path: Path, results: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=r"is not a finished run\. Run first: python -m jobs\.run_all"):
        build(AppArguments(run_dir=str(tmp_path)))
    run_dir = finish_evaluation(tmp_path, {"prefix_tokens": 6, **results})
    with pytest.raises(UserError, match=message):
        build(AppArguments(run_dir=run_dir))


@pytest.mark.parametrize(
    ("routing", "message"),
    [
        ("uniform", r"routing='uniform' was not evaluated .* choose from embedding, ngram\. Or add it to evaluate\.r"),
        (
            "prefix",
            r"routing='prefix' cannot be served, for it needs every expert's .* choose from embedding, ngram\.$",
        ),
    ],
)
def test_a_router_that_cannot_be_served_is_refused(tmp_path: Path, routing: str, message: str) -> None:
    run_dir = finish_evaluation(tmp_path, {"rows": ROWS, "routers": ROUTERS, "prefix_tokens": 6})
    with pytest.raises(UserError, match=message):
        build(AppArguments(run_dir=run_dir, routing=routing))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([("posterior", 1, 1.0), ("embedding", 1, 3.0), ("ngram", 1, 2.0), ("ngram", 4, 1.5)], 2),
        ([("posterior", 2, 1.0), ("ngram", 2, 2.5), ("embedding", 2, 2.0), ("ngram", 4, 1.5)], 2),
        ([("posterior", 1, 1.0), ("bayes", 1, 1.0)], None),
    ],
)
def test_the_row_that_is_served_has_fewest_experts_and_then_least_loss(
    rows: list[tuple[str, int, float]], expected: int | None
) -> None:
    """Of the routers that can be served; none where there is no such router."""
    found: list[Any] = [{"routing": name, "top_k": top_k, "tuning_loss_nats": loss} for name, top_k, loss in rows]
    routes = [Route(routing=name, top_k=top_k, settings={}, prefix_tokens=6) for name, top_k, _ in rows]
    mark_served(found, routes)
    assert [row.get("served", False) for row in found] == [index == expected for index in range(len(rows))]
