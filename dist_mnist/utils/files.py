"""Files that appear whole or not at all, and JSON that every reader takes."""

import fcntl
import glob
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import msgspec

from dist_mnist.utils.errors import UserError, os_error_as

MAX_LINE = 1 << 16  # bytes of a line that is appended
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


def check_new_folder(path: Path, remedy: str) -> None:
    """Raise a UserError, which ends with the `remedy`, unless there is nothing at `path`, or an empty folder."""
    with os_error_as(f"{path}: no folder can be made there", remedy):
        try:
            path.stat()
        except FileNotFoundError:
            return
        if not path.is_dir() or any(path.iterdir()):
            raise UserError(f"{path} is there already, and not empty; it is left as it is: {remedy}")
        if os.path.ismount(path):
            raise UserError(f"{path} is where a file system is mounted, and cannot be replaced: name a folder in it")


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Make a hidden folder beside `path` to fill; on success it takes the name `path`, which may be an empty folder.

    On any error it is removed, and so are the folders above `path` that were made for it. What processes that were
    killed have left of such folders is removed too: a lock, which ends with its process, tells who is still at work.

    Raises:
        OSError: the folder cannot be written, the disk is full, or `path` is no empty folder.
    """
    path = path.resolve()
    made = [parent for parent in (path.parent, *path.parent.parents) if not parent.exists()]
    hidden, handle = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"), -1
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for other in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}.tmp"):
            _remove_if_abandoned(other)
        handle = _made_and_locked(hidden)
        yield hidden
        sync_folder(hidden)
        os.replace(hidden, path)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        raise
    finally:
        if handle >= 0:
            os.close(handle)
    sync_folder(path.parent)


def _made_and_locked(folder: Path) -> int:
    """Make a folder, locked for as long as the handle is open; without effect where a file system has no such locks."""
    while True:
        folder.mkdir()
        handle = -1
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)  # waits for another process that takes it for abandoned
            os.stat(folder)
            return handle
        except FileNotFoundError:  # that process has removed it before the lock: once more
            if handle >= 0:
                os.close(handle)


def _remove_if_abandoned(folder: Path) -> None:
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        pass  # its process is at work
    finally:
        os.close(handle)


def _take_free_name(unfinished: Path, path: Path) -> None:
    try:
        os.link(unfinished, path)  # unlike a rename, this fails where the name is taken
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        os.replace(unfinished, path)
        return
    unfinished.unlink()


def append_line(path: Path, line: bytes) -> None:
    """Add a line to a file, durably; what a writer that was killed has left of one goes.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    is_new = not path.exists()
    with path.open("a+b") as file:
        file.truncate(_whole_lines(file))
        file.write(line + b"\n")
        file.flush()
        os.fsync(file.fileno())
    if is_new:
        sync_folder(path.parent)


def _whole_lines(file: IO[bytes]) -> int:
    """The bytes up to the end of the last line that has one."""
    end = file.seek(0, os.SEEK_END)
    start = max(0, end - MAX_LINE)
    file.seek(start)
    return start + file.read().rfind(b"\n") + 1 if end else 0


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
