"""Reads documents {id, text, domain?} out of JSONL, Parquet and text files, a shard at a time, with errors that name the line.

A document's id is stable: its own id column, or the name of its file below the corpus path and its row. Whether it is held
out, and whether it is in the sample, are functions of the id and the seed alone, so that neither the number of workers nor
their order can change them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cbtm_ray import files
from cbtm_ray.config import CorpusConfig
from cbtm_ray.corpus.json_lines import json_rows
from cbtm_ray.corpus.opening import (
    BOM,
    LFS_POINTER,
    MEND,
    UNREADABLE,
    check_head,
    not_utf8,
    open_decompressed,
    unreadable,
)
from cbtm_ray.corpus.shards import PARQUET_ENDING, TEXT_ENDING, Shard, endings
from cbtm_ray.errors import UserError

TEXT, DOMAIN, ID = "corpus.text_column", "corpus.domain_column", "corpus.id_column"
_NOT_FOR_PYTHON = (ValueError, OverflowError, KeyError)
"""What Arrow raises for bytes that are not UTF-8, times outside the years 1 to 9999 and time zones that nobody knows."""


@dataclass(frozen=True)
class Document:
    id: str
    text: str
    domain: str | None


def read_shard(shard: Shard, corpus: CorpusConfig) -> Iterator[Document]:
    """Every document of a shard, in the order of its files and rows.

    Raises:
        UserError: undecodable bytes, malformed JSON, a missing column, a text that is not a string, or a value that UTF-8
            cannot hold, with file and line.
    """
    for uri, name in zip(shard.uris, shard.names, strict=True):
        try:
            yield from _read_file(uri, name, corpus)
        except UNREADABLE as error:
            if files.refusal(error):  # the store is away: nothing is wrong with the file
                raise
            raise unreadable(uri, name, error) from error


def read_again(row: dict[str, Any], corpus: CorpusConfig) -> Iterator[Document]:
    """The documents with text of a shard, a row of `corpus/manifest.json`.

    Raises:
        UserError: after the last one, if they are not the documents that the corpus was built from.
    """
    digest = hashlib.blake2b(digest_size=16)
    for document in read_shard(Shard(tuple(row["uris"]), tuple(row["names"])), corpus):
        if document.text.strip():
            digest.update(content_of(document))
            yield document
    if row.get("digest", digest.hexdigest()) != digest.hexdigest():  # older manifests have none
        field = "corpus.valid_paths" if row["split"] == "valid" else "corpus.paths"
        names = row["names"][0] if len(row["names"]) == 1 else f"one of {row['names'][0]} to {row['names'][-1]}"
        raise UserError(
            f"{field}: {names} changed after the corpus was built. Restore the file, or start again in another run.dir."
        )


def content_of(document: Document) -> bytes:
    return "\0".join((document.id, document.domain or "", document.text, "")).encode()


def _read_file(uri: str, name: str, corpus: CorpusConfig) -> Iterator[Document]:
    ending, codec = endings(name)
    if ending == TEXT_ENDING:
        yield Document(id=name, text=_whole_text(uri, name, codec), domain=None)
        return
    columns = _columns(corpus)
    rows = _parquet_rows(uri, name, columns) if ending == PARQUET_ENDING else json_rows(uri, name, codec)
    for number, row in enumerate(rows, start=1):
        yield _document(row, f"{name}:{number}", columns)


def _whole_text(uri: str, name: str, codec: str | None) -> str:
    with open_decompressed(uri, codec) as stream:
        data = stream.read()
    check_head(data[: len(LFS_POINTER)], name)
    try:
        return data.removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(name, error) from error


def unit_hash(seed: int, document_id: str) -> float:
    """A number in [0, 1), uniform over ids, that depends on nothing but the seed and the id."""
    digest = hashlib.blake2b(document_id.encode(), digest_size=8, key=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little") / 2**64


def is_held_out(document_id: str, corpus: CorpusConfig, seed: int) -> bool:
    return not corpus.valid_paths and unit_hash(seed, document_id) < corpus.valid_fraction


def _columns(corpus: CorpusConfig) -> dict[str, str]:
    """The columns to be read, by the field that names each."""
    fields = {TEXT: corpus.text_column, DOMAIN: corpus.domain_column, ID: corpus.id_column}
    return {field: column for field, column in fields.items() if column is not None}


def _parquet_rows(uri: str, name: str, columns: dict[str, str]) -> Iterator[dict]:
    filesystem, path = files.resolve(uri)
    with filesystem.open_input_file(path) as stream:
        table = pq.ParquetFile(stream)
        for field, column in columns.items():
            if column not in table.schema_arrow.names:
                raise UserError(_missing(field, column, name, table.schema_arrow.names))
        number = 1
        for batch in table.iter_batches(batch_size=1024, columns=[*columns.values()]):
            yield from _decode_batch(batch, name, number, columns)
            number += len(batch)


def _decode_batch(batch: pa.RecordBatch, name: str, number: int, columns: dict[str, str]) -> list[dict]:
    """The rows of a batch that begins with row `number`; the one that Python cannot hold is found by halving."""
    try:
        return batch.to_pylist()
    except _NOT_FOR_PYTHON:
        if len(batch) == 1:
            raise _bad_value(batch, f"{name}:{number}", columns) from None
        half = len(batch) // 2
        first = _decode_batch(batch[:half], name, number, columns)
        return [*first, *_decode_batch(batch[half:], name, number + half, columns)]


def _bad_value(row: pa.RecordBatch, where: str, columns: dict[str, str]) -> UserError:
    """What is wrong with the one row, by the first column that cannot be read."""
    for field, column in columns.items():
        try:
            row.column(column).to_pylist()
        except UnicodeDecodeError as error:
            return not_utf8(f"{where}: {field}={column!r}", error)
        except _NOT_FOR_PYTHON as error:
            return UserError(f"{where}: {field}={column!r} holds a value that cannot be read: {error}. {MEND}")
    raise AssertionError(f"{where} is refused as a row, but none of its columns is")


def _document(row: dict, position: str, columns: dict[str, str]) -> Document:
    found = {field: _value(row, field, column, position) for field, column in columns.items()}
    text = found[TEXT]
    if not isinstance(text, str):
        raise UserError(f"{position}: {TEXT}={columns[TEXT]!r} holds {text!r:.100}, which is not a text. {MEND}")
    if found.get(ID, position) is None:
        raise UserError(f"{position}: {ID}={columns[ID]!r} holds None, which is not an id. {MEND}")
    values = {field: str(value) for field, value in found.items() if value is not None}
    for field, value in values.items():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{position}: {field}={columns[field]!r} holds half a surrogate pair, which UTF-8 cannot hold. {MEND}"
            ) from error
    return Document(id=values.get(ID, position), text=text, domain=values.get(DOMAIN))


def _value(row: dict, field: str, column: str, position: str) -> object:
    if column not in row:
        raise UserError(_missing(field, column, position, list(row)))
    return row[column]


def _missing(field: str, column: str, where: str, present: list[str]) -> str:
    return f"{field}={column!r} is not in {where}, which has {', '.join(present)}. Set {field} to one of these."
