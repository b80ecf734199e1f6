"""Opens a file of documents, and says for what it is a file that cannot be read as its name promises."""

from __future__ import annotations

import lzma
from typing import BinaryIO, cast

import pyarrow as pa

from cbtm_ray import files
from cbtm_ray.errors import UserError

BOM, UTF16_BOMS, LFS_POINTER = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff"), b"version https://git-lfs.github.com/spec/"
UNREADABLE = (OSError, EOFError, lzma.LZMAError, pa.ArrowInvalid, pa.ArrowNotImplementedError)
MEND = "Mend the row or take it out."


def open_decompressed(uri: str, codec: str | None) -> BinaryIO:
    filesystem, path = files.resolve(uri)
    if codec != "xz":
        return cast(BinaryIO, filesystem.open_input_stream(path, compression=codec))
    return cast(BinaryIO, lzma.LZMAFile(cast(BinaryIO, filesystem.open_input_stream(path, compression=None))))


def check_head(head: bytes, name: str) -> None:
    """Refuse what is no document by its first bytes, for what it is."""
    if head.startswith(LFS_POINTER):
        raise UserError(f"{name} is a Git LFS pointer, not the file itself. Fetch the file: git lfs pull")
    if head.startswith(UTF16_BOMS):
        raise UserError(f"{name} is UTF-16, as its byte-order mark says. Re-encode the file as UTF-8.")


def unreadable(uri: str, name: str, error: BaseException) -> UserError:
    """What to tell the user of a file that one of `UNREADABLE` was raised for."""
    filesystem, path = files.resolve(uri)
    try:
        with filesystem.open_input_stream(path, compression=None) as stream:
            check_head(stream.read(len(LFS_POINTER)), name)
    except UserError as known:
        return known
    except OSError:
        pass  # of which `error` tells
    reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    advice = "Replace the file or take it out."
    if "requires too much memory" in reason:
        reason = "it needs a zstd window above 128 MiB"
        advice = f"Compress it again with a smaller one: zstd -dc --long=31 {name} | zstd -o ANOTHER"
    return UserError(f"{name} cannot be read: {reason}. {advice}")


def not_utf8(where: str, error: UnicodeDecodeError) -> UserError:
    byte = error.object[error.start]
    return UserError(f"{where} is not UTF-8: byte 0x{byte:02x} at position {error.start}. Re-encode the file.")
