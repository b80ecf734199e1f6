"""A uniform sample of the training documents: chosen by ids and hashes, then fetched and written once.

The driver holds ids while it chooses, and the texts of the chosen documents alone.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from cbtm_ray import files, progress
from cbtm_ray.config import CorpusConfig
from cbtm_ray.corpus.documents import read_again, unit_hash
from cbtm_ray.errors import UserError
from cbtm_ray.run import Run

SAMPLE_SCHEMA = pa.schema([("id", pa.string()), ("domain", pa.string()), ("text", pa.string())])
SAMPLE_BATCH_CHARACTERS = 1 << 24  # Arrow's string arrays hold at most 2 GiB of UTF-8 each


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


def write_sample(run: Run, sample: Sample, shards: list[dict[str, Any]], corpus: CorpusConfig) -> None:
    """`sample.parquet`: the sample's documents by hash, out of the shards that hold one."""
    wanted = defaultdict[int, list[str]](list)
    for document_id, index in sample.shards.items():
        wanted[index].append(document_id)
    tasks, found = [{**shards[index], "ids": ids} for index, ids in wanted.items()], dict[str, dict[str, Any]]()
    picked = ray.data.from_items(tasks, override_num_blocks=len(tasks)).flat_map(partial(_pick, corpus=corpus))
    with progress.bar("read the sample", len(sample.shards), "documents") as done:
        for document in picked.iter_rows():
            found[document["id"]] = document
            done(len(found))
    batches = list(_batches(found.pop(document_id) for document_id in sample.ids()))
    with files.writing(run.uri("corpus", "sample.parquet")) as stream:
        pq.write_table(pa.Table.from_batches(batches, SAMPLE_SCHEMA), stream)


def _batches(documents: Iterable[dict[str, Any]]) -> Iterator[pa.RecordBatch]:
    waiting, characters = list[dict[str, Any]](), 0
    for document in documents:
        waiting.append(document)
        characters += len(document["text"])
        if characters >= SAMPLE_BATCH_CHARACTERS:
            yield pa.RecordBatch.from_pylist(waiting, SAMPLE_SCHEMA)
            waiting, characters = [], 0
    yield pa.RecordBatch.from_pylist(waiting, SAMPLE_SCHEMA)


def _pick(row: dict[str, Any], corpus: CorpusConfig) -> Iterator[dict[str, Any]]:
    wanted = set(row["ids"])
    return (asdict(document) for document in read_again(row, corpus) if document.id in wanted)


def read_sample(run: Run) -> pa.Table:
    """The sample of training documents: columns id, domain, text."""
    filesystem, path = files.resolve(run.uri("corpus", "sample.parquet"))
    return pq.read_table(path, filesystem=filesystem)


def sample_texts(run: Run) -> Iterator[str]:
    """The texts of the sample, of which Python holds a few at a time."""
    for batch in read_sample(run).to_batches(max_chunksize=256):
        yield from batch.column("text").to_pylist()
