"""What the clusters look like: their terms, texts and gold domains, on the sample.

N documents, D embedding dimensions, K clusters.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from sklearn.decomposition import PCA
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.metrics import normalized_mutual_info_score

from cbtm_ray.manifests import Agreement, ClusterDescription

TERMS, NEAREST, MAP_DOCUMENTS = 12, 3, 2000


def describe_clusters(
    labels_N: np.ndarray, distances_NK: np.ndarray, embeddings_ND: np.ndarray, sample: pa.Table
) -> ClusterDescription:
    """Describe the clusters for a reader, on the sample.

    Args:
        labels_N: the cluster that each document goes to.
        distances_NK: from each document to each center, which choose the texts to show.

    Returns:
        clusters: for each its documents, top terms, nearest texts and gold domains; nmi and purity against the gold
        domains (None without them); map2d: a sample of the documents on the first two principal components.
    """
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
