"""Packing as a pure function of the position, and reading one cluster's documents."""

from __future__ import annotations

import itertools
import mmap
import weakref
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cbtm_ray import files
from cbtm_ray.cluster import partition
from cbtm_ray.errors import UserError
from cbtm_ray.train.packed_sequences import PackedSequences, read_documents


def packed(documents: list[list[int]], length: int, seed: int = 0) -> PackedSequences:
    arrays = [np.array(document, np.int32) for document in documents]
    return PackedSequences(arrays, sequence_length=length, end_of_text=0, seed=seed)


def numbered(lengths: list[int]) -> list[list[int]]:
    """Documents of these lengths in which every token stands once: 1, 2, 3, ..."""
    ends = np.cumsum(lengths)
    return [list(range(end - length + 1, end + 1)) for end, length in zip(ends, lengths, strict=True)]


def test_one_document_is_cut_into_sequences_that_overlap_by_one() -> None:
    """The stream 0 | 1 2 3 4 5 6 0 has two sequences of 3 targets; the last 0 is dropped."""
    sequences = packed([[1, 2, 3, 4, 5, 6]], 3)
    assert sequences.per_epoch == 2
    assert sorted(sequences.sequence(n).tolist() for n in range(2)) == [[0, 1, 2, 3], [3, 4, 5, 6]]


def test_documents_are_joined_by_end_of_text_in_either_order() -> None:
    """Two documents of 2 tokens and their ends make 6 targets, whichever comes first."""
    epochs = set()
    sequences = packed([[1, 2], [3, 4]], 3)
    for epoch in range(20):
        epochs.add(tuple(sorted(tuple(sequences.sequence(2 * epoch + n).tolist()) for n in range(2))))
    assert epochs == {((0, 1, 2, 0), (0, 3, 4, 0))}
    streams = {tuple(packed([[1, 2], [3]], 5, seed).sequence(0).tolist()) for seed in range(20)}
    assert streams == {(0, 1, 2, 0, 3, 0), (0, 3, 0, 1, 2, 0)}


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=12),
    length=st.integers(1, 9),
    seed=st.integers(0, 99),
    epoch=st.integers(0, 5),
)
def test_every_token_is_a_target_once_an_epoch_up_to_the_tail(
    lengths: list[int], length: int, seed: int, epoch: int
) -> None:
    total = sum(lengths) + len(lengths)
    if total < length:
        return
    sequences = packed(numbered(lengths), length, seed)
    assert sequences.per_epoch == total // length
    rows = sequences.batch(epoch * sequences.per_epoch, sequences.per_epoch)
    assert rows.shape == (total // length, length + 1)
    targets = Counter(rows[:, 1:].ravel().tolist())
    ends = targets.pop(0, 0)
    assert set(targets) <= set(range(1, sum(lengths) + 1))
    assert set(targets.values()) <= {1}
    assert ends <= len(lengths)
    assert ends + len(targets) == total - total % length
    for row in rows:  # inside a document each token follows the one before it
        assert all(b in (a + 1, 0) or a == 0 for a, b in itertools.pairwise(row))


def test_a_position_gives_the_same_in_any_order_of_access() -> None:
    documents = numbered([5, 9, 3, 7, 11])
    positions = np.random.default_rng(0).permutation(60)
    forward = packed(documents, 4)
    expected = [forward.sequence(n).tolist() for n in range(60)]
    jumping = packed(documents, 4)
    assert {int(n): jumping.sequence(int(n)).tolist() for n in positions} == dict(enumerate(expected))


def test_a_batch_is_its_sequences_also_across_the_end_of_an_epoch() -> None:
    sequences = packed(numbered([5, 9, 3]), 4)
    first = sequences.per_epoch - 2
    batch = sequences.batch(first, 5)
    assert batch.dtype == np.int64
    assert batch.tolist() == [sequences.sequence(first + row).tolist() for row in range(5)]


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=12),
    length=st.integers(1, 9),
    seed=st.integers(0, 99),
    epoch=st.integers(0, 3),
)
def test_sequences_are_cut_from_one_stream_of_the_documents_in_the_epochs_order(
    lengths: list[int], length: int, seed: int, epoch: int
) -> None:
    if sum(lengths) + len(lengths) < length:
        return
    documents = numbered(lengths)
    sequences = packed(documents, length, seed)
    random = np.random.default_rng([seed, epoch])
    stream = [0, *(token for d in random.permutation(len(documents)) for token in [*documents[d], 0])]
    order = random.permutation(sequences.per_epoch)
    expected = [stream[start * length : start * length + length + 1] for start in order]
    assert sequences.batch(epoch * sequences.per_epoch, sequences.per_epoch).tolist() == expected


def test_tokens_are_read_as_they_come_and_mapped_from_a_file() -> None:
    given, alive = [], []

    def documents() -> Iterator[np.ndarray]:
        for n in range(5):
            alive.append(sum(reference() is not None for reference in given))
            document = np.array([n + 1] * 4, np.int32)
            given.append(weakref.ref(document))
            yield document
            del document

    sequences = PackedSequences(documents(), sequence_length=5, end_of_text=0, seed=0)
    assert max(alive) <= 1
    owner: Any = sequences.tokens
    while isinstance(owner, np.ndarray):
        owner = owner.base
    assert isinstance(owner, mmap.mmap)
    assert sequences.tokens.tolist() == [token for n in range(5) for token in [n + 1] * 4 + [0]]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_full_disk_for_tokens_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.TemporaryFile", partial(open, "/dev/full", "r+b", buffering=0))
    with pytest.raises(UserError, match="has no space left for an expert's tokens, 4 bytes each"):
        packed([[1, 2, 3]], 2)


