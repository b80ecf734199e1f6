"""Unsupervised domain discovery: the corpus sample -> embedder and balanced cluster centers, with a report on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from cbtm_ray import files, progress
from cbtm_ray.cluster.describe import describe_clusters
from cbtm_ray.cluster.embed import Embedder, fit_embedder, load_embedder, save_embedder
from cbtm_ray.cluster.embed_workers import map_embedding
from cbtm_ray.cluster.kmeans import BalancedKMeans
from cbtm_ray.cluster.kmeans_actors import fit_distributed
from cbtm_ray.cluster.refine_clusters import REFINED_STATE, refine_clusters
from cbtm_ray.cluster.shard_steps import SHARD_ROWS, squared_distances
from cbtm_ray.config import Config
from cbtm_ray.corpus.sample import read_sample
from cbtm_ray.corpus.tokenizer import encode, load_tokenizer
from cbtm_ray.manifests import ClustererManifest, RefineRound
from cbtm_ray.run import Run

KMEANS_STATE = "_state.npz"


def fit_clusters(run: Run) -> ClustererManifest:
    """Stage `clusterer/`: the embedder's table, the K x D centers, and what the clusters look like on the sample."""
    config = run.config
    sample = read_sample(run)
    tokenizer = load_tokenizer(run.uri("tokenizer"))
    documents = encode(tokenizer, sample["text"].to_pylist())
    embedder = fit_embedder(config.embed, tokenizer, documents, config.run.seed)
    save_embedder(embedder, config.embed, run.uri("clusterer", "embedder"))
    found = cluster_sample(run, sample, embedder, documents, "clusterer", balanced=config.cluster.balanced)
    distances_NK = squared_distances(torch.from_numpy(found.embeddings_ND), torch.from_numpy(found.centers_KD)).numpy()
    manifest: ClustererManifest = {
        "n_clusters": config.cluster.n_clusters,
        "balanced": config.cluster.balanced,
        "n_iter": found.kmeans.n_iter_,
        "inertia": found.kmeans.inertia_,
        "gap": found.kmeans.gap_,
        "refined": found.rounds,
        "content": files.fingerprint(found.centers_KD.tolist()),
        **describe_clusters(found.labels_N, distances_NK, found.embeddings_ND, sample),
    }
    forget_fit(run, "clusterer")
    return manifest


def summary(manifest: Mapping[str, Any]) -> str:
    """The clusterer in a line."""
    said = "{n_clusters} clusters in {n_iter} iterations, gap to the bound {gap:.3%}".format(**manifest)
    moved = ", ".join(f"{100 * each['moved']:.1f}" for each in manifest.get("refined", []))
    return f"{said}; refined: {moved} % of the documents moved" if moved else said


@dataclass(frozen=True)
class SampleClusters:
    """The clusters of the sample."""

    kmeans: BalancedKMeans
    """Before they were refined."""
    centers_KD: np.ndarray
    """float32: of k-means, or the mean embeddings of the refined clusters."""
    labels_N: np.ndarray
    """The cluster that each document goes to, balanced or not: nearest, or most likely."""
    embeddings_ND: np.ndarray
    rounds: list[RefineRound]


def cluster_sample(
    run: Run, sample: pa.Table, embedder: Embedder, documents: list[np.ndarray], folder: str, *, balanced: bool
) -> SampleClusters:
    """Cluster the sample with the settings of `cluster`; what assigns any document stands in the folder then.

    That is `centers.npy`, and `ngrams/` where the clusters are refined by likelihood.
    """
    shard_uris = embed_sample(run, embedder, documents, folder)
    kmeans = fit_centers(run, shard_uris, folder, balanced=balanced)
    embeddings_ND = np.concatenate([files.read_array(uri) for uri in shard_uris])
    centers_KD, rounds = kmeans.cluster_centers_, list[RefineRound]()
    if run.config.cluster.refine == "likelihood":
        domains = sample["domain"].to_pylist()
        found, rounds = refine_clusters(run, documents, kmeans.labels_, domains, folder, balanced=balanced)
        centers_KD, labels_N = _means(embeddings_ND, found.labels_N, centers_KD), found.best_N
    else:
        labels_N = kmeans.transform(embeddings_ND).argmin(axis=1)
    files.write_array(run.uri(folder, "centers.npy"), centers_KD)
    return SampleClusters(kmeans, centers_KD, labels_N, embeddings_ND, rounds)


def _means(embeddings_ND: np.ndarray, labels_N: np.ndarray, centers_KD: np.ndarray) -> np.ndarray:
    """Mean embedding of every cluster, float32 (K, D); its center as it was where it has no document."""
    sums_KD, counts_K = np.zeros(centers_KD.shape), np.bincount(labels_N, minlength=len(centers_KD))
    np.add.at(sums_KD, labels_N, embeddings_ND)
    means_KD = sums_KD / np.maximum(counts_K, 1)[:, None]
    return np.where(counts_K[:, None] > 0, means_KD, centers_KD).astype(np.float32)


def fit_centers(run: Run, shard_uris: list[str], folder: str, *, balanced: bool) -> BalancedKMeans:
    """K-means on the sample's embeddings, with the settings of `cluster`."""
    wanted = run.config.cluster
    with progress.bar("fit_clusters", wanted.max_iter, "iterations") as done:
        return fit_distributed(
            shard_uris,
            n_clusters=wanted.n_clusters,
            balanced=balanced,
            max_iter=wanted.max_iter,
            tol=wanted.tol,
            random_state=run.config.run.seed,
            n_actors=wanted.actors,
            gpus_per_actor=wanted.gpus_per_actor,
            state_uri=run.uri(folder, KMEANS_STATE),
            on_iteration=lambda iteration, _: done(iteration),
        )


def forget_fit(run: Run, folder: str) -> None:
    """Delete what only a fit in progress needs."""
    files.delete(run.uri(folder, "embeddings"))
    for name in (KMEANS_STATE, REFINED_STATE):
        files.delete(run.uri(folder, name))


def embed_sample(run: Run, embedder: Embedder, documents: list[np.ndarray], folder: str) -> list[str]:
    """Write the sample's embeddings in shards of the folder: an encoder's on the cluster, those of tf-idf, which take
    seconds, here."""
    tasks: list[dict[str, Any]] = [
        {
            "uri": run.uri(folder, "embeddings", f"part-{first // SHARD_ROWS:05d}.npy"),
            "documents": documents[first : first + SHARD_ROWS],
        }
        for first in range(0, len(documents), SHARD_ROWS)
    ]
    if run.config.embed.embedder == "sentence":
        with progress.bar("embed", len(tasks), "shards") as done:
            rows = map_embedding(tasks, partial(_embed_shard, config=run.config), run.config.embed.gpus).iter_rows()
            for number, _ in enumerate(rows, start=1):
                done(number)
    else:
        for task in tasks:
            files.write_array(task["uri"], embedder.transform(task["documents"]))
    return [task["uri"] for task in tasks]


def _embed_shard(task: dict[str, Any], config: Config) -> dict[str, Any]:
    if not files.exists(task["uri"]):
        documents = [np.asarray(tokens, np.int32) for tokens in task["documents"]]
        files.write_array(task["uri"], _load_once(config).transform(documents))
    return {"uri": task["uri"]}


@lru_cache(maxsize=1)
def _load_once(config: Config) -> Embedder:
    run = Run(config)
    tokenizer = load_tokenizer(run.uri("tokenizer"))
    return load_embedder(run.uri("clusterer", "embedder"), tokenizer, config.embed.batch_documents)
