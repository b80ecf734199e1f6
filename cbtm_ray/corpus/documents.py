"""Reads documents {id, text, domain?} out of JSONL, Parquet and text files, a shard at a time, with errors that name the line.

A document's id is stable: its own id column, or the name of its file below the corpus path and its row. Whether it is held
out, and whether it is in the sample, are functions of the id and the seed alone, so that neither the number of workers nor
their order can change them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from cbtm_ray import files
from cbtm_ray.config import CorpusConfig
from cbtm_ray.corpus.shards import PARQUET_SUFFIX, TEXT_SUFFIX, Shard
from cbtm_ray.errors import UserError

BLOCK_BYTES = 1 << 20
_MEND = "Mend the row or take it out."


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
        except (OSError, pa.ArrowInvalid) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{name} cannot be read: {reason.rstrip('.')}. Replace the file or take it out.") from error


def _read_file(uri: str, name: str, corpus: CorpusConfig) -> Iterator[Document]:
    if name.endswith(TEXT_SUFFIX):
        yield Document(id=name, text=_decode(files.read_bytes(uri), name), domain=None)
        return
    rows = _parquet_rows(uri, name, corpus) if name.endswith(PARQUET_SUFFIX) else _json_rows(uri, name)
    for number, row in enumerate(rows, start=1):
        yield _document(row, f"{name}:{number}", corpus)


def unit_hash(seed: int, document_id: str) -> float:
    """A number in [0, 1), uniform over ids, that depends on nothing but the seed and the id."""
    digest = hashlib.blake2b(document_id.encode(), digest_size=8, key=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little") / 2**64


def is_held_out(document_id: str, corpus: CorpusConfig, seed: int) -> bool:
    return not corpus.valid_paths and unit_hash(seed, document_id) < corpus.valid_fraction


def _json_rows(uri: str, name: str) -> Iterator[dict]:
    filesystem, path = files.resolve(uri)
    with filesystem.open_input_stream(path) as stream:  # decompresses by suffix: .gz, .zst
        for number, line in enumerate(_lines(stream, name), start=1):
            if not line.strip():
                raise UserError(f"{name}:{number} is an empty line. Remove it: row numbers are document ids.")
            row = _parse_json(_decode(line, f"{name}:{number}"), f"{name}:{number}")
            if not isinstance(row, dict):
                raise UserError(f"{name}:{number} is not a JSON object with keys such as 'text'. {_MEND}")
            yield row


def _parse_json(line: str, where: str) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error.msg} at column {error.colno}. {_MEND}") from error
    except RecursionError as error:
        raise UserError(f"{where} is JSON nested too deeply. Flatten it or take it out.") from error
    except ValueError as error:  # Python's bound on the digits of a whole number
        raise UserError(f"{where} holds a number of too many digits. Make it a string or take it out.") from error


def _lines(stream: pa.NativeFile, name: str) -> Iterator[bytes]:
    """The lines of a stream. UserError after the first block of a JSON array, which can be one line of many GB."""
    parts: list[bytes] = []  # of the line whose end is still to come
    block = stream.read(BLOCK_BYTES)
    if block.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        raise UserError(
            f"{name} is a JSON array, but each line must be an object with keys such as 'text'. Give it as "
            "JSON Lines: jq -c '.[]' FILE > FILE.jsonl"
        )
    while block:
        first, *others = block.split(b"\n")
        parts.append(first)
        if others:
            yield b"".join(parts)
            *whole, rest = others
            yield from whole
            parts = [rest]
        block = stream.read(BLOCK_BYTES)
    if rest := b"".join(parts):
        yield rest


def _parquet_rows(uri: str, name: str, corpus: CorpusConfig) -> Iterator[dict]:
    filesystem, path = files.resolve(uri)
    fields = {"corpus.text_column": corpus.text_column, "corpus.domain_column": corpus.domain_column,
              "corpus.id_column": corpus.id_column}  # fmt: skip
    wanted = {field: column for field, column in fields.items() if column is not None}
    with filesystem.open_input_file(path) as stream:
        table = pq.ParquetFile(stream)
        for field, column in wanted.items():
            if column not in table.schema_arrow.names:
                raise UserError(_missing(field, column, name, table.schema_arrow.names))
        number = 1
        for batch in table.iter_batches(batch_size=1024, columns=[*wanted.values()]):
            yield from _decode_batch(batch, name, number)
            number += len(batch)


def _decode_batch(batch: pa.RecordBatch, name: str, number: int) -> list[dict]:
    """The rows of a batch that begins with row `number`; the one whose bytes are not UTF-8 is found by halving."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        if len(batch) == 1:
            raise _not_utf8(f"{name}:{number}", error) from error
        half = len(batch) // 2
        return [*_decode_batch(batch[:half], name, number), *_decode_batch(batch[half:], name, number + half)]


def _document(row: dict, position: str, corpus: CorpusConfig) -> Document:
    text = _value(row, "corpus.text_column", corpus.text_column, position)
    if not isinstance(text, str):
        raise UserError(
            f"{position}: corpus.text_column={corpus.text_column!r} holds {text!r:.100}, which is not a text. {_MEND}"
        )
    document_id, domain = position, None
    if corpus.id_column is not None:
        key = _value(row, "corpus.id_column", corpus.id_column, position)
        if key is None:
            raise UserError(
                f"{position}: corpus.id_column={corpus.id_column!r} holds None, which is not an id. {_MEND}"
            )
        document_id = str(key)
    if corpus.domain_column is not None:
        gold = _value(row, "corpus.domain_column", corpus.domain_column, position)
        domain = None if gold is None else str(gold)
    try:
        for value in (text, document_id, domain or ""):
            value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{position} holds half a surrogate pair, which UTF-8 cannot hold. {_MEND}") from error
    return Document(id=document_id, text=text, domain=domain)


def _value(row: dict, field: str, column: str, position: str) -> object:
    if column not in row:
        raise UserError(_missing(field, column, position, list(row)))
    return row[column]


def _missing(field: str, column: str, where: str, present: list[str]) -> str:
    return f"{field}={column!r} is not in {where}, which has {', '.join(present)}. Set {field} to one of these."


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(where, error) from error


def _not_utf8(where: str, error: UnicodeDecodeError) -> UserError:
    byte = error.object[error.start]
    return UserError(f"{where} is not UTF-8: byte 0x{byte:02x} at position {error.start}. Re-encode the file.")
