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
from cbtm_ray.merge.ensemble import Ensemble, tuned_routes
from cbtm_ray.merge.scores import ScoredHalf
from serve.app import served_routing
from serve.arguments import AppArguments
from tests.support.tiny_ensemble import make_ensemble, text_logprobs

CONFIG = EvaluateConfig(top_k=(1, 4), prefix_tokens=6, prefix_experts=2)


def held_out(ensemble: Ensemble, texts: list[np.ndarray]) -> ScoredHalf:
    scores = [
        perplexity.score_documents(model, texts, sequence_length=60, end_of_text=0, batch_tokens=1000)
        for model in ensemble.experts.values()
    ]
    embeddings_TD = np.concatenate([ensemble.embedder.prefix_embeddings(text) for text in texts])
    distances_TK = squared_distances(torch.from_numpy(embeddings_TD), ensemble.centers_KD).numpy()
    return ScoredHalf(np.array([len(text) for text in texts]), np.stack(scores, axis=1), distances_TK)


def finish_evaluation(folder: Path, results: dict[str, Any]) -> str:
    files.write_json(str(folder / "evaluation" / "results.json"), results)
    files.write_json(str(folder / "evaluation" / "manifest.json"), {})
    return str(folder)


@pytest.mark.parametrize("routing", ["embedding", "posterior", "prefix", "nearest_prefix"])
def test_every_top_k_is_served_with_the_settings_tuned_for_it(tmp_path: Path, routing: str) -> None:
    """Also those that `evaluate.top_k` leaves out of the report."""
    ensemble, random = make_ensemble(), np.random.default_rng(0)
    texts = [random.integers(1, 50, length) for length in (30, 4, 25, 40)]
    tuned = perplexity.tune(held_out(ensemble, texts), CONFIG, routing)
    assert list(tuned) == ([1, 2] if routing == "nearest_prefix" else [1, 2, 3, 4])
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


def test_an_evaluation_that_does_not_say_how_to_serve_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a finished run\. Run first: python -m jobs\.run_all"):
        served_routing(AppArguments(run_dir=str(tmp_path)))
    run_dir = finish_evaluation(tmp_path, {"rows": [], "prefix_tokens": 6})
    with pytest.raises(UserError, match=r"older version .* delete \S+/evaluation and run: python -m jobs\.evaluate_m"):
        served_routing(AppArguments(run_dir=run_dir))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"routing": "posterior"},
            r"routing='posterior' was not evaluated .* choose from prefix, nearest_prefix\. Or add",
        ),
        ({"prefix_experts": 3}, r"prefix_experts=3 was not evaluated .* Set evaluate\.prefix_experts=3, delete"),
    ],
)
def test_a_router_that_was_not_evaluated_is_refused(tmp_path: Path, arguments: Any, message: str) -> None:
    routers = {"prefix": {"1": {}, "2": {}}, "nearest_prefix": {"1": {"prefix_experts": 2.0}}}
    run_dir = finish_evaluation(tmp_path, {"routers": routers, "prefix_tokens": 6})
    with pytest.raises(UserError, match=message):
        served_routing(AppArguments(run_dir=run_dir, **arguments))


def test_readers_of_the_prefix_are_those_that_were_evaluated(tmp_path: Path) -> None:
    routers = {"prefix": {"1": {}}, "nearest_prefix": {"1": {"prefix_experts": 2.0}}}
    run_dir = finish_evaluation(tmp_path, {"routers": routers, "prefix_tokens": 6})
    assert served_routing(AppArguments(run_dir=run_dir)) == "prefix"
    assert served_routing(AppArguments(run_dir=run_dir, prefix_experts=2)) == "nearest_prefix"
    assert tuned_routes(run_dir, "nearest_prefix")[1].settings["prefix_experts"] == 2
