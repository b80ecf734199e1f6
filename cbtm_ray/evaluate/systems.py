"""Systems of experts that are evaluated: the ensemble and its controls, what routes to them, and their measurements.

T tokens (of one document after the other), K experts, D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from cbtm_ray.cluster.controls import control_centers
from cbtm_ray.cluster.embed import load_centers, load_embedder
from cbtm_ray.cluster.ngrams import NgramTables, load_tables
from cbtm_ray.corpus.tokenizer import load_tokenizer
from cbtm_ray.evaluate.scoring import HeldOutDocuments, context_distances
from cbtm_ray.merge.scores import ScoredHalf
from cbtm_ray.run import Run
from cbtm_ray.stages import expert_folder, ngrams_folder, partition_folder

CONTROL_ROUTINGS = {
    "random": ("uniform", "bayes", "ngram"),
    "unbalanced": ("embedding", "ngram", "posterior"),
    "metadata": ("uniform", "bayes", "embedding", "ngram"),
}


@dataclass(frozen=True)
class System:
    """Experts that are mixed, and how they are routed."""

    name: str
    """'cbtm', or a control: 'random', 'unbalanced' or 'metadata'."""
    experts: list[str]
    """Their folders in the run, by cluster."""
    centers_KD: Tensor | None
    """None: its clusters have no centers."""
    routings: tuple[str, ...]
    ngrams: NgramTables | None = None
    """None: its clusters have no n-gram tables."""


@dataclass(frozen=True)
class Measured:
    """A system's experts on the two halves of the held-out documents."""

    system: System
    tuning: ScoredHalf
    reported: ScoredHalf


def ensemble_system(run: Run) -> System:
    """The method's own experts and centers."""
    experts = [expert_folder(cluster) for cluster in range(run.config.cluster.n_clusters)]
    routings, centers_KD = run.config.evaluate.routings, load_centers(run.uri("clusterer"))
    ngrams = _load_ngrams(run, "ngrams") if "ngram" in routings else None
    return System("cbtm", experts, centers_KD, routings, ngrams)


def control_system(run: Run, control: str) -> System:
    """The experts of a control, and what can route to them: n-grams, centers, the experts' likelihoods, or nothing."""
    n_clusters = run.require(partition_folder(control), "partition_corpus")["n_clusters"]
    experts = [expert_folder(cluster, control) for cluster in range(n_clusters)]
    centers_KD = None if control == "random" else control_centers(run, control)
    ngrams = _load_ngrams(run, ngrams_folder(control))
    return System(control, experts, centers_KD, CONTROL_ROUTINGS[control], ngrams)


def _load_ngrams(run: Run, folder: str) -> NgramTables:
    run.require(folder, "partition_corpus")
    return load_tables(run.uri(folder), int(load_tokenizer(run.uri("tokenizer")).eos_token_id))


def measure(
    run: Run, documents: HeldOutDocuments, logprobs: dict[str, np.ndarray], systems: list[System]
) -> list[Measured]:
    """The log-probabilities and distances of every system's experts, on both halves."""
    found = []
    for system, distances_TK in zip(systems, system_distances(run, systems, documents.tokens), strict=True):
        experts_TK = np.stack([logprobs[name] for name in system.experts], axis=1)
        ngrams_TK = ngram_evidence(system, documents.tokens)
        halves = [documents.half(experts_TK, distances_TK, ngrams_TK, tuning=tuning) for tuning in (True, False)]
        found.append(Measured(system, *halves))
    return found


def ngram_evidence(system: System, documents: list[np.ndarray]) -> np.ndarray:
    """Evidence of every token by the n-grams of the system's clusters, (T, K); (T, 0) without n-grams."""
    if system.ngrams is None:
        return np.zeros((sum(map(len, documents)), 0), np.float32)
    return np.concatenate([system.ngrams.evidence(document) for document in documents])


def system_distances(run: Run, systems: list[System], documents: list[np.ndarray]) -> list[np.ndarray]:
    """Squared distances of every token's context to the centers of each system, (T, K); (T, 0) without centers."""
    embedder = load_embedder(
        run.uri("clusterer", "embedder"), load_tokenizer(run.uri("tokenizer")), run.config.embed.batch_documents
    )
    centers = {system.name: system.centers_KD for system in systems if system.centers_KD is not None}
    distances = context_distances(embedder, documents, centers)
    without = np.zeros((sum(len(document) for document in documents), 0), np.float32)
    return [distances.get(system.name, without) for system in systems]
