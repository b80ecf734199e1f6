"""Stage `evaluation/`: perplexity of the ensemble and of everything it is measured against, on the same held-out text.

T tokens (of one document after the other), R those of the documents that are reported on, K experts.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from cbtm_ray import files
from cbtm_ray.branch.upcycle import TOP_K
from cbtm_ray.config import PARTITION_CONTROLS, task_name
from cbtm_ray.corpus.tokenizer import load_tokenizer
from cbtm_ray.evaluate.mixture_rows import Mixtures, choose, mark_served, mix
from cbtm_ray.evaluate.prefix_curve import prefix_rows
from cbtm_ray.evaluate.result_rows import DomainRow, DomainSummary, Evaluation, FewshotRow, ResultRow, SampleToken
from cbtm_ray.evaluate.scoring import HeldOutDocuments, fewshot_prompts, held_out_documents, score_models
from cbtm_ray.evaluate.systems import (
    control_system,
    ensemble_system,
    measure,
    ngram_evidence,
    system_distances,
)
from cbtm_ray.manifests import ModelManifest
from cbtm_ray.merge.routers import Route, check_reported
from cbtm_ray.merge.scores import ScoredHalf
from cbtm_ray.run import Run
from cbtm_ray.stages import DENSE_FOLDER, MOE_FOLDER

SAMPLE_TOKENS = 300


def evaluate_mixture(run: Run) -> dict[str, Any]:
    """`evaluation/results.json`: perplexity of the seed, the dense control, the ensemble and the controls with experts, these
    for every routing and top-k.

    Routing settings are tuned on one half of the held-out documents and all numbers reported on the other; halves are a
    hash of the document's id.

    Raises:
        UserError: `evaluate.routings` and `evaluate.top_k` leave nothing to report of the ensemble.
    """
    config, controls = run.config.evaluate, run.config.train.controls
    check_reported(config, run.config.cluster.n_clusters)
    systems = [ensemble_system(run), *(control_system(run, name) for name in controls if name in PARTITION_CONTROLS)]
    singles = {"seed": "seed", "dense": DENSE_FOLDER, **({"moe": MOE_FOLDER} if "moe" in controls else {})}
    names = [*singles.values(), *(name for system in systems for name in system.experts)]
    models: dict[str, ModelManifest] = {name: run.require(name, "train_experts") for name in names}
    documents, logprobs = held_out_documents(run), score_models(run, names)
    reported_T = documents.token_mask(tuning=False)
    summarize = partial(documents.summarize, dense_R=logprobs[DENSE_FOLDER][reported_T])
    rows = [
        _single_row(system, models[name], summarize(logprobs[name][reported_T])) for system, name in singles.items()
    ]
    mixtures = [mix(found, config, models, summarize) for found in measure(run, documents, logprobs, systems)]
    results = _results(run, documents, rows, mixtures, logprobs[DENSE_FOLDER][reported_T])
    for task in map(files.absolute, config.fewshot):
        results["fewshot"] += _fewshot_rows(run, task, singles, mixtures)
    files.write_json(run.uri("evaluation", "results.json"), results)
    return {key: results[key] for key in ("tuned_on_documents", "reported_on_documents", "reported_tokens")}


def _results(
    run: Run, documents: HeldOutDocuments, singles: list[ResultRow], mixtures: list[Mixtures], dense_R: np.ndarray
) -> Evaluation:
    """Everything but the few-shot tasks; `dense_R`: the dense control's log-probabilities."""
    ensemble, config = mixtures[0], run.config.evaluate
    best, chosen = choose(ensemble)
    mark_served(ensemble.rows, ensemble.routes)
    reported = ensemble.measured.reported
    few = [by_top_k[top_k] for by_top_k in ensemble.routers.values() for top_k in (1, 2) if top_k in by_top_k]
    return {
        "rows": singles + [row for found in mixtures for row in (*found.rows, found.oracle)],
        "routers": {
            name: {str(top_k): route.settings for top_k, route in by_top_k.items()}
            for name, by_top_k in ensemble.routers.items()
        },
        "prefix_tokens": config.prefix_tokens,
        "prefixes": prefix_rows(reported, dense_R, few, config.prefix_lengths),
        "domains": _domain_rows(documents, singles[1], best, chosen.weights(reported)),
        "tuned_on_documents": len(ensemble.measured.tuning.lengths),
        "reported_on_documents": len(reported.lengths),
        "reported_tokens": int(reported.lengths.sum()),
        "sample": _sample(run, documents, reported, chosen),
        "fewshot": [],
    }


