"""The corpus, read through Ray Data: checked, counted, split, and sampled for the fits that follow.

The first reading sends counts and ids to the driver, which chooses the sample; a second one fetches the chosen documents.
Every later reading of a shard is compared with the first by a digest of the shard's documents.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import ray

from cbtm_ray import files, progress
from cbtm_ray.config import CorpusConfig
from cbtm_ray.corpus.documents import content_of, is_held_out, read_shard
from cbtm_ray.corpus.duplicates import among, distinct, text_hash, write_held_out
from cbtm_ray.corpus.installed_docs import package_documents
from cbtm_ray.corpus.sample import Sample, write_sample
from cbtm_ray.corpus.shards import Shard, list_corpus, say_left_out
from cbtm_ray.errors import UserError
from cbtm_ray.manifests import CorpusCounts, CorpusManifest
from cbtm_ray.run import Run

COUNTS = (
    "train_documents", "valid_documents", "empty_documents", "train_bytes", "valid_bytes", "held_out_duplicates",
)  # fmt: skip


def build_corpus(run: Run) -> CorpusManifest:
    """Stage `corpus/`: the shards with counts and digests, and `sample.parquet`, a uniform sample of training documents.

    The sample holds the documents with the smallest hash of (seed, id), the same whatever order the shards come in.

    Raises:
        UserError: unreadable or empty corpus, fewer training documents than clusters, or a file that changes meanwhile.
    """
    config = run.config
    if config.corpus.packages:
        write_installed_docs(run)
    corpus = corpus_to_read(run)
    found, left_out = list_corpus(corpus)
    listed = [(split, shard) for split, shards in found.items() for shard in shards]
    tasks = [{"index": index, **asdict(shard), "split": split} for index, (split, shard) in enumerate(listed)]
    known_M = np.empty(0, np.uint64)
    if corpus.deduplicate == "exact":
        _, _, known_M = _scan_all([task for task in tasks if task["split"] == "valid"] or tasks, corpus, run, known_M)
    rows, sample, held_out_M = _scan_all(tasks, corpus, run, known_M)
    if corpus.deduplicate == "exact" and not np.array_equal(known_M, held_out_M):
        raise UserError("corpus.paths: a file changed while the corpus was built. Give the same command again.")
    _check_counts(rows, config.cluster.n_clusters)
    write_sample(run, sample, rows, corpus)
    if corpus.deduplicate == "exact":
        write_held_out(run, known_M)
    totals: CorpusCounts = {key: sum(row[key] for row in rows) for key in COUNTS}  # type: ignore[assignment]
    return {
        **totals,
        "sample_documents": len(sample.shards),
        "deduplicate": corpus.deduplicate,
        "left_out": left_out,
        "content": files.fingerprint([row["digest"] for row in rows]),
        "shards": rows,
    }


def summary(manifest: dict[str, Any]) -> str:
    """The line of a finished corpus."""
    line = (
        "{train_documents:,} documents, {train_bytes:,} bytes; {valid_documents:,} held out; {empty_documents:,} empty"
    ).format(**manifest)
    if (count := manifest.get("held_out_duplicates")) is not None:  # older manifests have none
        done = (
            "dropped" if manifest["deduplicate"] == "exact" else "corpus.deduplicate=exact drops them" if count else ""
        )
        line += f"; {count:,} training texts equal to held-out ones{f' ({done})' if count else ''}"
    return line + (f"; files left out: {said}" if (said := say_left_out(manifest.get("left_out", {}))) else "")


def _scan_all(
    tasks: list[dict[str, Any]], corpus: CorpusConfig, run: Run, known_M: np.ndarray
) -> tuple[list[dict[str, Any]], Sample, np.ndarray]:
    """Every shard's row of the manifest, the sample, and the hashes of the held-out texts.

    Training documents among the texts of hashes `known_M` are left out. Hashes of training texts wait in Ray's object store,
    not in the driver, until those of all held-out texts are there.
    """
    seed, scanned, hashes = run.config.run.seed, dict[int, dict[str, Any]](), dict[int, ray.ObjectRef]()
    sample, held_out = Sample(corpus, seed), list[bytes]()
    with progress.bar("build_corpus", len(tasks), "shards") as done:
        for row in _map(partial(_scan, corpus=corpus, seed=seed, known_M=known_M), tasks):
            index = row.pop("index")
            for document_id in row.pop("sample_ids"):
                sample.offer(document_id, index)
            hashes[index] = ray.put(row.pop("train_hashes"))
            held_out.append(row.pop("valid_hashes"))
            scanned[index] = row
            done(len(scanned))
    held_out_M = distinct(held_out)
    for index, row in scanned.items():
        kept_N = np.frombuffer(ray.get(hashes.pop(index)), np.uint64)
        row["held_out_duplicates"] += int(among(kept_N, held_out_M).sum())
    return [scanned[index] for index in sorted(scanned)], sample, held_out_M


def _map(work: Callable[[dict[str, Any]], dict[str, Any]], tasks: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """`work` of each task, in tasks of Ray Data, in the order in which they end."""
    return ray.data.from_items(tasks, override_num_blocks=len(tasks)).map(work).iter_rows()


def corpus_to_read(run: Run) -> CorpusConfig:
    """How to read the documents: as configured, or the files that those of the packages were written to."""
    corpus = run.config.corpus
    if not corpus.packages:
        return corpus
    folder = run.uri("corpus", "documents")
    return replace(corpus, packages=(), paths=(folder,), id_column="id", text_column="text", domain_column="domain")


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


def _package_texts(row: dict[str, Any], max_bytes: int) -> dict[str, Any]:
    return {**row, "documents": [asdict(document) for document in package_documents(row["package"], max_bytes)]}


def _scan(row: dict[str, Any], corpus: CorpusConfig, seed: int, known_M: np.ndarray) -> dict[str, Any]:
    """Counts, digest, the ids that can be in the sample and hashes of texts, of one shard: few bytes, whatever it holds."""
    counts, digest, sample = dict.fromkeys(COUNTS, 0), hashlib.blake2b(digest_size=16), Sample(corpus, seed)
    hashes = {"train": array("Q"), "valid": array("Q")}
    for document in read_shard(Shard(tuple(row["uris"]), tuple(row["names"])), corpus):
        if not document.text.strip():
            counts["empty_documents"] += 1
            continue
        digest.update(content_of(document))
        split = "valid" if row["split"] == "valid" or is_held_out(document.id, corpus, seed) else "train"
        hashed = text_hash(document.text)
        if split == "train" and among(np.array([hashed], np.uint64), known_M)[0]:
            counts["held_out_duplicates"] += 1
            continue
        hashes[split].append(hashed)
        counts[f"{split}_documents"] += 1
        counts[f"{split}_bytes"] += len(document.text.encode())
        if split == "train":
            sample.offer(document.id, row["index"])
    found = {f"{split}_hashes": some.tobytes() for split, some in hashes.items()}
    return {**row, **counts, "digest": digest.hexdigest(), "sample_ids": sample.ids(), **found}


def _check_counts(rows: list[dict[str, Any]], n_clusters: int) -> None:
    train, valid = (sum(row[f"{split}_documents"] for row in rows) for split in ("train", "valid"))
    if train == 0:
        dropped = sum(row["held_out_duplicates"] for row in rows)
        why = f"all {dropped} texts are those of held-out documents" if dropped else "0 documents with text"
        raise UserError(f"corpus.paths: the corpus is empty, {why}. Give other files.")
    if train < n_clusters:
        raise UserError(
            f"cluster.n_clusters={n_clusters} must be at most the number of training documents, {train}. Lower it."
        )
    if valid < 2:
        raise UserError(
            f"corpus.valid_fraction leaves {valid} held-out documents, at least 2 are needed. "
            "Raise it or give corpus.valid_paths."
        )
