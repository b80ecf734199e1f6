"""The corpus, read once through Ray Data: checked, counted, split, and sampled for the fits that follow."""

from __future__ import annotations

import hashlib
import heapq
import json
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from cbtm_ray import files, progress
from cbtm_ray.config import CorpusConfig
from cbtm_ray.documents import Document, Shard, hashed, is_held_out, list_shards, read_shard, unit_hash
from cbtm_ray.errors import UserError
from cbtm_ray.installed_docs import package_documents
from cbtm_ray.run import Run

COUNTS = ("train_documents", "valid_documents", "empty_documents", "train_bytes", "valid_bytes")
SAMPLE_SCHEMA = pa.schema([("id", pa.string()), ("domain", pa.string()), ("text", pa.string())])


def build_corpus(run: Run) -> dict[str, Any]:
    """Stage `corpus/`: the list of shards with their counts, and `sample.parquet`, a uniform sample of training documents.

    The sample holds the documents with the smallest hash of (seed, id), the same whatever order the shards come in.

    Raises:
        UserError: unreadable or empty corpus, or fewer training documents than clusters.
    """
    config = run.config
    if config.corpus.packages:
        write_installed_docs(run)
    corpus, shards = corpus_shards(run)
    sample = Sample(config.corpus, config.run.seed)
    scanned: dict[str, dict[str, Any]] = {}
    tasks = [{**asdict(shard), "split": split} for split, listed in shards.items() for shard in listed]
    with progress.bar("build_corpus", len(tasks), "shards") as done:
        scan = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map(
            partial(_scan, corpus=corpus, seed=config.run.seed)
        )
        for row in scan.iter_rows():
            scanned[f"{row['split']}:{row['names'][0]}"] = row
            for document in row.pop("sample"):
                sample.offer(Document(**document))
            done(len(scanned))
    ordered = [scanned[f"{task['split']}:{task['names'][0]}"] for task in tasks]
    _check_counts(ordered, config.cluster.n_clusters)
    kept = sample.documents()
    with files.writing(run.uri("corpus", "sample.parquet")) as stream:
        pq.write_table(pa.Table.from_pylist([asdict(document) for document in kept], SAMPLE_SCHEMA), stream)
    totals = {key: sum(row[key] for row in ordered) for key in COUNTS}
    content = files.fingerprint([row["content"] for row in ordered])
    return {**totals, "sample_documents": len(kept), "content": content, "shards": ordered}


def corpus_shards(run: Run) -> tuple[CorpusConfig, dict[str, list[Shard]]]:
    """How to read the documents, and the shards by split: those of `valid` are held out whole."""
    corpus = run.config.corpus
    if corpus.packages:
        folder = run.uri("corpus", "documents")
        corpus = replace(
            corpus, packages=(), paths=(folder,), id_column="id", text_column="text", domain_column="domain"
        )
    shards = {"train": list_shards(corpus.paths)}
    if corpus.valid_paths:
        shards["valid"] = list_shards(corpus.valid_paths, "corpus.valid_paths")
    return corpus, shards


def write_installed_docs(run: Run) -> None:
    """Write the documentation of `corpus.packages` as JSONL, a file a package, no text twice."""
    corpus = run.config.corpus
    tasks = [{"package": package} for package in corpus.packages]
    written: set[str] = set()
    with progress.bar("read packages", len(tasks), "packages") as done:
        rows = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map(
            partial(_package_texts, max_bytes=corpus.package_bytes)
        )
        documents = {row["package"]: row["documents"] for row in rows.iter_rows()}
        for number, package in enumerate(corpus.packages, start=1):
            fresh = [row for row in documents[package] if row["id"] not in written]
            written.update(row["id"] for row in fresh)
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in fresh)
            files.write_bytes(run.uri("corpus", "documents", f"{package}.jsonl"), lines.encode())
            done(number)


def read_sample(run: Run) -> pa.Table:
    """The sample of training documents: columns id, domain, text."""
    filesystem, path = files.resolve(run.uri("corpus", "sample.parquet"))
    return pq.read_table(path, filesystem=filesystem)


def _package_texts(row: dict[str, Any], max_bytes: int) -> dict[str, Any]:
    return {**row, "documents": [asdict(document) for document in package_documents(row["package"], max_bytes)]}


def _scan(row: dict[str, Any], corpus: CorpusConfig, seed: int) -> dict[str, Any]:
    counts = dict.fromkeys(COUNTS, 0)
    sample = Sample(corpus, seed)
    digest = hashlib.blake2b(digest_size=16)
    for document in hashed(read_shard(Shard(tuple(row["uris"]), tuple(row["names"])), corpus), digest):
        if not document.text.strip():
            counts["empty_documents"] += 1
            continue
        split = "valid" if row["split"] == "valid" or is_held_out(document.id, corpus, seed) else "train"
        counts[f"{split}_documents"] += 1
        counts[f"{split}_bytes"] += len(document.text.encode())
        if split == "train":
            sample.offer(document)
    return {
        **row,
        **counts,
        "content": digest.hexdigest(),
        "sample": [asdict(document) for document in sample.documents()],
    }


class Sample:
    """The `corpus.sample_documents` documents of smallest hash among those offered."""

    def __init__(self, corpus: CorpusConfig, seed: int) -> None:
        self._corpus, self._seed = corpus, seed
        self._kept: dict[str, Document] = {}
        self._largest: list[tuple[float, str]] = []  # a heap of (-hash, id)

    def offer(self, document: Document) -> None:
        """UserError if the sample has a document of this id already. Equal ids hash alike: both are kept, or neither."""
        if document.id in self._kept:
            raise UserError(
                f"corpus.id_column={self._corpus.id_column!r}: two documents have the id {document.id!r}. Make ids unique, or "
                "leave the field out: file and row are the id then."
            )
        self._kept[document.id] = document
        heapq.heappush(self._largest, (-unit_hash(self._seed, document.id), document.id))
        if len(self._kept) > self._corpus.sample_documents:
            del self._kept[heapq.heappop(self._largest)[1]]

    def documents(self) -> list[Document]:
        """What is kept, by hash."""
        return [self._kept[document_id] for _, document_id in sorted(self._largest, key=lambda key: (-key[0], key[1]))]


def _check_counts(rows: list[dict[str, Any]], n_clusters: int) -> None:
    train, valid = (sum(row[f"{split}_documents"] for row in rows) for split in ("train", "valid"))
    if train == 0:
        raise UserError("corpus.paths: the corpus is empty, 0 documents with text. Give other files.")
    if train < n_clusters:
        raise UserError(
            f"cluster.n_clusters={n_clusters} must be at most the number of training documents, {train}. Lower it."
        )
    if valid < 2:
        raise UserError(
            f"corpus.valid_fraction leaves {valid} held-out documents, at least 2 are needed. "
            "Raise it or give corpus.valid_paths."
        )
