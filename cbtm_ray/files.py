"""Whole files on any pyarrow filesystem (local paths, s3://, gs://), written aside and renamed.

A reader never sees half a file: the bytes go to a hidden name in the same folder, then move. Object stores have no
rename, but show an object only when its upload is complete, which gives the same promise.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import posixpath
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pyarrow import fs

_COPY_CHUNK_BYTES = 8 << 20


def absolute(uri: str) -> str:
    """A local path made absolute, since workers run in other folders; a URI as it is."""
    return uri if "://" in uri else os.path.abspath(uri)


def resolve(uri: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of a path or URI, and the path inside it."""
    if uri.startswith("file://"):
        return fs.LocalFileSystem(), uri.removeprefix("file://")
    if "://" in uri:
        return fs.FileSystem.from_uri(uri)
    return fs.LocalFileSystem(), os.path.abspath(uri)


def join(uri: str, *parts: str) -> str:
    return posixpath.join(uri, *parts)


def exists(uri: str) -> bool:
    filesystem, path = resolve(uri)
    return filesystem.get_file_info(path).type != fs.FileType.NotFound


def list_files(uri: str) -> list[str]:
    """Every file below a folder, as URIs of the same kind, sorted; none if the folder is missing.

    Names that begin with a dot or an underscore are left out: they are files in the making, or bookkeeping.
    """
    filesystem, path = resolve(uri)
    infos = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True, recursive=True))
    relative = (posixpath.relpath(info.path, path) for info in infos if info.type == fs.FileType.File)
    return sorted(
        join(uri, name) for name in relative if not any(part.startswith((".", "_")) for part in name.split("/"))
    )


def delete(uri: str) -> None:
    """Remove a file or a folder with all it holds; nothing happens if there is none."""
    filesystem, path = resolve(uri)
    kind = filesystem.get_file_info(path).type
    if kind == fs.FileType.Directory:
        filesystem.delete_dir(path)
    elif kind == fs.FileType.File:
        filesystem.delete_file(path)


@contextlib.contextmanager
def writing(uri: str) -> Iterator[Any]:
    """A binary stream whose content appears at `uri` when the block ends, and never if it raises."""
    filesystem, path = resolve(uri)
    folder, name = posixpath.split(path)
    filesystem.create_dir(folder, recursive=True)
    aside = posixpath.join(folder, f".{name}.{uuid.uuid4().hex[:8]}")
    try:
        with filesystem.open_output_stream(aside) as stream:
            yield stream
        filesystem.move(aside, path)
    except BaseException:
        if filesystem.get_file_info(aside).type == fs.FileType.File:
            filesystem.delete_file(aside)
        raise


def read_bytes(uri: str) -> bytes:
    filesystem, path = resolve(uri)
    with filesystem.open_input_stream(path, compression=None) as stream:
        return stream.read()


def write_bytes(uri: str, data: bytes) -> None:
    with writing(uri) as stream:
        stream.write(data)


def read_json(uri: str) -> Any:
    return json.loads(read_bytes(uri))


def write_json(uri: str, value: Any) -> None:
    write_bytes(uri, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_array(uri: str) -> np.ndarray:
    return np.load(io.BytesIO(read_bytes(uri)), allow_pickle=False)


def write_array(uri: str, array: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_bytes(uri, buffer.getvalue())


def publish_folder(local_folder: str, uri: str) -> None:
    """Copy every file of a local folder to `uri`, each written aside and renamed; other files there stay."""
    for source in sorted(Path(local_folder).rglob("*")):
        if source.is_file():
            with source.open("rb") as stream, writing(join(uri, source.relative_to(local_folder).as_posix())) as target:
                shutil.copyfileobj(stream, target, _COPY_CHUNK_BYTES)


@contextlib.contextmanager
def local_folder(uri: str) -> Iterator[str]:
    """A local path with the folder's content: the folder itself, or a copy that lives as long as the block."""
    filesystem, path = resolve(uri)
    if isinstance(filesystem, fs.LocalFileSystem):
        yield path
        return
    with tempfile.TemporaryDirectory() as copy:
        fs.copy_files(path, copy, source_filesystem=filesystem, chunk_size=_COPY_CHUNK_BYTES)
        yield copy
