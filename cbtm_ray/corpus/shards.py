"""Lists the files of a corpus as shards: a shard is a file, or several small text files, that one task reads at once.

A file counts once, whatever links, hard links or paths lead to it: a text read twice would be trained on twice, and held out
and trained on at once. Files that are not read are counted by the reason.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pyarrow import fs

from cbtm_ray import files
from cbtm_ray.config import CorpusConfig
from cbtm_ray.errors import UserError

JSON_ENDINGS, TEXT_ENDING, PARQUET_ENDING = (".jsonl", ".ndjson", ".json"), ".txt", ".parquet"
CODECS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bz2", ".xz": "xz"}
TEXT_SHARD_BYTES = 64 << 20
HIDDEN, AGAIN, DANGLING = "with a name in _ or .", "met again by a link or another path", "links to nothing"

LeftOut = dict[str, dict[str, Any]]
"""Why files are not read -> how many `files`, and the name of the `first`."""


@dataclass(frozen=True)
class Shard:
    """Files that one task reads, as URIs, with the name of each below the corpus path."""

    uris: tuple[str, ...]
    names: tuple[str, ...]


@dataclass(frozen=True)
class _File:
    name: str
    """Below the corpus path, with / between folders: part of the ids of its documents."""
    uri: str
    given: str
    """The corpus path, as the user gave it."""
    real: object
    """Equal for all ways to one file."""
    linked: bool


def endings(name: str) -> tuple[str, str | None]:
    """The ending that says what a file holds, in lower case, and the codec that it is compressed with, if any."""
    stem, ending = posixpath.splitext(name.lower())
    return (posixpath.splitext(stem)[1], CODECS[ending]) if ending in CODECS else (ending, None)


def is_document(name: str) -> bool:
    ending, codec = endings(name)
    return ending in (*JSON_ENDINGS, TEXT_ENDING) or (ending == PARQUET_ENDING and codec is None)


def list_shards(paths: tuple[str, ...], field: str = "corpus.paths") -> list[Shard]:
    """The shards of the files below some paths in a fixed order: one a file, text files together up to 64 MiB.

    Raises:
        UserError: a path that does not exist, a folder without documents, two files of one name, a name not in UTF-8, a link
            to a folder above it, or to a document that is not there.
    """
    return _group(_once(_find(paths, field, {}), field, {}))


def list_corpus(corpus: CorpusConfig) -> tuple[dict[str, list[Shard]], LeftOut]:
    """The shards by split, where those of `valid` are held out whole, and the files that are not read.

    Raises:
        UserError: as `list_shards`, or a held-out file that is among the others too.
    """
    left_out: LeftOut = {}
    found = {"train": _find(corpus.paths, "corpus.paths", left_out)}
    if corpus.valid_paths:
        found["valid"] = _find(corpus.valid_paths, "corpus.valid_paths", left_out)
        _check_apart(found["train"], found["valid"])
    fields = {"train": "corpus.paths", "valid": "corpus.valid_paths"}
    return {split: _group(_once(some, fields[split], left_out)) for split, some in found.items()}, left_out


def _check_apart(train: list[_File], valid: list[_File]) -> None:
    trained_on = {file.real: file for file in train}
    for file in valid:
        if (same := trained_on.get(file.real)) is not None:
            raise UserError(
                f"corpus.valid_paths={file.given} and corpus.paths={same.given} both hold {same.uri}: held-out documents "
                "would be trained on. Give folders apart, such as data/train and data/valid."
            )


def _find(paths: tuple[str, ...], field: str, left_out: LeftOut) -> list[_File]:
    """The documents' files below every path, the same file as often as it is met."""
    found: list[_File] = []
    for given in paths:
        with files.reaching(field, given):
            below = [file for file in _below(given, field, left_out) if _is_read(file.name, left_out)]
        for file in below:
            _check_name(file, field)
        if not below:
            there = f", but {said}" if (said := say_left_out(left_out)) else ""
            raise UserError(
                f"{field}: {given} holds no documents{there}. Give files or folders with {', '.join(JSON_ENDINGS)} "
                f"or {TEXT_ENDING}, also with {', '.join(CODECS)}, or with {PARQUET_ENDING}."
            )
        found += below
    return found


def _is_read(name: str, left_out: LeftOut) -> bool:
    if is_document(name):
        return True
    ending = posixpath.splitext(name.lower())[1]
    _leave_out(left_out, f"with {ending}" if ending else "without an ending", name)
    return False


def _check_name(file: _File, field: str) -> None:
    try:
        file.name.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{field}: {file.given} holds a file whose name is not UTF-8. Rename the file {os.fsencode(file.name)!r}."
        ) from error


def _below(given: str, field: str, left_out: LeftOut) -> Iterator[_File]:
    path = files.absolute(given)
    filesystem, inner = files.resolve(path)
    is_local = isinstance(filesystem, fs.LocalFileSystem)
    kind = filesystem.get_file_info(inner).type
    if kind == fs.FileType.NotFound:
        if is_local and os.path.islink(inner):
            raise _dangling(inner, field)
        raise UserError(f"{field}: {given} does not exist. Give a file or folder that does.")
    if kind == fs.FileType.File:
        yield _file(posixpath.basename(inner), path, given, inner, inner if is_local else None)
        return
    real = os.path.realpath(inner) if is_local else ""
    for name in _walk(inner, "", (real,), field, left_out) if is_local else _stored(filesystem, inner, left_out):
        expected = posixpath.join(real, name) if is_local else None
        yield _file(name, files.join(path, name), given, posixpath.join(inner, name), expected)


