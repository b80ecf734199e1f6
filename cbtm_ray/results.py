"""Stage `evaluation/`: perplexity of the ensemble and of everything it is measured against, on the same held-out text.

T tokens (of one document after the other), R those of the documents that are reported on, K experts, D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from cbtm_ray import evaluate, files
from cbtm_ray.branch import DENSE, MOE, expert_folder, partition_folder
from cbtm_ray.config import SPLIT_CONTROLS, EvaluateConfig, task_name
from cbtm_ray.controls import control_centers
from cbtm_ray.embed import load_centers, load_embedder
from cbtm_ray.run import Run
from cbtm_ray.scoring import HeldOutDocuments, context_distances, fewshot_prompts, held_out_documents, score_models
from cbtm_ray.tokens import load_tokenizer
from cbtm_ray.upcycle import TOP_K

CONTROL_ROUTINGS = {
    "random": ("uniform", "bayes"),
    "unbalanced": ("embedding", "posterior"),
    "metadata": ("uniform", "bayes", "embedding"),
}
SAMPLE_TOKENS = 300


@dataclass(frozen=True)
class System:
    """Experts that are mixed, and how they are routed."""

    name: str
    """'cbtm', or a control: 'random', 'unbalanced' or 'metadata'."""
    experts: list[str]
    """Their folders in the run, by cluster."""
    centers_KD: Tensor | None
    """None: its clusters have no centres."""
    routings: tuple[str, ...]


@dataclass(frozen=True)
class Measured:
    """A system's experts on the two halves of the held-out documents."""

    system: System
    tuning: evaluate.HeldOut
    reported: evaluate.HeldOut


def evaluate_mixture(run: Run) -> dict[str, Any]:
    """`evaluation/results.json`: perplexity of the seed, the dense control, the ensemble and the controls with experts, these
    for every routing and top-k.

    Routing settings are tuned on one half of the held-out documents and all numbers reported on the other; halves are a
    hash of the document's id.
    """
    wanted = run.config.train.controls
    systems = [ensemble_system(run), *(control_system(run, control) for control in wanted if control in SPLIT_CONTROLS)]
    experts = [name for system in systems for name in system.experts]
    singles = {"seed": "seed", "dense": DENSE, **({"moe": MOE} if "moe" in wanted else {})}
    models = {name: run.need(name, "train_experts") for name in [*singles.values(), *experts]}
    documents = held_out_documents(run)
    logprobs = score_models(run, list(models))
    ensemble, *others = measure(run, documents, logprobs, systems)
    reported_T = documents.token_mask(tuning=False)
    dense_R = logprobs[DENSE][reported_T]
    rows = [
        {**_single_row(system, models[name]), **documents.summarise(logprobs[name][reported_T], dense_R)}
        for system, name in singles.items()
    ]
    routes = {measured.system.name: _routes(measured, run.config.evaluate) for measured in (ensemble, *others)}
    mixtures = [_mixture_row(ensemble, route, models, documents, dense_R) for route in routes["cbtm"]]
    best = min(range(len(mixtures)), key=lambda index: mixtures[index]["tuning_loss_nats"])
    mixtures[best]["chosen"] = True
    chosen = routes["cbtm"][best]
    weights_RK = evaluate.routing_weights(ensemble.reported, chosen)
    controls = [
        _mixture_row(control, route, models, documents, dense_R)
        for control in others
        for route in routes[control.system.name]
    ]
    results = {
        "rows": [*rows, *mixtures, *controls],
        "domains": _domain_rows(documents, rows[1], mixtures[best], weights_RK),
        "tuned_on_documents": len(ensemble.tuning.lengths),
        "reported_on_documents": len(ensemble.reported.lengths),
        "reported_tokens": len(dense_R),
        "prefix_tokens": run.config.evaluate.prefix_tokens,
        "sample": _sample(run, documents, ensemble.reported, chosen),
        "fewshot": [
            row
            for task in map(files.absolute, run.config.evaluate.fewshot)
            for row in _fewshot_rows(run, task, singles, systems, routes)
        ],
    }
    files.write_json(run.uri("evaluation", "results.json"), results)
    return {key: results[key] for key in ("tuned_on_documents", "reported_on_documents", "reported_tokens")}