def test_epochs_and_seeds_differ() -> None:
    documents = numbered([4] * 20)

    def epoch(number: int, seed: int) -> list[list[int]]:
        sequences = packed(documents, 5, seed)
        return sequences.batch(number * sequences.per_epoch, sequences.per_epoch).tolist()

    seen = [epoch(0, 0), epoch(1, 0), epoch(0, 1)]
    assert len({str(rows) for rows in seen}) == 3
    assert (
        len({str(sorted(rows)) for rows in seen}) == 1
    )  # documents of 5 targets fill sequences of 5, whatever the order


def test_sequences_of_an_epoch_are_shuffled() -> None:
    sequences = packed(numbered([500]), 5)
    starts = [int(sequences.sequence(n)[1]) for n in range(100)]
    assert sorted(starts) == list(range(1, 501, 5))
    assert starts != sorted(starts)


@pytest.mark.parametrize(("documents", "tokens"), [([[1, 2], [3]], 5), ([], 0)])
def test_too_short_a_corpus_is_refused(documents: list[list[int]], tokens: int) -> None:
    message = rf"tokens\.sequence_length=6 must be at most the tokens of a cluster's documents, {tokens}\. Lower it"
    with pytest.raises(UserError, match=message):
        packed(documents, 6)


def test_a_corpus_of_one_sequence_is_enough() -> None:
    assert packed([[1, 2], [3]], 5).per_epoch == 1


def write_shard(uri: str, rows: list[tuple[int, list[int]]]) -> None:
    """A shard as partitioning writes it, of (cluster, tokens)."""
    with partition._writing(uri) as writer:
        output = partition._Output(writer, n_clusters=4)
        for n, (cluster, tokens) in enumerate(rows):
            ids = np.array(tokens, np.int32)
            output.add({"id": f"{uri}:{n}", "domain": None, "cluster": cluster, "text_bytes": 9, "tokens": ids})
        output.close()


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_one_clusters_documents_are_read_in_the_order_of_the_shards(tmp_path: Path, scheme: str) -> None:
    shards = f"{scheme}{tmp_path}/shards"
    write_shard(files.join(shards, "train", "part-00001.parquet"), [(0, [7]), (2, [8, 9])])
    write_shard(files.join(shards, "train", "part-00000.parquet"), [(2, [5]), (0, [1, 2, 3]), (2, [6, 6]), (1, [4])])
    write_shard(files.join(shards, "valid", "part-00000.parquet"), [(2, [99])])

    def read(split: str, cluster: int | None) -> list[list[int]]:
        return [document.tolist() for document in read_documents(shards, split, cluster)]

    assert read("train", 0) == [[1, 2, 3], [7]]
    assert read("train", 1) == [[4]]
    assert read("train", 2) == [[5], [6, 6], [8, 9]]
    assert read("train", 3) == []
    assert read("train", None) == [[1, 2, 3], [4], [5], [6, 6], [7], [8, 9]]
    assert read("valid", 2) == [[99]]
    assert all(document.dtype == np.int32 for document in read_documents(shards, "train", 2))


def write_named(path: Path, ids: list[str], **columns: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": ids, **columns}), path)


def two_shards_and_a_partition(folder: Path) -> None:
    """Documents a, b, c and d, e; the partition has a, c and e in its cluster 1."""
    write_named(folder / "train" / "part-00000.parquet", ["a", "b", "c"], tokens=[[1], [2, 2], [3]], cluster=[0, 0, 1])
    write_named(folder / "train" / "part-00001.parquet", ["d", "e"], tokens=[[4], [5, 5]], cluster=[0, 1])
    write_named(folder / "random" / "part-00000.parquet", ["a", "b", "c"], cluster=[1, 0, 1])
    write_named(folder / "random" / "part-00001.parquet", ["d", "e"], cluster=[0, 1])


def test_a_partition_says_whose_documents_are_read(tmp_path: Path) -> None:
    two_shards_and_a_partition(tmp_path)

    def read(cluster: int) -> list[list[int]]:
        return [document.tolist() for document in read_documents(str(tmp_path), "train", cluster, f"{tmp_path}/random")]

    assert read(0) == [[2, 2], [4]]
    assert read(1) == [[1], [3], [5, 5]]
    assert read(2) == []


@pytest.mark.parametrize("ids", [["e", "d"], ["d"], ["d", "e", "f"]])
def test_a_partition_of_other_documents_is_refused(tmp_path: Path, ids: list[str]) -> None:
    two_shards_and_a_partition(tmp_path)
    write_named(tmp_path / "random" / "part-00001.parquet", ids, cluster=[0] * len(ids))
    with pytest.raises(UserError, match=r"random does not name the documents of .*part-00001\.parquet\. Delete it"):
        list(read_documents(str(tmp_path), "train", 0, f"{tmp_path}/random"))


def test_files_aside_are_no_shards(tmp_path: Path) -> None:
    write_shard(str(tmp_path / "train" / "part-00000.parquet"), [(0, [1, 2])])
    (tmp_path / "train" / ".part-00001.parquet.1a2b3c4d").write_bytes(b"half")
    assert [document.tolist() for document in read_documents(str(tmp_path), "train", None)] == [[1, 2]]
