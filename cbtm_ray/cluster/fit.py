"""Unsupervised domain discovery: the corpus sample -> embedder and balanced cluster centers, with a report on them."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
from sklearn.decomposition import PCA
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.metrics import normalized_mutual_info_score

from cbtm_ray import files, progress
from cbtm_ray.cluster.embed import Embedder, fit_embedder, load_embedder, save_embedder
from cbtm_ray.cluster.embed_workers import map_embedding
from cbtm_ray.cluster.kmeans import BalancedKMeans
from cbtm_ray.cluster.kmeans_actors import fit_distributed
from cbtm_ray.cluster.shard_steps import SHARD_ROWS
from cbtm_ray.config import Config
from cbtm_ray.corpus.sample import read_sample
from cbtm_ray.corpus.tokenizer import encode, load_tokenizer
from cbtm_ray.manifests import Agreement, ClusterDescription, ClustererManifest
from cbtm_ray.run import Run

TERMS, NEAREST, MAP_DOCUMENTS = 12, 3, 2000


def fit_clusters(run: Run) -> ClustererManifest:
    """Stage `clusterer/`: the embedder's table, the K x D centers, and what the clusters look like on the sample."""
    config = run.config
    sample = read_sample(run)
    tokenizer = load_tokenizer(run.uri("tokenizer"))
    documents = encode(tokenizer, sample["text"].to_pylist())
    embedder = fit_embedder(config.embed, tokenizer, documents, config.run.seed)
    save_embedder(embedder, config.embed, run.uri("clusterer", "embedder"))
    shard_uris = embed_sample(run, embedder, documents, "clusterer")
    clusterer = fit_centers(run, shard_uris, "clusterer", balanced=config.cluster.balanced)
    manifest: ClustererManifest = {
        "n_clusters": config.cluster.n_clusters,
        "balanced": config.cluster.balanced,
        "n_iter": clusterer.n_iter_,
        "inertia": clusterer.inertia_,
        "gap": clusterer.gap_,
        "content": files.fingerprint(clusterer.cluster_centers_.tolist()),
        **describe_clusters(clusterer, np.concatenate([files.read_array(uri) for uri in shard_uris]), sample),
    }
    forget_fit(run, "clusterer")
    return manifest


def fit_centers(run: Run, shard_uris: list[str], folder: str, *, balanced: bool) -> BalancedKMeans:
    """K-means on the sample's embeddings, with the settings of `cluster`; the centers are in `centers.npy` of the folder."""
    wanted = run.config.cluster
    with progress.bar("fit_clusters", wanted.max_iter, "iterations") as done:
        clusterer = fit_distributed(
            shard_uris,
            n_clusters=wanted.n_clusters,
            balanced=balanced,
            max_iter=wanted.max_iter,
            tol=wanted.tol,
            random_state=run.config.run.seed,
            n_actors=wanted.actors,
            gpus_per_actor=wanted.gpus_per_actor,
            state_uri=run.uri(folder, "_state.npz"),
            on_iteration=lambda iteration, _: done(iteration),
        )
    files.write_array(run.uri(folder, "centers.npy"), clusterer.cluster_centers_)
    return clusterer


def forget_fit(run: Run, folder: str) -> None:
    """Delete what only a fit in progress needs."""
    files.delete(run.uri(folder, "embeddings"))
    files.delete(run.uri(folder, "_state.npz"))


def describe_clusters(clusterer: BalancedKMeans, embeddings_ND: np.ndarray, sample: pa.Table) -> ClusterDescription:
    """Describe the clusters for a reader, on the sample with every document at its nearest center.

    Returns:
        clusters: for each its documents, top terms, nearest texts and gold domains; nmi and purity against the gold
        domains (None without them); map2d: a sample of the documents on the first two principal components.
    """
    distances_NK = clusterer.transform(embeddings_ND)
    labels_N = distances_NK.argmin(axis=1)
    texts, domains = sample["text"].to_pylist(), sample["domain"].to_pylist()
    terms = top_terms(texts, labels_N, distances_NK.shape[1])
    clusters = []
    for cluster in range(distances_NK.shape[1]):
        members = np.flatnonzero(labels_N == cluster)
        nearest = members[np.argsort(distances_NK[members, cluster], kind="stable")[:NEAREST]]
        names, counts = np.unique([domains[i] for i in members if domains[i] is not None], return_counts=True)
        clusters.append(
            {
                "cluster": cluster,
                "sample_documents": len(members),
                "top_terms": terms[cluster],
                "samples": [texts[i][:2000] for i in nearest],
                "domains": {str(name): int(count) for name, count in zip(names, counts, strict=True)},
            }
        )
    shown = slice(0, MAP_DOCUMENTS)
    plane_M2 = PCA(n_components=2, random_state=0).fit_transform(embeddings_ND[shown])
    return {
        "clusters": clusters,
        **agreement(labels_N, domains),
        "map2d": {
            "x": plane_M2[:, 0].round(4).tolist(),
            "y": plane_M2[:, 1].round(4).tolist(),
            "cluster": labels_N[shown].tolist(),
        },
    }


def agreement(labels_N: np.ndarray, domains: list[str | None]) -> Agreement:
    """Normalized mutual information and purity of clusters against gold domains; None where a document has none."""
    if any(domain is None for domain in domains):
        return {"nmi": None, "purity": None}
    _, gold_N = np.unique(np.array(domains, dtype=str), return_inverse=True)
    table = np.zeros((labels_N.max() + 1, gold_N.max() + 1))
    np.add.at(table, (labels_N, gold_N), 1)
    return {
        "nmi": float(normalized_mutual_info_score(gold_N, labels_N)),
        "purity": float(table.max(axis=1).sum() / len(labels_N)),
    }


def top_terms(texts: list[str], labels_N: np.ndarray, n_clusters: int) -> list[list[str]]:
    """Words most typical of each cluster: share of the cluster's documents that hold the word, times the log of its
    lift over the whole sample. Words in fewer than 3 documents are left out."""
    counter = CountVectorizer(stop_words="english", binary=True, token_pattern=r"(?u)\b[^\W\d_][^\W\d_]+\b", min_df=3)
    try:
        present_NW = counter.fit_transform(texts)
    except ValueError:  # no word stands in 3 documents: too small a sample to name its clusters
        return [[] for _ in range(n_clusters)]
    words = counter.get_feature_names_out()
    overall_W = np.asarray(present_NW.mean(axis=0)).ravel()
    found = []
    for cluster in range(n_clusters):
        members = labels_N == cluster
        share_W = np.asarray(present_NW[members].mean(axis=0)).ravel() if members.any() else np.zeros(len(words))
        score_W = share_W * np.log(np.maximum(share_W, 1e-12) / overall_W)
        found.append([str(words[i]) for i in np.argsort(-score_W, kind="stable")[:TERMS] if score_W[i] > 0])
    return found


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