def ensemble_system(run: Run) -> System:
    """The method's own experts and centres."""
    experts = [expert_folder(cluster) for cluster in range(run.config.cluster.n_clusters)]
    routings = (
        "embedding",
        "posterior",
        "prefix",
        *(("nearest_prefix",) if run.config.evaluate.prefix_experts else ()),
    )
    return System("cbtm", experts, load_centers(run.uri("clusterer")), routings)


def control_system(run: Run, control: str) -> System:
    """The experts of a control and what can route to them: its own centres, the experts' likelihoods alone, or nothing."""
    n_clusters = run.need(partition_folder(control), "partition_corpus")["n_clusters"]
    experts = [expert_folder(cluster, control) for cluster in range(n_clusters)]
    centers_KD = None if control == "random" else control_centers(run, control)
    return System(control, experts, centers_KD, CONTROL_ROUTINGS[control])


def measure(
    run: Run, documents: HeldOutDocuments, logprobs: dict[str, np.ndarray], systems: list[System]
) -> list[Measured]:
    """What the mixtures of every system are computed from, out of the models' log-probabilities by folder."""
    found = []
    for system, distances_TK in zip(systems, _distances(run, systems, documents.tokens), strict=True):
        experts_TK = np.stack([logprobs[name] for name in system.experts], axis=1)
        halves = [documents.half(experts_TK, distances_TK, tuning=tuning) for tuning in (True, False)]
        found.append(Measured(system, *halves))
    return found


def _distances(run: Run, systems: list[System], documents: list[np.ndarray]) -> list[np.ndarray]:
    """Squared distances of every token's context to the centres of each system, (T, K); (T, 0) without centres."""
    tokenizer = load_tokenizer(run.uri("tokenizer"))
    embedder = load_embedder(run.uri("clusterer", "embedder"), tokenizer, run.config.embed.batch_documents)
    centers = {system.name: system.centers_KD for system in systems if system.centers_KD is not None}
    distances = context_distances(embedder, documents, centers)
    without = np.zeros((sum(len(document) for document in documents), 0), np.float32)
    return [distances.get(system.name, without) for system in systems]


def _single_row(system: str, manifest: dict[str, Any]) -> dict[str, Any]:
    return {
        "system": system,
        "n_clusters": manifest.get("experts", 1),
        "top_k": TOP_K if system == "moe" else 1,
        "routing": None,
        "train_tokens": manifest["train_tokens"],
        "train_flops": manifest["train_flops"],
        "infer_flops_per_token": manifest["infer_flops_per_token"],
    }


def _routes(measured: Measured, config: EvaluateConfig) -> list[evaluate.Route]:
    """Every way of routing to report, tuned."""
    n_experts = len(measured.system.experts)
    sizes = sorted({*(k for k in config.top_k if k < n_experts), n_experts})
    readers = config.prefix_experts or 0
    return [
        route
        for routing in measured.system.routings
        for route in evaluate.tune(measured.tuning, config, routing=routing, sizes=sizes)
        # Holding all leaves nothing out: posterior routing. Only those that read the prefix can be held. Of experts that weigh
        # alike none is better than another.
        if {
            "prefix": route.top_k < n_experts,
            "nearest_prefix": route.top_k <= readers,
            "uniform": route.top_k == n_experts,
        }.get(routing, True)
    ]


def _mixture_row(
    measured: Measured,
    route: evaluate.Route,
    models: dict[str, dict[str, Any]],
    documents: HeldOutDocuments,
    dense_R: np.ndarray,
) -> dict[str, Any]:
    manifests = [models[name] for name in measured.system.experts]
    lengths, n_experts, readers = measured.reported.lengths, len(manifests), None
    if route.routing == "nearest_prefix":
        nearest = int(route.settings["prefix_experts"])
        readers = evaluate.prefix_readers(measured.reported, nearest, route.prefix_tokens)
    running = evaluate.experts_run(route.routing, route.top_k, n_experts, lengths, route.prefix_tokens, readers)
    return {
        "system": measured.system.name,
        "n_clusters": n_experts,
        "routing": route.routing,
        "top_k": route.top_k,
        "settings": route.settings,
        "train_tokens": sum(manifest["train_tokens"] for manifest in manifests),
        "train_flops": sum(manifest["train_flops"] for manifest in manifests),
        "infer_flops_per_token": running * manifests[0]["infer_flops_per_token"],
        "tuning_loss_nats": float(-evaluate.mixture_logprobs(measured.tuning, route).mean()),
        **documents.summarise(evaluate.mixture_logprobs(measured.reported, route), dense_R),
    }


