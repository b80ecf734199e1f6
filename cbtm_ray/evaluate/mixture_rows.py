"""The rows of a system with experts: every router tuned, and measured on the reported documents."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from cbtm_ray.config import EvaluateConfig
from cbtm_ray.evaluate import perplexity
from cbtm_ray.evaluate.result_rows import ORACLE, DomainSummary, ResultRow, Trained
from cbtm_ray.evaluate.systems import Measured
from cbtm_ray.manifests import ModelManifest
from cbtm_ray.merge.routers import ROUTERS, Route

Summarize: TypeAlias = Callable[[np.ndarray], DomainSummary]
"""A summary of the log-probabilities of the reported tokens."""


@dataclass(frozen=True)
class Mixtures:
    """A system's mixtures: tuned on one half of the documents, measured on the other."""

    measured: Measured
    routers: dict[str, dict[int, Route]]
    """Every router by name and top_k, tuned for it."""
    routes: list[Route]
    """The routes that are reported."""
    rows: list[ResultRow]
    """One a route."""
    oracle: ResultRow


def mix(measured: Measured, config: EvaluateConfig, models: dict[str, ModelManifest], summarize: Summarize) -> Mixtures:
    """Every router of a system tuned for every top_k, and the rows of those that are reported."""
    manifests = [models[name] for name in measured.system.experts]
    tuned = {routing: perplexity.tune(measured.tuning, config, routing) for routing in measured.system.routings}
    routers = {routing: by_top_k for routing, by_top_k in tuned.items() if by_top_k}
    routes = [
        by_top_k[top_k]
        for routing, by_top_k in routers.items()
        for top_k in ROUTERS[routing].reported_sizes(len(manifests), config)
    ]
    rows = [_mixture_row(measured, each, manifests, summarize) for each in routes]
    return Mixtures(measured, routers, routes, rows, _oracle_row(measured, manifests, summarize))


def _oracle_row(measured: Measured, manifests: list[ModelManifest], summarize: Summarize) -> ResultRow:
    """One expert a document, chosen in hindsight: what is left for routing to gain."""
    return {
        **_trained(measured, manifests),
        "routing": ORACLE,
        "top_k": 1,
        "infer_flops_per_token": manifests[0]["infer_flops_per_token"],
        **summarize(perplexity.oracle_logprobs(measured.reported)),
    }


def _trained(measured: Measured, manifests: list[ModelManifest]) -> Trained:
    return {
        "system": measured.system.name,
        "n_clusters": len(manifests),
        "train_tokens": sum(manifest["train_tokens"] for manifest in manifests),
        "train_flops": sum(manifest["train_flops"] for manifest in manifests),
    }


def _mixture_row(measured: Measured, route: Route, manifests: list[ModelManifest], summarize: Summarize) -> ResultRow:
    return {
        **_trained(measured, manifests),
        "routing": route.routing,
        "top_k": route.top_k,
        "settings": route.settings,
        "infer_flops_per_token": route.experts_run(measured.reported) * manifests[0]["infer_flops_per_token"],
        "tuning_loss_nats": float(-perplexity.mixture_logprobs(measured.tuning, route).mean()),
        **summarize(perplexity.mixture_logprobs(measured.reported, route)),
    }


def choose(ensemble: Mixtures) -> tuple[ResultRow, Route]:
    """The ensemble's row of least loss on the tuning documents, marked as `chosen`, and its route."""
    best, chosen = min(
        zip(ensemble.rows, ensemble.routes, strict=True),
        key=lambda pair: pair[0].get("tuning_loss_nats", math.inf),
    )
    best["chosen"] = True
    return best, chosen


def mark_served(rows: list[ResultRow], routes: list[Route]) -> None:
    """Mark the row of the ensemble that is served where nobody says: of those with fewest experts whose router can be served,
    the one of least loss on the tuning documents."""
    able = [row for row, route in zip(rows, routes, strict=True) if route.router.servable]
    if able:
        min(able, key=lambda row: (row["top_k"], row.get("tuning_loss_nats", math.inf)))["served"] = True
