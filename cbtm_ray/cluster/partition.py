"""The corpus, streamed once through Ray Data: read -> tokenize -> most likely cluster, or nearest center -> token shards.

Each input shard becomes one Parquet file a split, written aside and renamed, so that a restart redoes only what is
missing. No row group mixes clusters: an expert reads its own by Parquet statistics. Memory holds a few million tokens of a
shard at a time, however large it is.
Balance held while fitting only; here every document goes to its best cluster (paper section 3.2: the nearest center).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import PreTrainedTokenizerBase

from cbtm_ray import files, progress
from cbtm_ray.cluster.embed import Embedder, load_centers, load_embedder
from cbtm_ray.cluster.embed_workers import map_embedding
from cbtm_ray.cluster.likelihood import best_clusters
from cbtm_ray.cluster.ngrams import NgramTables, load_tables
from cbtm_ray.cluster.shard_steps import squared_distances
from cbtm_ray.config import Config, CorpusConfig
from cbtm_ray.corpus.build import corpus_to_read
from cbtm_ray.corpus.documents import Document, is_held_out, read_again
from cbtm_ray.corpus.duplicates import drop_duplicates
from cbtm_ray.corpus.tokenizer import encode, load_tokenizer
from cbtm_ray.errors import UserError
from cbtm_ray.manifests import CorpusManifest, ShardsManifest, SplitManifest
from cbtm_ray.run import Run
from cbtm_ray.train.packed_sequences import check_long_enough

SPLITS = ("valid", "train")
CHUNK_DOCUMENTS = 512
BUFFER_TOKENS = 1 << 24  # what an output holds in memory: 64 MiB of token ids
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("domain", pa.string()),
        ("cluster", pa.int32()),
        ("text_bytes", pa.int32()),
        ("tokens", pa.list_(pa.int32())),
    ]
)


def partition_corpus(run: Run) -> ShardsManifest:
    """Stage `shards/{train,valid}/`: documents and tokens of every cluster.

    Raises:
        UserError: a stage before is not finished, an input shard changed after the corpus was built, or a cluster is shorter
            than a training sequence.
    """
    corpus_manifest: CorpusManifest = run.require("corpus", "build_corpus")
    counted = corpus_manifest["shards"]
    run.require("clusterer", "fit_clusters")
    corpus = corpus_to_read(run)
    tasks = [{"index": index, **shard} for index, shard in enumerate(counted)]
    totals = {split: Totals(run.config.cluster.n_clusters) for split in SPLITS}
    with progress.bar("partition_corpus", len(tasks), "shards") as done:
        work = functools.partial(_partition_shard, config=run.config, corpus=corpus)
        written = map_embedding(tasks, work, embedding_gpus(run.config))
        for number, row in enumerate(written.iter_rows(), start=1):
            for split in totals:
                totals[split].add(row[split])
            done(number)
    totals["train"].check_none_empty()
    counts: ShardsManifest = {"train": totals["train"].as_dict(), "valid": totals["valid"].as_dict()}
    check_long_enough(counts["train"]["clusters"], run.config.tokens.sequence_length)
    return counts


class Totals:
    """Running counts over the shards of one split."""

    def __init__(self, n_clusters: int) -> None:
        self.documents_K, self.tokens_K = np.zeros(n_clusters, np.int64), np.zeros(n_clusters, np.int64)

    def add(self, counts: dict[str, Any]) -> None:
        self.documents_K += np.asarray(counts["documents"], np.int64)
        self.tokens_K += np.asarray(counts["tokens"], np.int64)

    def check_none_empty(self) -> None:
        empty = np.flatnonzero(self.documents_K == 0).tolist()
        if empty:
            raise UserError(
                f"cluster.n_clusters={len(self.documents_K)}: clusters {empty} have no document. Lower it or give more "
                "documents."
            )

    def as_dict(self) -> SplitManifest:
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
    uris = {split: run.uri("shards", split, f"part-{row['index']:05d}.parquet") for split in SPLITS}
    if not all(files.exists(uri) for uri in uris.values()):
        with contextlib.ExitStack() as stack:
            outputs = {
                split: _Output(stack.enter_context(_writing(uri)), config.cluster.n_clusters)
                for split, uri in uris.items()
            }
            digest = hashlib.blake2b(digest_size=16)
            for split, document in _assign_shard(row, config, corpus, digest):
                outputs[split].add(document)
            for output in outputs.values():
                output.close()
    return {"index": row["index"], **{split: _read_counts(uri) for split, uri in uris.items()}}


def _assign_shard(
    row: dict[str, Any], config: Config, corpus: CorpusConfig, digest: hashlib.blake2b
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The documents of one input shard as rows of the output, each with its split; `digest` takes them in."""
    tokenizer = load_tokenizer_once(config)
    documents = drop_duplicates(Run(config), row, read_again(row, corpus))
    for chunk in iter(lambda: list(itertools.islice(documents, CHUNK_DOCUMENTS)), []):
        tokens = encode(tokenizer, [document.text for document in chunk])
        for document, ids, cluster in zip(chunk, tokens, assign(tokens, config, "clusterer").tolist(), strict=True):
            held_out = row["split"] == "valid" or is_held_out(document.id, corpus, config.run.seed)
            yield "valid" if held_out else "train", _output_row(document, ids, cluster)


