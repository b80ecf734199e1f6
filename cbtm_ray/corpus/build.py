"""The corpus, read through Ray Data: checked, counted, split, and sampled for the fits that follow.

The first reading sends counts and ids to the driver, which chooses the sample; a second one fetches the chosen documents.
Every later reading of a shard is compared with the first by a digest of the shard's documents.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from cbtm_ray import files, progress
from cbtm_ray.config import CorpusConfig
from cbtm_ray.corpus.documents import Document, is_held_out, read_shard, unit_hash
from cbtm_ray.corpus.installed_docs import package_documents
from cbtm_ray.corpus.shards import Shard, list_shards
from cbtm_ray.errors import UserError
from cbtm_ray.manifests import CorpusCounts, CorpusManifest
from cbtm_ray.run import Run

COUNTS = ("train_documents", "valid_documents", "empty_documents", "train_bytes", "valid_bytes")
SAMPLE_SCHEMA = pa.schema([("id", pa.string()), ("domain", pa.string()), ("text", pa.string())])


def build_corpus(run: Run) -> CorpusManifest:
    """Stage `corpus/`: the shards with counts and digests, and `sample.parquet`, a uniform sample of training documents.

    The sample holds the documents with the smallest hash of (seed, id), the same whatever order the shards come in.

    Raises:
        UserError: unreadable or empty corpus, fewer training documents than clusters, or a file that changes meanwhile.
    """
    config = run.config
    if config.corpus.packages:
        write_installed_docs(run)
    corpus, shards = corpus_shards(run)
    listed = [(split, shard) for split, found in shards.items() for shard in found]
    tasks = [{"index": index, **asdict(shard), "split": split} for index, (split, shard) in enumerate(listed)]
    sample, scanned = Sample(config.corpus, config.run.seed), dict[int, dict[str, Any]]()
    with progress.bar("build_corpus", len(tasks), "shards") as done:
        for row in _map(partial(_scan, corpus=corpus, seed=config.run.seed), tasks):
            index = row.pop("index")
            for document_id in row.pop("sample_ids"):
                sample.offer(document_id, index)
            scanned[index] = row
            done(len(scanned))
    ordered = [scanned[index] for index in range(len(tasks))]
    _check_counts(ordered, config.cluster.n_clusters)
    documents = _fetch(sample, ordered, corpus)
    with files.writing(run.uri("corpus", "sample.parquet")) as stream:
        pq.write_table(pa.Table.from_pylist(documents, SAMPLE_SCHEMA), stream)
    totals: CorpusCounts = {key: sum(row[key] for row in ordered) for key in COUNTS}  # type: ignore[assignment]
    content = files.fingerprint([row["digest"] for row in ordered])
    return {**totals, "sample_documents": len(documents), "content": content, "shards": ordered}


def _map(work: Callable[[dict[str, Any]], dict[str, Any]], tasks: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """`work` of each task, in tasks of Ray Data, in the order in which they end."""
    return ray.data.from_items(tasks, override_num_blocks=len(tasks)).map(work).iter_rows()


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
        rows = _map(partial(_package_texts, max_bytes=corpus.package_bytes), tasks)
        documents = {row["package"]: row["documents"] for row in rows}
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
    """Counts, digest and the ids that can be in the sample, of one shard: few bytes, whatever its texts hold."""
    counts, digest, sample = dict.fromkeys(COUNTS, 0), hashlib.blake2b(digest_size=16), Sample(corpus, seed)
    for document in read_shard(Shard(tuple(row["uris"]), tuple(row["names"])), corpus):
        if not document.text.strip():
            counts["empty_documents"] += 1
            continue
        split = "valid" if row["split"] == "valid" or is_held_out(document.id, corpus, seed) else "train"
        counts[f"{split}_documents"] += 1
        counts[f"{split}_bytes"] += len(document.text.encode())
        digest.update(_content(document))
        if split == "train":
            sample.offer(document.id, row["index"])
    return {**row, **counts, "digest": digest.hexdigest(), "sample_ids": sample.ids()}


def read_again(row: dict[str, Any], corpus: CorpusConfig) -> Iterator[Document]:
    """The documents with text of a shard, a row of `corpus/manifest.json`.

    Raises:
        UserError: after the last one, if they are not the documents that the corpus was built from.
    """
    digest = hashlib.blake2b(digest_size=16)
    for document in read_shard(Shard(tuple(row["uris"]), tuple(row["names"])), corpus):
        if document.text.strip():
            digest.update(_content(document))
            yield document
    if row.get("digest", digest.hexdigest()) != digest.hexdigest():  # older manifests have none
        field = "corpus.valid_paths" if row["split"] == "valid" else "corpus.paths"
        names = row["names"][0] if len(row["names"]) == 1 else f"one of {row['names'][0]} to {row['names'][-1]}"
        raise UserError(
            f"{field}: {names} changed after the corpus was built. Restore the file, or start again in another run.dir."
        )


def _content(document: Document) -> bytes:
    return "\0".join((document.id, document.domain or "", document.text, "")).encode()


def _fetch(sample: Sample, shards: list[dict[str, Any]], corpus: CorpusConfig) -> list[dict[str, Any]]:
    """The sample's documents by hash, out of the shards that hold one."""
    wanted = defaultdict[int, list[str]](list)
    for document_id, index in sample.shards.items():
        wanted[index].append(document_id)
    tasks, found = [{**shards[index], "ids": ids} for index, ids in wanted.items()], dict[str, dict[str, Any]]()
    with progress.bar("read the sample", len(tasks), "shards") as done:
        for number, row in enumerate(_map(partial(_pick, corpus=corpus), tasks), start=1):
            found.update((document["id"], document) for document in row["documents"])
            done(number)
    return [found[document_id] for document_id in sample.ids()]


def _pick(row: dict[str, Any], corpus: CorpusConfig) -> dict[str, Any]:
    wanted = set(row["ids"])
    return {"documents": [asdict(document) for document in read_again(row, corpus) if document.id in wanted]}


class Sample:
    """The `corpus.sample_documents` ids of smallest hash among those offered; `shards` is the number of the shard of each."""

    def __init__(self, corpus: CorpusConfig, seed: int) -> None:
        self._corpus, self._seed = corpus, seed
        self.shards: dict[str, int] = {}
        self._largest: list[tuple[float, str]] = []  # a heap of (-hash, id)

    def offer(self, document_id: str, shard: int) -> None:
        """UserError if the sample has this id already. Equal ids hash alike: both are kept, or neither."""
        if document_id in self.shards:
            raise UserError(
                f"corpus.id_column={self._corpus.id_column!r}: two documents have the id {document_id!r}. Make ids unique, or "
                "leave the field out: file and row are the id then."
            )
        self.shards[document_id] = shard
        heapq.heappush(self._largest, (-unit_hash(self._seed, document_id), document_id))
        if len(self.shards) > self._corpus.sample_documents:
            del self.shards[heapq.heappop(self._largest)[1]]

    def ids(self) -> list[str]:
        """The ids kept, by hash."""
        return [document_id for _, document_id in sorted(self._largest, key=lambda key: (-key[0], key[1]))]


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
