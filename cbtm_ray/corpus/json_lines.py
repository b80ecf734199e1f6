"""The rows of a file of JSON Lines, with errors that name the line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import BinaryIO

from cbtm_ray.corpus.opening import BOM, LFS_POINTER, MEND, check_head, not_utf8, open_decompressed
from cbtm_ray.errors import UserError

BLOCK_BYTES = 1 << 20


def json_rows(uri: str, name: str, codec: str | None) -> Iterator[dict]:
    """Each line as the object that it is. UserError names a line that is none."""
    with open_decompressed(uri, codec) as stream:
        for number, line in enumerate(_lines(stream, name), start=1):
            where, line = f"{name}:{number}", line.removeprefix(BOM)
            if not line.strip():
                raise UserError(f"{where} is an empty line. Remove it: row numbers are document ids.")
            row = _parse_json(line, where, name if number == 1 else None)
            if not isinstance(row, dict):
                raise UserError(f"{where} is not a JSON object with keys such as 'text'. {MEND}")
            yield row


def _parse_json(line: bytes, where: str, first_of: str | None) -> object:
    """`first_of`: the file, where it is the first line."""
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise not_utf8(f"{where}{_key_at_fault(line)}", error) from error
    except json.JSONDecodeError as error:
        if first_of and error.pos >= len(error.doc.rstrip()):
            raise UserError(
                f"{first_of} is pretty-printed JSON: its first line ends inside an object, but each line must be a whole one. "
                "Give it as JSON Lines: jq -c . FILE > FILE.jsonl"
            ) from error
        raise UserError(f"{where} is not JSON: {error.msg} at column {error.colno}. {MEND}") from error
    except RecursionError as error:
        raise UserError(f"{where} is JSON nested too deeply. Flatten it or take it out.") from error
    except ValueError as error:  # Python's bound on the digits of a whole number
        raise UserError(
            f"{where}{_key_at_fault(line)} holds a number of too many digits. Make it a string or take it out."
        ) from error


def _key_at_fault(line: bytes) -> str:
    """ ": 'KEY'", the first key of a JSON object that has bytes not in UTF-8 or a number too long below it; "" if none."""
    longest = sys.get_int_max_str_digits()
    try:
        row = json.loads(
            line.decode("utf-8", "surrogateescape"), parse_int=lambda n: 0 if len(n) <= longest else "\udc80"
        )
        fields = row.items() if isinstance(row, dict) else ()
        return next((f": {key!r}" for key, value in fields if not _is_utf8({key: value})), "")
    except (ValueError, RecursionError):
        return ""


def _is_utf8(value: object) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _lines(stream: BinaryIO, name: str) -> Iterator[bytes]:
    """The lines of a stream. UserError after the first block of a JSON array, which can be one line of many GB."""
    parts: list[
        bytes
    ] = []  # of the line whose end is still to come: joined once, or long lines would take quadratic time
    block = stream.read(BLOCK_BYTES).removeprefix(BOM)
    check_head(block[: len(LFS_POINTER)], name)
    if block.lstrip().startswith(b"["):
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