@contextlib.contextmanager
def _writing(uri: str) -> Iterator[pq.ParquetWriter]:
    with files.writing(uri) as stream, pq.ParquetWriter(stream, SCHEMA, compression="zstd") as writer:
        yield writer


class _Output:
    """One output file: rows gather until there are many tokens, then every cluster's become a row group."""

    def __init__(self, writer: pq.ParquetWriter, n_clusters: int) -> None:
        self.documents_K, self.tokens_K = [0] * n_clusters, [0] * n_clusters
        self._waiting: list[dict[str, Any]] = []
        self._waiting_tokens, self._writer = 0, writer

    def add(self, row: dict[str, Any]) -> None:
        self.documents_K[row["cluster"]] += 1
        self.tokens_K[row["cluster"]] += len(row["tokens"])
        self._waiting.append(row)
        self._waiting_tokens += len(row["tokens"])
        if self._waiting_tokens >= BUFFER_TOKENS:
            self._flush()

    def close(self) -> None:
        """Write what waits, and the counts into the footer."""
        self._flush()
        counts = {"documents": self.documents_K, "tokens": self.tokens_K}
        self._writer.add_key_value_metadata({"counts": json.dumps(counts)})

    def _flush(self) -> None:
        self._waiting.sort(key=lambda row: row["cluster"])
        for _, members in itertools.groupby(self._waiting, key=lambda row: row["cluster"]):
            group = pa.Table.from_pylist(list(members), SCHEMA)
            self._writer.write_table(group, row_group_size=len(group))
        self._waiting, self._waiting_tokens = [], 0


def _output_row(document: Document, tokens: np.ndarray, cluster: int) -> dict[str, Any]:
    return {
        "id": document.id,
        "domain": document.domain,
        "cluster": cluster,
        "text_bytes": len(document.text.encode()),
        "tokens": tokens,
    }


def assign(documents: list[np.ndarray], config: Config, folder: str) -> np.ndarray:
    """The cluster of every document, int64 (N,): the most likely one, or that of the nearest center.

    Args:
        folder: `clusterer`, or that of a control with clusters of its own.
    """
    if config.cluster.refine == "likelihood":
        return best_clusters(_load_tables(config, folder), documents, config.cluster.refine_tokens)
    points_ND = torch.from_numpy(load_embedder_once(config).transform(documents))
    return squared_distances(points_ND, _load_centers(config, folder)).argmin(1).numpy()


def embedding_gpus(config: Config) -> float:
    """GPUs of a worker that assigns documents."""
    return 0 if config.cluster.refine == "likelihood" else config.embed.gpus


@functools.lru_cache(maxsize=1)
def load_tokenizer_once(config: Config) -> PreTrainedTokenizerBase:
    """As the next ones, once a worker process."""
    return load_tokenizer(Run(config).uri("tokenizer"))


@functools.lru_cache(maxsize=1)
def load_embedder_once(config: Config) -> Embedder:
    tokenizer = load_tokenizer_once(config)
    return load_embedder(Run(config).uri("clusterer", "embedder"), tokenizer, config.embed.batch_documents)


@functools.lru_cache(maxsize=1)
def _load_centers(config: Config, folder: str) -> torch.Tensor:
    return load_centers(Run(config).uri(folder))


@functools.lru_cache(maxsize=1)
def _load_tables(config: Config, folder: str) -> NgramTables:
    return load_tables(Run(config).uri(folder, "ngrams"), int(load_tokenizer_once(config).eos_token_id))


def _read_counts(uri: str) -> dict[str, list[int]]:
    """Counts per cluster from the footer. UserError if they are not those of the rows: the file is damaged."""
    filesystem, path = files.resolve(uri)
    with filesystem.open_input_file(path) as stream:
        metadata = pq.ParquetFile(stream).metadata
    counts = json.loads((metadata.metadata or {}).get(b"counts", b"{}"))
    if sum(counts.get("documents", ())) != metadata.num_rows:
        raise UserError(f"{uri} holds {metadata.num_rows} documents, but not those it was made with. Delete it.")
    return counts
