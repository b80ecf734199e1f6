"""The corpus, streamed once through Ray Data: read -> tokenise -> embed -> nearest centre -> token shards.

Each input shard becomes one Parquet file a split, written aside and renamed, so that a restart redoes only what is
missing. Its rows are sorted by cluster and no row group mixes clusters: an expert reads its own by Parquet statistics.
Balance held while fitting only; here every document goes to its nearest centre (paper section 3.2).
"""

from __future__ import annotations

import functools
import itertools
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from cbtm_ray import files, progress
from cbtm_ray.config import Config, CorpusConfig
from cbtm_ray.corpus import corpus_shards
from cbtm_ray.documents import Document, Shard, is_held_out, read_shard
from cbtm_ray.embed import load_clusterer
from cbtm_ray.route import squared_distances
from cbtm_ray.run import Run
from cbtm_ray.tokens import encode, load_tokenizer

CHUNK_DOCUMENTS = 512
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("domain", pa.string()),
        ("cluster", pa.int32()),
        ("text_bytes", pa.int32()),
        ("tokens", pa.list_(pa.int32())),
    ]
)


def partition_corpus(run: Run) -> dict[str, Any]:
    """Stage `shards/{train,valid}/`: documents and tokens of every cluster.

    Raises:
        ValueError: an input shard changed since the corpus was built, by name and counts.
    """
    counted = run.need("corpus", "build_corpus")["shards"]
    corpus, _ = corpus_shards(run)
    tasks = [{"index": index, **shard} for index, shard in enumerate(counted)]
    totals = {split: _Totals(run.config.cluster.n_clusters) for split in ("train", "valid")}
    with progress.bar("partition_corpus", len(tasks), "shards") as done:
        written = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map(
            functools.partial(_partition_shard, config=run.config, corpus=corpus)
        )
        for number, row in enumerate(written.iter_rows(), start=1):
            for split in totals:
                totals[split].add(row[split])
            done(number)
    empty = [cluster for cluster, count in enumerate(totals["train"].documents_K) if count == 0]
    if empty:
        raise ValueError(
            f"cluster.n_clusters={run.config.cluster.n_clusters}: no document is nearest to the centres of clusters "
            f"{empty}. Lower it or give more documents."
        )
    return {split: total.as_dict() for split, total in totals.items()}


class _Totals:
    """Running counts over the shards of one split."""

    def __init__(self, n_clusters: int) -> None:
        self.documents_K, self.tokens_K = np.zeros(n_clusters, np.int64), np.zeros(n_clusters, np.int64)

    def add(self, counts: dict[str, Any]) -> None:
        self.documents_K += np.asarray(counts["documents"], np.int64)
        self.tokens_K += np.asarray(counts["tokens"], np.int64)

    def as_dict(self) -> dict[str, Any]:
        return {
            "documents": int(self.documents_K.sum()),
            "tokens": int(self.tokens_K.sum()),
            "clusters": [
                {"cluster": cluster, "documents": int(documents), "tokens": int(tokens)}
                for cluster, (documents, tokens) in enumerate(zip(self.documents_K, self.tokens_K, strict=True))
            ],
            "size_skew": float(self.documents_K.max() / max(self.documents_K.mean(), 1e-12)),
        }


def _partition_shard(row: dict[str, Any], config: Config, corpus: CorpusConfig) -> dict[str, Any]:
    """Make both outputs of one input shard, or find them there; the counts per cluster of each."""
    run = Run(config)
    uris = {split: run.uri("shards", split, f"part-{row['index']:05d}.parquet") for split in ("valid", "train")}
    if not all(files.exists(uri) for uri in uris.values()):
        rows = _assign_shard(row, config, corpus)
        for split, uri in uris.items():
            _check(row, split, len(rows[split]))
            _write(uri, rows[split], config.cluster.n_clusters)
    return {"index": row["index"], **{split: _read_counts(uri) for split, uri in uris.items()}}


def _assign_shard(row: dict[str, Any], config: Config, corpus: CorpusConfig) -> dict[str, list[dict[str, Any]]]:
    tokenizer, embedder, centers_KD = _tools(config)
    shard = Shard(tuple(row["uris"]), tuple(row["names"]))
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "valid": []}
    documents = (document for document in read_shard(shard, corpus) if document.text.strip())
    for chunk in iter(lambda: list(itertools.islice(documents, CHUNK_DOCUMENTS)), []):
        tokens = encode(tokenizer, [document.text for document in chunk])
        clusters_N = squared_distances(embedder.transform(tokens), centers_KD).argmin(axis=1)
        for document, ids, cluster in zip(chunk, tokens, clusters_N, strict=True):
            held_out = row["split"] == "valid" or is_held_out(document.id, corpus, config.run.seed)
            rows["valid" if held_out else "train"].append(_output_row(document, ids, int(cluster)))
    return rows


def _output_row(document: Document, tokens: np.ndarray, cluster: int) -> dict[str, Any]:
    return {
        "id": document.id,
        "domain": document.domain,
        "cluster": cluster,
        "text_bytes": len(document.text.encode()),
        "tokens": tokens,
    }


@functools.lru_cache(maxsize=1)
def _tools(config: Config) -> tuple[Any, ...]:
    """Tokenizer, embedder and centres, loaded once a worker process."""
    run = Run(config)
    return load_tokenizer(run.uri("tokenizer")), *load_clusterer(run.uri("clusterer"))


def _check(row: dict[str, Any], split: str, documents: int) -> None:
    expected = row[f"{split}_documents"]
    if documents != expected:
        raise ValueError(
            f"corpus.paths: {row['names'][0]} gave {documents} documents for {split}, {expected} when the corpus was "
            "built: the file changed. Restore it, or start again in another run.dir."
        )


def _write(uri: str, rows: list[dict[str, Any]], n_clusters: int) -> None:
    """One row group a cluster; the counts travel in the footer."""
    rows = sorted(rows, key=lambda row: row["cluster"])
    clusters = [row["cluster"] for row in rows]
    lengths = [len(row["tokens"]) for row in rows]
    counts = {
        "documents": np.bincount(clusters, minlength=n_clusters).tolist(),
        "tokens": np.bincount(clusters, weights=lengths, minlength=n_clusters).astype(int).tolist(),
    }
    schema = SCHEMA.with_metadata({"counts": json.dumps(counts)})
    with files.writing(uri) as stream, pq.ParquetWriter(stream, schema, compression="zstd") as writer:
        for _, members in itertools.groupby(rows, key=lambda row: row["cluster"]):
            writer.write_table(pa.Table.from_pylist(list(members), schema), row_group_size=len(rows))


def _read_counts(uri: str) -> dict[str, list[int]]:
    filesystem, path = files.resolve(uri)
    return json.loads(pq.read_schema(path, filesystem=filesystem).metadata[b"counts"])