def _file(name: str, uri: str, given: str, inner: str, expected: str | None) -> _File:
    """`expected`: the real path if no link below the corpus path leads there; None in an object store, which has no links."""
    if expected is None:
        return _File(name, uri, given, (uri.partition("://")[0], inner.strip("/")), linked=False)
    real, status = os.path.realpath(inner), os.stat(inner)
    key = (status.st_dev, status.st_ino) if status.st_nlink > 1 else real  # only hard links share a number for sure
    return _File(name, uri, given, key, linked=real != expected)


def _walk(folder: str, below: str, above: tuple[str, ...], field: str, left_out: LeftOut) -> Iterator[str]:
    """The names of all files below a local folder, `above` being the real folders on the way to it."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        name = posixpath.join(below, entry.name)
        if entry.name.startswith((".", "_")):
            for hidden in _files_below(entry):
                _leave_out(left_out, HIDDEN, posixpath.join(below, hidden))
        elif os.path.isdir(entry.path):
            real = os.path.realpath(entry.path)
            if any(os.path.commonpath((each, real)) == real for each in above):
                raise UserError(f"{field}: {entry.path} is a link to a folder above it, {real}. Remove the link.")
            yield from _walk(entry.path, name, (*above, real), field, left_out)
        elif os.path.isfile(entry.path):
            yield name
        elif entry.is_symlink() and not os.path.exists(entry.path):
            if is_document(entry.name):
                raise _dangling(entry.path, field)
            _leave_out(left_out, DANGLING, name)
        else:
            _leave_out(left_out, "not files", name)


def _files_below(entry: os.DirEntry[str]) -> Iterator[str]:
    if not entry.is_dir(follow_symlinks=False):
        yield entry.name
        return
    for folder, _, names in os.walk(entry.path):
        yield from (
            posixpath.join(entry.name, os.path.relpath(posixpath.join(folder, name), entry.path)) for name in names
        )


def _stored(filesystem: fs.FileSystem, folder: str, left_out: LeftOut) -> Iterator[str]:
    """The names of all files below a folder of an object store."""
    for info in filesystem.get_file_info(fs.FileSelector(folder, recursive=True)):
        name = posixpath.relpath(info.path, folder)
        if info.type == fs.FileType.File and any(part.startswith((".", "_")) for part in name.split("/")):
            _leave_out(left_out, HIDDEN, name)
        elif info.type == fs.FileType.File:
            yield name


def _dangling(path: str, field: str) -> UserError:
    return UserError(
        f"{field}: {path} is a link to {os.readlink(path)}, which is not there. Restore the file or remove the link."
    )


def _leave_out(left_out: LeftOut, reason: str, name: str) -> None:
    entry = left_out.setdefault(reason, {"files": 0, "first": os.fsencode(name).decode(errors="replace")})
    entry["files"] += 1


def say_left_out(left_out: LeftOut) -> str:
    """The numbers of the files that are not read by the reason, with a name for each; "" if all are."""
    listed = sorted(left_out.items(), key=lambda item: -item[1]["files"])
    return ", ".join(f"{entry['files']:,} {reason} ({entry['first']})" for reason, entry in listed)


def _once(found: Iterable[_File], field: str, left_out: LeftOut) -> list[tuple[str, str]]:
    """Names and URIs in order, every real file by one name: by no link if it can be, and from the path furthest above."""
    kept, names = dict[object, _File](), dict[str, _File]()
    for file in sorted(found, key=lambda file: (file.linked, -file.name.count("/"), file.name, file.uri)):
        if kept.setdefault(file.real, file) is not file:
            _leave_out(left_out, AGAIN, file.name)
        elif (other := names.setdefault(file.name, file)) is not file:
            raise UserError(
                f"{field}: two files are called {file.name}. Give the folder above both instead: {other.uri} and {file.uri}."
            )
    return sorted((file.name, file.uri) for file in kept.values())


def _group(found: list[tuple[str, str]]) -> list[Shard]:
    shards: list[Shard] = []
    texts: list[tuple[str, str]] = []
    text_bytes = 0
    for name, uri in found:
        if endings(name)[0] != TEXT_ENDING:
            shards.append(Shard((uri,), (name,)))
            continue
        filesystem, inner = files.resolve(uri)
        size = filesystem.get_file_info(inner).size
        if texts and text_bytes + size > TEXT_SHARD_BYTES:
            shards.append(_text_shard(texts))
            texts, text_bytes = [], 0
        texts.append((name, uri))
        text_bytes += size
    return [*shards, _text_shard(texts)] if texts else shards


def _text_shard(texts: list[tuple[str, str]]) -> Shard:
    return Shard(tuple(uri for _, uri in texts), tuple(name for name, _ in texts))