def _fewshot_rows(
    run: Run, task: str, singles: dict[str, str], systems: list[System], routes: dict[str, list[evaluate.Route]]
) -> list[dict[str, Any]]:
    """Accuracy of every model and mixture on a task, mixtures with the routing that perplexity was tuned for.

    `weights` says whether a mixture holds the weights of the whole prompt for the label's tokens, or they run on; `scoring`
    how the label is chosen (fewshot.py).
    """
    prompts = fewshot_prompts(run, task)
    logprobs = score_models(run, [*singles.values(), *(name for system in systems for name in system.experts)], task)
    label_rows, _, empty_rows = prompts.label_rows()
    most = np.full(prompts.n_seeds, np.bincount(prompts.answers).max() / len(prompts.answers))
    found: list[tuple[dict[str, Any], np.ndarray]] = [
        ({"system": "majority", "scoring": scoring}, most) for scoring in ("likelihood", "calibrated")
    ]
    for single, name in singles.items():
        for scoring, accuracies in prompts.accuracies(logprobs[name][label_rows], logprobs[name][empty_rows]).items():
            found.append(({"system": single, "scoring": scoring}, accuracies))
    for system, measured in zip(systems, _distances(run, systems, prompts.tokens), strict=True):
        experts_TK = np.stack([logprobs[name] for name in system.experts], axis=1)
        held_out = evaluate.HeldOut(prompts.lengths, experts_TK, measured)
        for route in routes[system.name]:
            about = {"n_clusters": len(system.experts), "routing": route.routing, "top_k": route.top_k}
            for (weights, scoring), accuracies in prompts.mixture_accuracies(held_out, route).items():
                found.append(({"system": system.name, **about, "weights": weights, "scoring": scoring}, accuracies))
    empty = {"n_clusters": 1, "routing": None, "top_k": 1, "weights": None}
    return [
        {
            "task": task_name(task),
            **empty,
            **about,
            "examples": len(prompts.answers),
            "accuracy": float(accuracies.mean()),
            "accuracy_std": float(accuracies.std()),
            "accuracies": accuracies.tolist(),
        }
        for about, accuracies in found
    ]


def _domain_rows(
    documents: HeldOutDocuments, dense: dict[str, Any], chosen: dict[str, Any], weights_RK: np.ndarray
) -> list[dict[str, Any]]:
    """Perplexity of the dense control and the chosen ensemble on each gold domain, and the ensemble's mean weights there."""
    return [
        {
            "domain": name,
            "tokens": int(mask_R.sum()),
            "dense_ppl": dense["domain_ppl"][name],
            "cbtm_ppl": chosen["domain_ppl"][name],
            "weights": weights_RK[mask_R].mean(axis=0).tolist(),
        }
        for name, mask_R in documents.domain_masks()
    ]


def _sample(
    run: Run, documents: HeldOutDocuments, reported: evaluate.HeldOut, route: evaluate.Route
) -> list[dict[str, Any]]:
    """The reported document closest to 300 tokens, with the expert of most weight for each token."""
    index = int(np.argmin(np.abs(reported.lengths - SAMPLE_TOKENS)))
    rows = list(reported.documents())[index]
    one = evaluate.HeldOut(
        reported.lengths[index : index + 1], reported.logprobs_TK[rows], reported.squared_distances_TK[rows]
    )
    weights_TK = evaluate.routing_weights(one, route)[:SAMPLE_TOKENS]
    tokens = documents.tokens[int(np.flatnonzero(~documents.for_tuning)[index])][:SAMPLE_TOKENS]
    tokenizer = load_tokenizer(run.uri("tokenizer"))
    return [
        {"token": tokenizer.decode([int(token)]), "expert": int(weights.argmax()), "weight": float(weights.max())}
        for token, weights in zip(tokens, weights_TK, strict=True)
    ]
