"""Tokens: the tokenizer, and documents packed into training sequences as a pure function of seed, epoch and position.

B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cbtm_ray import files

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with GPT-2's splitting, and one special token that ends a document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, unk_token=END_OF_TEXT
    )


def load_tokenizer(folder_or_name: str) -> PreTrainedTokenizerBase:
    """A Hugging Face tokenizer from a folder, a URI of one, or a name.

    Raises:
        ValueError: there is none, or it has no end-of-text token to put between documents.
    """
    try:
        if files.exists(folder_or_name):
            with files.local_folder(folder_or_name) as folder:
                tokenizer = AutoTokenizer.from_pretrained(folder)
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder_or_name)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"tokens.tokenizer={folder_or_name!r} cannot be loaded: {first}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokens.tokenizer={folder_or_name!r} has no end-of-text token (eos_token). Use one that has.")
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, uri: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files.publish_folder(folder, uri)


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[np.ndarray]:
    """Token ids of each text, int32, without special tokens: a text that spells one out is text like any other."""
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    return [np.asarray(ids, dtype=np.int32) for ids in encoded]


class PackedSequences:
    """Documents as an endless series of training sequences of T + 1 tokens, the last being the last target.

    In an epoch the documents stand in a shuffled order, an end-of-text token after each, as one stream. The stream is
    cut into sequences that overlap by one token, so every token is a target once, and the sequences are shuffled again.
    A tail too short for a sequence is dropped from that epoch. Which tokens stand at a position depends on the seed and
    the position alone: a run that resumes at position n reads what an uninterrupted one would have.
    """

    def __init__(self, documents: list[np.ndarray], *, sequence_length: int, end_of_text: int, seed: int) -> None:
        ended = [np.append(document, end_of_text).astype(np.int32) for document in documents]
        self.tokens = np.concatenate(ended) if ended else np.zeros(0, np.int32)
        self.lengths = np.array([len(document) for document in ended], dtype=np.int64)
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.sequence_length, self.end_of_text, self.seed = sequence_length, end_of_text, seed
        self.per_epoch = len(self.tokens) // sequence_length
        if self.per_epoch == 0:
            raise ValueError(
                f"tokens.sequence_length={sequence_length} must be at most the tokens of a cluster's documents, "
                f"{len(self.tokens)}. Lower it, give more documents or fewer clusters."
            )
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    def batch(self, position: int, batch_size: int) -> np.ndarray:
        """The sequences at positions `position` to `position + batch_size - 1`: int64 (B, T + 1)."""
        return np.stack([self.sequence(position + row) for row in range(batch_size)]).astype(np.int64)

    def sequence(self, position: int) -> np.ndarray:
        """The sequence at a position, counted over all epochs: int32 (T + 1,), beginning with the token before it."""
        epoch, within = divmod(position, self.per_epoch)
        stream, order = self._shuffled(epoch)
        start = int(order[within]) * self.sequence_length
        return stream[start : start + self.sequence_length + 1]

    def _shuffled(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's stream, led by an end-of-text token, and the order of its sequences; kept for the last epoch."""
        if self._epoch is None or self._epoch[0] != epoch:
            random = np.random.default_rng([self.seed, epoch])
            documents = random.permutation(len(self.lengths))
            stream = np.concatenate(
                [
                    [self.end_of_text],
                    *(self.tokens[self.starts[d] : self.starts[d] + self.lengths[d]] for d in documents),
                ]
            ).astype(np.int32)
            self._epoch = (epoch, stream, random.permutation(self.per_epoch))
        return self._epoch[1], self._epoch[2]


def read_documents(
    shards_uri: str, split: str, cluster: int | None, partition_uri: str | None = None
) -> list[np.ndarray]:
    """Token ids of one cluster's documents, or of all (None), in the fixed order of the shards.

    Only the row groups of that cluster are read; all are, where the clusters are those of a control's `partition_uri`.
    """
    if partition_uri is not None:
        parts = files.list_files(files.join(shards_uri, split))
        return [document for part in parts for document in _read_by_partition(part, partition_uri, cluster)]
    filesystem, path = files.resolve(files.join(shards_uri, split))
    dataset = ds.dataset(path, filesystem=filesystem, format="parquet")
    wanted = None if cluster is None else ds.field("cluster") == cluster
    batches = dataset.to_batches(columns=["tokens"], filter=wanted, use_threads=False)
    return [document for batch in batches for document in _as_documents(batch.column(0))]


def _read_by_partition(part_uri: str, partition_uri: str, cluster: int | None) -> Iterator[np.ndarray]:
    """The cluster's documents of one shard, whose rows the partition names in the same order, each with its cluster."""
    filesystem, path = files.resolve(part_uri)
    _, partition_path = files.resolve(files.join(partition_uri, part_uri.rpartition("/")[2]))
    named = pq.read_table(partition_path, filesystem=filesystem)
    if not named["id"].equals(pq.read_table(path, columns=["id"], filesystem=filesystem)["id"]):
        raise ValueError(f"{partition_uri} does not name the documents of {part_uri}. Delete it: it is made again.")
    member_N, position = named["cluster"].to_numpy() == cluster, 0
    with filesystem.open_input_file(path) as stream:
        for batch in pq.ParquetFile(stream).iter_batches(columns=["tokens"]):
            yield from _as_documents(batch["tokens"].filter(pa.array(member_N[position : position + len(batch)])))
            position += len(batch)


def _as_documents(tokens: pa.Array) -> list[np.ndarray]:
    return [np.asarray(document, dtype=np.int32) for document in tokens.to_numpy(zero_copy_only=False)]
