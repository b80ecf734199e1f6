"""Lists the files of a corpus as shards: a shard is a file, or several small text files, that one task reads at once."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass

from pyarrow import fs

from cbtm_ray import files
from cbtm_ray.errors import UserError

JSON_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst")
TEXT_SUFFIX, PARQUET_SUFFIX = ".txt", ".parquet"
TEXT_SHARD_BYTES = 64 << 20


@dataclass(frozen=True)
class Shard:
    """Files that one task reads, as URIs, with the name of each below the corpus path."""

    uris: tuple[str, ...]
    names: tuple[str, ...]


def list_shards(paths: tuple[str, ...], field: str = "corpus.paths") -> list[Shard]:
    """The corpus's shards in a fixed order: one a file, text files together up to 64 MiB.

    Raises:
        UserError: a path that does not exist, a folder without documents, two files of one name, or a name not in UTF-8.
    """
    found: list[tuple[str, str]] = []
    for path in paths:
        try:
            with files.reaching(field, path):
                below = _documents_below(files.absolute(path))
        except UnicodeDecodeError as error:
            raise UserError(f"{field}: {path} holds a file whose name is not UTF-8. Rename the file.") from error
        if not below:
            raise UserError(
                f"{field}: {path} holds no documents. Give files or folders with "
                f"{', '.join([*JSON_SUFFIXES, PARQUET_SUFFIX, TEXT_SUFFIX])}."
            )
        found += below
    names = [name for name, _ in found]
    repeated = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if repeated:
        raise UserError(f"{field}: two files are called {repeated}. Give the folder above both instead.")
    return _group(sorted(found))


def _documents_below(path: str) -> list[tuple[str, str]]:
    filesystem, inner = files.resolve(path)
    kind = filesystem.get_file_info(inner).type
    if kind == fs.FileType.NotFound:
        return []
    suffixes = (*JSON_SUFFIXES, TEXT_SUFFIX, PARQUET_SUFFIX)
    if kind == fs.FileType.File:
        return [(posixpath.basename(inner), path)] if inner.endswith(suffixes) else []
    return [(uri.removeprefix(path).lstrip("/"), uri) for uri in files.list_files(path) if uri.endswith(suffixes)]


def _group(found: list[tuple[str, str]]) -> list[Shard]:
    shards: list[Shard] = []
    texts: list[tuple[str, str]] = []
    text_bytes = 0
    for name, uri in found:
        if not name.endswith(TEXT_SUFFIX):
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
