"""Whole files on any pyarrow filesystem (local paths, s3://, gs://): a reader never sees half of one.

On a disk the bytes go to a hidden name in the same folder, then move. Object stores have no rename, but show an object
only when its upload is complete, so there the bytes go to a local temporary file, and from it up in one piece. (Not to an
object aside: S3 copies at most 5 GiB at once, and closing a stream to S3 publishes what it holds, whole or not.)
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import json
import os
import posixpath
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import fs

from cbtm_ray.errors import UserError

_COPY_CHUNK_BYTES = 8 << 20
_LOCAL = fs.LocalFileSystem()
_S3_ATTEMPTS = 5  # of one request: it fails after 8 s where nothing listens, after 25 s where nothing answers
_GCS_RETRY_S = 30
_WHAT_TO_DO = {
    r"NETWORK_CONNECTION|UNAVAILABLE": "Check the network, and AWS_ENDPOINT_URL if the store is not Amazon's.",
    r"ACCESS_DENIED|\b403\b|INVALID_|EXPIRED|SIGNATURE|PERMISSION_DENIED|UNAUTHENTICATED": (
        "Check the credentials, and what they may do there."
    ),
    r"NO_SUCH_BUCKET|[Bb]ucket.* (not found|does not exist)": "Create the bucket, or correct its name.",
}


def absolute(uri: str) -> str:
    """A local path made absolute, since workers run in other folders and may have another home; a URI as it is."""
    return uri if "://" in uri else os.path.abspath(os.path.expanduser(uri))


def resolve(uri: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of a path or URI, and the path inside it; what follows a bucket's name is taken as it stands."""
    scheme, separator, path = uri.partition("://")
    if not separator:
        return _LOCAL, absolute(uri)
    if scheme == "file":
        return _LOCAL, path
    if scheme in ("s3", "gs"):
        return _bucket(scheme, path.partition("/")[0]), path.rstrip("/")
    return fs.FileSystem.from_uri(uri)


@functools.cache
def _bucket(scheme: str, name: str) -> fs.FileSystem:
    """A store's client that gives up within half a minute; credentials are those that its vendor's tools would use."""
    if scheme == "gs":
        return fs.GcsFileSystem(retry_time_limit=timedelta(seconds=_GCS_RETRY_S), **_gcs_server())
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return fs.S3FileSystem(
        endpoint_override=endpoint,
        region=None if endpoint else fs.resolve_s3_region(name),
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=_S3_ATTEMPTS),
    )


def _gcs_server() -> dict[str, Any]:
    """Google's own, or what is at STORAGE_EMULATOR_HOST (http://HOST:PORT), where Google's clients go without credentials."""
    scheme, _, host = os.environ.get("STORAGE_EMULATOR_HOST", "").rpartition("://")
    return {"anonymous": True, "scheme": scheme or "http", "endpoint_override": host} if host else {}


def refusal(error: BaseException) -> str | None:
    """An object store's error as one line with what to do; None for an error of another kind."""
    said = str(error).splitlines()[0] if str(error) else ""
    if not isinstance(error, OSError) or not re.search(r"AWS Error|google::cloud|^Bucket '", said):
        return None
    advice = next((text for pattern, text in _WHAT_TO_DO.items() if re.search(pattern, said)), "")
    return f"{said.rstrip('.')}. {advice}".rstrip()


@contextlib.contextmanager
def reaching(field: str, uri: str) -> Iterator[None]:
    """First contact with a place that the user named.

    Raises:
        UserError: it cannot be reached: the field, the URI, the reason and what to do.
    """
    try:
        yield
    except (OSError, pa.ArrowInvalid) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise
        reason = refusal(error) or str(error).splitlines()[0]
        raise UserError(f"{field}={uri} cannot be reached: {reason}") from error


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
    if kind == fs.FileType.Directory and filesystem.type_name == "gcs":
        filesystem.delete_dir_contents(path)  # a folder there is but how names begin, which delete_dir does not find
    elif kind == fs.FileType.Directory:
        filesystem.delete_dir(path)
    elif kind == fs.FileType.File:
        filesystem.delete_file(path)