def _single_row(system: str, manifest: ModelManifest, summary: DomainSummary) -> ResultRow:
    return {
        "system": system,
        "n_clusters": manifest.get("experts", 1),
        "top_k": TOP_K if system == "moe" else 1,
        "routing": None,
        "train_tokens": manifest["train_tokens"],
        "train_flops": manifest["train_flops"],
        "infer_flops_per_token": manifest["infer_flops_per_token"],
        **summary,
    }


def _fewshot_rows(run: Run, task: str, singles: dict[str, str], mixtures: list[Mixtures]) -> list[FewshotRow]:
    """Accuracy of every model and mixture on a task, mixtures with the routing that perplexity was tuned for.

    `weights` says whether a mixture holds the weights of the whole prompt for the label's tokens, or they run on; `scoring`
    how the label is chosen (fewshot.py).
    """
    prompts = fewshot_prompts(run, task)
    systems = [mixture.measured.system for mixture in mixtures]
    logprobs = score_models(run, [*singles.values(), *(name for system in systems for name in system.experts)], task)
    label_rows, _, empty_rows = prompts.label_rows()

    def row(
        accuracies: np.ndarray,
        *,
        system: str,
        scoring: str,
        n_clusters: int = 1,
        top_k: int = 1,
        routing: str | None = None,
        weights: str | None = None,
    ) -> FewshotRow:
        return {
            "task": task_name(task),
            "system": system,
            "n_clusters": n_clusters,
            "top_k": top_k,
            "routing": routing,
            "weights": weights,
            "scoring": scoring,
            "examples": len(prompts.answers),
            "accuracy": float(accuracies.mean()),
            "accuracy_std": float(accuracies.std()),
            "accuracies": accuracies.tolist(),
        }

    most = np.full(prompts.n_seeds, np.bincount(prompts.answers).max() / len(prompts.answers))
    rows = [row(most, system="majority", scoring=scoring) for scoring in ("likelihood", "calibrated")]
    for single, name in singles.items():
        found = prompts.accuracies(logprobs[name][label_rows], logprobs[name][empty_rows])
        rows += [row(accuracies, system=single, scoring=scoring) for scoring, accuracies in found.items()]
    for mixture, distances_TK in zip(mixtures, system_distances(run, systems, prompts.tokens), strict=True):
        system = mixture.measured.system
        experts_TK = np.stack([logprobs[name] for name in system.experts], axis=1)
        held_out = ScoredHalf(prompts.lengths, experts_TK, distances_TK, ngram_evidence(system, prompts.tokens))
        for route in mixture.routes:
            mixed = partial(
                row, system=system.name, n_clusters=len(system.experts), routing=route.routing, top_k=route.top_k
            )
            for (weights, scoring), accuracies in prompts.mixture_accuracies(held_out, route).items():
                rows.append(mixed(accuracies, weights=weights, scoring=scoring))
    return rows


def _domain_rows(
    documents: HeldOutDocuments, dense: ResultRow, chosen: ResultRow, weights_RK: np.ndarray
) -> list[DomainRow]:
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


def _sample(run: Run, documents: HeldOutDocuments, reported: ScoredHalf, route: Route) -> list[SampleToken]:
    """The reported document closest to 300 tokens, with the expert of most weight for each token."""
    index = int(np.argmin(np.abs(reported.lengths - SAMPLE_TOKENS)))
    rows = list(reported.documents())[index]
    lengths = reported.lengths[index : index + 1]
    found = ScoredHalf(
        lengths, reported.logprobs_TK[rows], reported.squared_distances_TK[rows], reported.ngrams_TK[rows]
    )
    weights_TK = route.weights(found)
    tokens = documents.tokens[int(np.flatnonzero(~documents.for_tuning)[index])][:SAMPLE_TOKENS]
    tokenizer = load_tokenizer(run.uri("tokenizer"))
    return [
        {"token": str(tokenizer.decode([int(token)])), "expert": int(weights.argmax()), "weight": float(weights.max())}
        for token, weights in zip(tokens, weights_TK[:SAMPLE_TOKENS], strict=True)
    ]
