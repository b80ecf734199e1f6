"""A branch's documents as training sequences, a pure function of seed, epoch and position.

B sequences, T tokens.
"""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from cbtm_ray import files
from cbtm_ray.errors import UserError

READ_AHEAD = {"batch_size": 4096, "batch_readahead": 2, "fragment_readahead": 1}
"""How much of the shards pyarrow holds in memory while they are read; its own defaults are a hundred times as much."""


class PackedSequences:
    """Documents as an endless series of training sequences of T + 1 tokens, the last being the last target.

    In an epoch the documents stand in a shuffled order, an end-of-text token after each, as one stream. The stream is
    cut into sequences that overlap by one token, so every token is a target once, and the sequences are shuffled again.
    A tail too short for a sequence is dropped from that epoch. Which tokens stand at a position depends on the seed and
    the position alone: a run that resumes at position n reads what an uninterrupted one would have.

    The tokens lie in a temporary file of 4 bytes each, and what is read of them in the system's cache of files; memory
    holds 32 bytes a document and 8 a sequence.
    """

    def __init__(self, documents: Iterable[np.ndarray], *, sequence_length: int, end_of_text: int, seed: int) -> None:
        self.tokens, self.lengths = _write_tokens(documents, end_of_text)
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.sequence_length, self.end_of_text, self.seed = sequence_length, end_of_text, seed
        self.per_epoch = len(self.tokens) // sequence_length
        if self.per_epoch == 0:
            raise UserError(
                f"tokens.sequence_length={sequence_length} must be at most the tokens of a cluster's documents, "
                f"{len(self.tokens)}. Lower it, give more documents or fewer clusters."
            )
        self._epoch: tuple[int, np.ndarray, np.ndarray, np.ndarray] | None = None

    def batch(self, position: int, batch_size: int) -> np.ndarray:
        """The sequences at positions `position` to `position + batch_size - 1`: int64 (B, T + 1)."""
        return np.stack([self.sequence(position + row) for row in range(batch_size)]).astype(np.int64)

    def sequence(self, position: int) -> np.ndarray:
        """The sequence at a position, counted over all epochs: int32 (T + 1,), beginning with the token before it."""
        epoch, within = divmod(position, self.per_epoch)
        documents, ends, order = self._shuffled(epoch)
        first = int(order[within]) * self.sequence_length
        pieces = [] if first else [np.array([self.end_of_text], np.int32)]
        at, last = max(first - 1, 0), first + self.sequence_length
        index = int(np.searchsorted(ends, at, side="right"))
        while at < last:
            end, stop = int(ends[index]), min(int(ends[index]), last)
            document_end = int(self.starts[documents[index]] + self.lengths[documents[index]])
            pieces.append(self.tokens[document_end - (end - at) : document_end - (end - stop)])
            at, index = stop, index + 1
        return np.concatenate(pieces)

    def _shuffled(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The epoch's order of documents, where each ends in its stream, and its order of sequences; the last's are kept."""
        if self._epoch is None or self._epoch[0] != epoch:
            random = np.random.default_rng([self.seed, epoch])
            documents = random.permutation(len(self.lengths))
            self._epoch = (epoch, documents, np.cumsum(self.lengths[documents]), random.permutation(self.per_epoch))
        return self._epoch[1:]


def _write_tokens(documents: Iterable[np.ndarray], end_of_text: int) -> tuple[np.ndarray, np.ndarray]:
    """All tokens, an end of text after each document, mapped from a file; and each document's length with it, int64.

    The file has no name, so that it goes with the process, however that ends.

    Raises:
        UserError: the disk is full.
    """
    lengths = []
    with tempfile.TemporaryFile() as file:
        try:
            for document in documents:
                file.write(np.append(document, end_of_text).astype(np.int32).tobytes())
                lengths.append(len(document) + 1)
            file.flush()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise UserError(
                f"TMPDIR={tempfile.gettempdir()} has no space left for an expert's tokens, 4 bytes each. Free some, or "
                "start Ray with TMPDIR on a larger disk."
            ) from error
        tokens = np.asarray(np.memmap(file, np.int32, "r")) if lengths else np.zeros(0, np.int32)
    return tokens, np.array(lengths, dtype=np.int64)


def read_documents(
    shards_uri: str, split: str, cluster: int | None, partition_uri: str | None = None
) -> Iterator[np.ndarray]:
    """Token ids of one cluster's documents, or of all (None), in the fixed order of the shards.

    Only the row groups of that cluster are read; all are, where the clusters are those of a control's `partition_uri`.
    """
    if partition_uri is not None:
        for part in files.list_files(files.join(shards_uri, split)):
            yield from _read_by_partition(part, partition_uri, cluster)
        return
    filesystem, path = files.resolve(files.join(shards_uri, split))
    dataset = ds.dataset(path, filesystem=filesystem, format="parquet")
    wanted = None if cluster is None else ds.field("cluster") == cluster
    for batch in dataset.to_batches(columns=["tokens"], filter=wanted, use_threads=False, **READ_AHEAD):
        yield from _as_documents(batch.column(0))


def check_long_enough(
    clusters: Sequence[Mapping[str, Any]], sequence_length: int, control: str | None = None, domains: Sequence[str] = ()
) -> None:
    """UserError if the training documents of a cluster, each with an end of text, make no sequence.

    Args:
        clusters: rows {cluster, documents, tokens}.
        control: whose clusters they are; None: the experts'.
        domains: names of the clusters, if they have some.
    """
    lengths = {row["cluster"]: row["tokens"] + row["documents"] for row in clusters}
    if not (short := [cluster for cluster, length in lengths.items() if length < sequence_length]):
        return
    name = f"domain {domains[short[0]]!r}" if domains else f"cluster {short[0]}"
    whose = f" of train.controls {control!r}" if control else ""
    more = f", and {len(short) - 1} more have too few" if len(short) > 1 else ""
    raise UserError(
        f"tokens.sequence_length={sequence_length} must be at most the tokens of a cluster's documents: {name}{whose} has "
        f"{lengths[short[0]]}{more}. Lower it, give more documents, or fewer clusters"
        + (" or domains." if domains else ".")
    )


def held_out_sequences(
    shards_uri: str, cluster: int | None, *, sequence_length: int, end_of_text: int, seed: int
) -> PackedSequences | None:
    """One cluster's held-out documents, or all (None), as sequences: shorter ones if the documents are, None without any."""
    documents = list(read_documents(shards_uri, "valid", cluster))
    if not documents:
        return None
    length = min(sequence_length, sum(len(tokens) + 1 for tokens in documents))
    return PackedSequences(documents, sequence_length=length, end_of_text=end_of_text, seed=seed)


def control_clusters(part_uri: str, partition_uri: str) -> pa.ChunkedArray:
    """The cluster that a control's partition gives every document of one shard, in the shard's order.

    Raises:
        UserError: the partition is of other documents.
    """
    filesystem, path = files.resolve(part_uri)
    _, partition_path = files.resolve(files.join(partition_uri, part_uri.rpartition("/")[2]))
    named = pq.read_table(partition_path, filesystem=filesystem)
    if not named["id"].equals(pq.read_table(path, columns=["id"], filesystem=filesystem)["id"]):
        raise UserError(f"{partition_uri} does not name the documents of {part_uri}. Delete it: it is made again.")
    return named["cluster"]


def _read_by_partition(part_uri: str, partition_uri: str, cluster: int | None) -> Iterator[np.ndarray]:
    """The cluster's documents of one shard."""
    filesystem, path = files.resolve(part_uri)
    member_N, position = control_clusters(part_uri, partition_uri).to_numpy() == cluster, 0
    with filesystem.open_input_file(path) as stream:
        for batch in pq.ParquetFile(stream).iter_batches(columns=["tokens"]):
            yield from _as_documents(batch["tokens"].filter(pa.array(member_N[position : position + len(batch)])))
            position += len(batch)


def _as_documents(tokens: pa.Array) -> list[np.ndarray]:
    return [np.asarray(document, dtype=np.int32) for document in tokens.to_numpy(zero_copy_only=False)]