def delete_unfinished(uri: str) -> None:
    """Remove what killed writers left aside in a folder. Only for one that nobody else writes to now."""
    filesystem, path = resolve(uri)
    for info in filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True)):
        if info.type == fs.FileType.File and info.base_name.startswith("."):
            filesystem.delete_file(info.path)


@contextlib.contextmanager
def writing(uri: str) -> Iterator[Any]:
    """A binary stream whose content appears at `uri` when the block ends, and never if it raises."""
    filesystem, path = resolve(uri)
    if filesystem != _LOCAL:
        with tempfile.TemporaryDirectory() as here:
            whole = os.path.join(here, "whole")
            with _LOCAL.open_output_stream(whole) as stream:
                yield stream
            _upload(whole, filesystem, path)
        return
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


def write_bytes(uri: str, data: bytes | memoryview) -> None:
    with writing(uri) as stream:
        stream.write(data)


def read_json(uri: str) -> Any:
    return json.loads(read_bytes(uri))


def write_json(uri: str, value: Any) -> None:
    write_bytes(uri, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def fingerprint(value: Any) -> str:
    """SHA-256 of a JSON value, the same for equal ones."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_array(uri: str) -> np.ndarray:
    return np.load(io.BytesIO(read_bytes(uri)), allow_pickle=False)


def write_array(uri: str, array: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_bytes(uri, buffer.getvalue())


def publish_folder(local_folder: str, uri: str) -> None:
    """Copy every file of a local folder to `uri`, each whole or not at all; other files there stay."""
    for source in sorted(path for path in Path(local_folder).rglob("*") if path.is_file()):
        target = join(uri, source.relative_to(local_folder).as_posix())
        filesystem, path = resolve(target)
        if filesystem != _LOCAL:
            _upload(str(source), filesystem, path)
            continue
        with source.open("rb") as content, writing(target) as stream:
            shutil.copyfileobj(content, stream, _COPY_CHUNK_BYTES)


def _upload(local_path: str, filesystem: fs.FileSystem, path: str) -> None:
    fs.copy_files(local_path, path, destination_filesystem=filesystem, chunk_size=_COPY_CHUNK_BYTES)


@contextlib.contextmanager
def local_folder(uri: str) -> Iterator[str]:
    """A local path with the folder's content: the folder itself, or a copy that lives as long as the block."""
    filesystem, path = resolve(uri)
    if filesystem == _LOCAL:
        yield path
        return
    with tempfile.TemporaryDirectory() as copy:
        for info in filesystem.get_file_info(fs.FileSelector(path, recursive=True)):  # Google's store lists no folders
            Path(copy, posixpath.relpath(info.path, path)).parent.mkdir(parents=True, exist_ok=True)
        fs.copy_files(path, copy, source_filesystem=filesystem, chunk_size=_COPY_CHUNK_BYTES)
        yield copy


@contextlib.contextmanager
def folder_or_name(uri_or_name: str) -> Iterator[str]:
    """The argument for `from_pretrained`: `local_folder` if the name exists as a folder, else the name itself, for the hub."""
    with local_folder(uri_or_name) if exists(uri_or_name) else contextlib.nullcontext(uri_or_name) as found:
        yield found


@contextlib.contextmanager
def loading(uri_or_name: str, failure: str) -> Iterator[str]:
    """`folder_or_name` for a model or tokenizer that the user named.

    Raises:
        UserError: `failure` and the reason, where it cannot be loaded.
        OSError: its store cannot be reached, which may pass.
    """
    try:
        with folder_or_name(uri_or_name) as found:
            yield found
    except (OSError, ValueError) as error:
        if isinstance(error, UserError) or refusal(error):
            raise
        raise UserError(f"{failure}: {str(error).strip().splitlines()[0]}") from error
