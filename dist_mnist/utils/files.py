"""Files that appear whole or not at all, and JSON that every reader takes."""

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import msgspec

UNFINISHED = ".*.tmp"  # files that `atomic_write` has not finished


@contextmanager
def atomic_write(path: Path, replace: bool = True) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path` for writing; on success it takes the name `path`, durably.

    The bytes reach the disk before the name does, and the name before this returns (fsync of file, rename, fsync of
    folder). On any error the temporary file is removed and what stood at `path` before is untouched. Without `replace`
    a file that has taken the name meanwhile, on whatever node, stays: others may have mapped it.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    name = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path) if replace else _take_free_name(name, path)
    except BaseException:
        name.unlink()
        raise
    sync_folder(path.parent)


def _take_free_name(unfinished: Path, path: Path) -> None:
    try:
        os.link(unfinished, path)  # unlike a rename, this fails where the name is taken
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        os.replace(unfinished, path)
        return
    unfinished.unlink()


def file_sha256(path: Path) -> str:
    """The SHA-256 (hexadecimal) of a file's bytes, which are not held in memory together."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON text, of records (`msgspec.Struct`) too; numbers that are not finite, which JSON does not have, are null."""
    finite = json.loads(json.dumps(msgspec.to_builtins(value)), parse_constant=lambda name: None)  # NaN, Infinity
    return json.dumps(finite, indent=indent)
