"""Training documents whose text is, character by character, that of a held-out document: counted, and left out if wanted.

Texts are compared by 8-byte hashes, which differ for two texts but for a chance of 5e-20. Memory holds those of all held-out
texts and of one shard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from cbtm_ray import files
from cbtm_ray.corpus.documents import Document, is_held_out
from cbtm_ray.run import Run


def text_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def distinct(hashes: list[bytes]) -> np.ndarray:
    """Hashes of several shards (uint64 as bytes) without repeats, in order."""
    return np.unique(np.frombuffer(b"".join(hashes), np.uint64))


def among(hashes_N: np.ndarray, known_M: np.ndarray) -> np.ndarray:
    """Which of some hashes are known; known_M is in order, from `distinct`."""
    if len(known_M) == 0:
        return np.zeros(len(hashes_N), bool)
    return known_M[np.searchsorted(known_M, hashes_N).clip(max=len(known_M) - 1)] == hashes_N


def write_held_out(run: Run, known_M: np.ndarray) -> None:
    """Keep the hashes of the held-out texts for the stages that read the documents again."""
    files.write_array(run.uri("corpus", "held_out_texts.npy"), known_M)


def drop_duplicates(run: Run, row: dict[str, Any], documents: Iterator[Document]) -> Iterator[Document]:
    """The documents of a shard, a row of `corpus/manifest.json`, without those that `corpus.deduplicate` leaves out."""
    corpus = run.config.corpus
    if corpus.deduplicate == "none" or row["held_out_duplicates"] == 0:
        yield from documents
        return
    known_M = files.read_array(run.uri("corpus", "held_out_texts.npy"))
    for document in documents:
        held_out = row["split"] == "valid" or is_held_out(document.id, corpus, run.config.run.seed)
        if held_out or not among(np.array([text_hash(document.text)], np.uint64), known_M)[0]:
            yield document
