"""The experts of a finished run and what routes to them, loaded for decoding.

K experts, D embedding dimensions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from cbtm_ray import files
from cbtm_ray.cluster.embed import Embedder, load_clusterer
from cbtm_ray.cluster.ngrams import NgramTables, load_tables
from cbtm_ray.corpus.tokenizer import load_tokenizer
from cbtm_ray.errors import UserError
from cbtm_ray.merge.context_router import ContextRouter
from cbtm_ray.merge.paging import PagedExperts
from cbtm_ray.merge.routers import ROUTERS, Route
from cbtm_ray.models import load_model_config
from cbtm_ray.stages import expert_folder


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """The experts of a run, and what routes to them."""

    experts: Mapping[int, PreTrainedModel]
    """The experts in this process, by cluster. A service that is spread over replicas has only some here."""
    model_config: PretrainedConfig
    """The configuration of every expert: experts differ in their weights only."""
    embedder: Embedder
    centers_KD: torch.Tensor
    end_of_text: int
    routes: Mapping[int, Route]
    """One router, by top_k, each with its own settings."""
    served_top_k: int = 1
    """Experts mixed for a token where a request does not say."""
    ngrams: NgramTables | None = None
    """For a router by n-grams."""

    @property
    def n_experts(self) -> int:
        """Here or elsewhere."""
        return len(self.centers_KD)

    @property
    def max_length(self) -> int:
        """Tokens that prompt and answer may have together, at least one of them in the answer."""
        return int(self.model_config.max_position_embeddings)

    def router(self, top_k: int, active: Iterable[int]) -> ContextRouter:
        """A router of a new, empty context to `top_k` of the active experts."""
        centers_KD = self.centers_KD.double().numpy()
        return ContextRouter(self.routes[top_k], self.embedder.context(), centers_KD, active, self.ngrams)


def ensemble_of_one(
    ensemble: Ensemble, experts: Mapping[int, PreTrainedModel], model_config: PretrainedConfig
) -> Ensemble:
    """One model, such as the dense control, as an ensemble: all tokens are its own."""
    route = Route(routing="uniform", top_k=1, settings={}, prefix_tokens=0)
    return replace(
        ensemble,
        experts=experts,
        model_config=model_config,
        centers_KD=ensemble.centers_KD[:1],
        routes={1: route},
        ngrams=None,
    )


def servable_routers(run_dir: str) -> dict[str, dict[int, Route]]:
    """Every router that a finished run evaluated and text can be decoded with, by name and top_k, with its tuned settings.

    Raises:
        UserError: the run is not finished, an older version evaluated it, or there is no such router.
    """
    evaluation = _evaluation(run_dir)
    found = {
        name: {
            int(top_k): Route(
                routing=name, top_k=int(top_k), settings=settings, prefix_tokens=evaluation["prefix_tokens"]
            )
            for top_k, settings in by_top_k.items()
        }
        for name, by_top_k in evaluation["routers"].items()
        if ROUTERS[name].servable
    }
    if not found:
        raise UserError(
            f"run_dir={run_dir}: none of its routers ({', '.join(evaluation['routers'])}) can be served. Add 'ngram' to "
            f"evaluate.routings, {evaluate_again(run_dir)}"
        )
    return found


def tuned_routes(run_dir: str, routing: str) -> dict[int, Route]:
    """One of the `servable_routers`, by top_k.

    Raises:
        UserError: as there, or it is not one of them.
    """
    routers = servable_routers(run_dir)
    if routing not in routers:
        needs = routing in ROUTERS and not ROUTERS[routing].servable
        problem = (
            "cannot be served, for it needs every expert's likelihood of the text," if needs else "was not evaluated"
        )
        advice = "" if needs else f" Or add it to evaluate.routings, {evaluate_again(run_dir)}"
        names = ", ".join(routers)
        raise UserError(f"routing={routing!r} {problem} in run_dir={run_dir}; choose from {names}.{advice}")
    return routers[routing]


def served_route(run_dir: str) -> Route:
    """What a run is served by where nobody says: the route of the row that its evaluation marks.

    Raises:
        UserError: as `servable_routers`.
    """
    routers = servable_routers(run_dir)
    row = next((row for row in _evaluation(run_dir)["rows"] if row.get("served")), None)
    if row is None:
        raise _older(run_dir)
    return routers[row["routing"]][row["top_k"]]


def _evaluation(run_dir: str) -> dict[str, Any]:
    if not files.exists(files.join(run_dir, "evaluation", "manifest.json")):
        raise UserError(f"run_dir={run_dir} is not a finished run. Run first: python -m jobs.run_all --config FILE")
    evaluation: dict[str, Any] = files.read_json(files.join(run_dir, "evaluation", "results.json"))
    if "routers" not in evaluation or not evaluation["routers"].keys() <= ROUTERS.keys():
        raise _older(run_dir)
    return evaluation


def _older(run_dir: str) -> UserError:
    return UserError(f"run_dir={run_dir}: an older version evaluated it. To serve it, {evaluate_again(run_dir)}")


def evaluate_again(run_dir: str) -> str:
    """The end of a message about a missing evaluation: how to evaluate again."""
    return f"delete {files.join(run_dir, 'evaluation')} and run: python -m jobs.evaluate_mixture --config FILE"


def describe_clusters(run_dir: str) -> list[dict[str, Any]]:
    """Every cluster of a finished run, by number: cluster, top_terms, documents (of training)."""
    found = files.read_json(files.join(run_dir, "clusterer", "manifest.json"))["clusters"]
    train = files.read_json(files.join(run_dir, "shards", "manifest.json"))["train"]["clusters"]
    documents = {row["cluster"]: row["documents"] for row in train}
    return [
        {"cluster": row["cluster"], "top_terms": row["top_terms"], "documents": documents[row["cluster"]]}
        for row in sorted(found, key=lambda row: row["cluster"])
    ]


def load_ensemble(
    run_dir: str,
    clusters: Collection[int] | None = None,
    *,
    routing: str | None = None,
    resident: int | None = None,
    device: str = "cpu",
) -> tuple[Ensemble, PreTrainedTokenizerBase]:
    """The ensemble of a finished run directory, routed as its evaluation measured it, and the tokenizer.

    Args:
        clusters: whose experts are to be here; all, if not said.
        routing: a router that the run evaluated (`evaluate.routings`); the one of the row marked as served, if not said.
        resident: how many of the experts have their weights in memory at a time; all, if not said.
        device: where they run.

    Raises:
        UserError: the run is not finished, or cannot be served by that routing.
    """
    served = served_route(run_dir)
    routes = tuned_routes(run_dir, routing or served.routing)
    by_ngrams = next(iter(routes.values())).router.evidence == "ngrams"
    tokenizer = load_tokenizer(files.join(run_dir, "tokenizer"))
    embedder, centers_KD = load_clusterer(files.join(run_dir, "clusterer"), tokenizer)
    wanted = range(len(centers_KD)) if clusters is None else clusters
    folders = {cluster: files.join(run_dir, expert_folder(cluster)) for cluster in wanted}
    ensemble = Ensemble(
        experts=PagedExperts(folders, resident or len(folders), device),
        model_config=load_model_config(files.join(run_dir, expert_folder(0))),
        embedder=embedder,
        centers_KD=centers_KD,
        end_of_text=tokenizer.eos_token_id,
        routes=routes,
        served_top_k=min(max(served.top_k, min(routes)), max(routes)),
        ngrams=load_tables(files.join(run_dir, "ngrams"), tokenizer.eos_token_id) if by_ngrams else None,
    )
    return ensemble, tokenizer
