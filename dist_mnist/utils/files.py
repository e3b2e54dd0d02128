"""Atomic and durable file writes, also on file systems without fsync or locks; portable JSON; paths as text."""

import errno
import fcntl
import glob
import hashlib
import json
import os
import shlex
import shutil
import string
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote_from_bytes, unquote_to_bytes

import msgspec

from dist_mnist.utils.errors import UserError, as_utf8, os_error_as, warn_once

# Errors of file systems that lack a call; for locks, also of NFS without a lock server.
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
NO_LOCKS = (*UNSUPPORTED, errno.ENOLCK)
PLAIN = frozenset(string.ascii_letters + string.digits + "/._-")  # characters that need no quoting in any shell
FILE_URI = "file:"  # prefix of a path whose other characters are percent-encoded bytes
MAX_LINE = 1 << 16  # bytes of the longest line that may be appended
UNFINISHED = ".*.tmp"  # temporary files of `atomic_write`


@contextmanager
def atomic_write(path: Path, replace: bool = True) -> Iterator[IO[bytes]]:
    """Open a temporary file next to `path` for writing; on success rename it to `path`, durably.

    If the file system has fsync, the bytes reach the disk before the name, and the name before this returns (fsync of
    the file, rename, fsync of the folder). On any error the temporary file is removed and the previous file at `path`
    is untouched. Without `replace`, a file that another process or node has created at `path` meanwhile is kept:
    others may have mapped it.

    Raises:
        OSError: the folder is not writable, or the disk is full.
    """
    name = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            sync(file.fileno(), path.parent)
        os.replace(name, path) if replace else _take_free_name(name, path)
    except BaseException:
        name.unlink()
        raise
    sync_folder(path.parent)


def check_new_folder(path: Path, remedy: str) -> None:
    """Raise a UserError that ends with `remedy`, unless `path` does not exist or is an empty folder."""
    with os_error_as(f"{path}: the folder cannot be created", remedy):
        try:
            path.stat()
        except FileNotFoundError:
            return
        if not path.is_dir() or any(path.iterdir()):
            raise UserError(f"{path} already exists and is not an empty folder; it was not changed: {remedy}")
        if os.path.ismount(path):
            raise UserError(f"{path} is a mount point and cannot be replaced: give a folder inside it")


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Create a hidden folder next to `path` to fill; on success rename it to `path`, which may be an empty folder.

    On any error it is removed, together with the parents of `path` that were created for it. Hidden folders of killed
    processes are removed too: a live process holds a lock on its own.

    Raises:
        OSError: the folder is not writable, the disk is full, or `path` exists and is not an empty folder.
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
    """Create a folder and lock it until the handle is closed; where the file system has no locks, do not lock it."""
    while True:
        folder.mkdir()
        handle = -1
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)  # waits for a process that is removing it as abandoned
            os.stat(folder)
            return handle
        except FileNotFoundError:  # that process removed it before the lock: try again
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
        pass  # its process is alive
    finally:
        os.close(handle)


def _take_free_name(unfinished: Path, path: Path) -> None:
    try:
        os.link(unfinished, path)  # unlike a rename, this fails if the name is taken
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        os.replace(unfinished, path)
        return
    unfinished.unlink()


def append_line(path: Path, line: bytes) -> None:
    """Append a line to a file, durably; first remove a partial line that a killed writer has left.

    Raises:
        OSError: the folder is not writable, or the disk is full.
    """
    is_new = not path.exists()
    with path.open("a+b") as file:
        file.truncate(_whole_lines(file))
        file.write(line + b"\n")
        file.flush()
        sync(file.fileno(), path.parent)
    if is_new:
        sync_folder(path.parent)


def drop_partial_line(path: Path) -> None:
    """Take away what a writer that was killed, or had no room, has left of a line: the next would be appended to it.

    Raises:
        OSError: the file is there, and cannot be written.
    """
    if path.exists():
        with path.open("r+b") as file:
            if (end := _whole_lines(file)) < file.seek(0, os.SEEK_END):
                file.truncate(end)
                os.fsync(file.fileno())


def _whole_lines(file: IO[bytes]) -> int:
    """Return the size of the file in bytes without a trailing partial line."""
    end = file.seek(0, os.SEEK_END)
    start = max(0, end - MAX_LINE)
    file.seek(start)
    return start + file.read().rfind(b"\n") + 1 if end else 0


def file_sha256(path: Path) -> str:
    """Return the SHA-256 (hexadecimal) of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable, if its file system has fsync."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        sync(handle, folder)
    finally:
        os.close(handle)


def sync(handle: int, folder: Path) -> None:
    """Make an open file in `folder`, or the folder itself, durable; warn once if the file system has no fsync.

    Raises:
        OSError: the write to disk failed.
    """
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        warn_once(
            f"fsync {os.fstat(handle).st_dev}",
            f"{folder}: this file system has no fsync ({error.strerror}), so writes are not durable: if the node "
            "crashes, the newest files may be lost or damaged; a run resumes from its newest intact checkpoint",
        )


@contextmanager
def locked(path: Path, otherwise: str, wait_s: float = -1) -> Iterator[bool]:
    """Hold a lock file for a `with` block; yields False on a file system without locks.

    There, one warning states the consequence, `otherwise`.

    Raises:
        filelock.Timeout: another process held it for `wait_s` seconds; a negative value waits forever.
        OSError: the file cannot be created.
    """
    from filelock import FileLock

    if why := _why_no_locks(path):
        device = path.stat().st_dev
        text = f"{path.parent}: this file system has no locks ({why}), so {otherwise}"
        warn_once(f"lock {device} {otherwise}", text)
        yield False
        return
    with FileLock(path, timeout=wait_s):
        yield True


def _why_no_locks(path: Path) -> str | None:
    """Try to lock the file `path`, creating it; return the error of a file system without locks, else None.

    filelock's releases handle that error differently: they raise, use another kind of lock, or wait.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.strerror if error.errno in NO_LOCKS else None
    finally:
        os.close(handle)
    return None


def to_json(value: Any, indent: int | None = None) -> str:
    """Return a value, which may hold records (`msgspec.Struct`), as JSON text; NaN and infinities become null."""
    finite = json.loads(json.dumps(msgspec.to_builtins(value)), parse_constant=lambda name: None)  # NaN, Infinity
    text = json.dumps(finite, indent=indent)
    return json.dumps(_as_utf8(finite), indent=indent) if "\\ud" in text else text  # \ud: an emoji or a lone surrogate


def _as_utf8(value: Any) -> Any:
    if isinstance(value, str):
        return as_utf8(value)
    if isinstance(value, list):
        return [_as_utf8(one) for one in value]
    return {as_utf8(key): _as_utf8(one) for key, one in value.items()} if isinstance(value, dict) else value


def path_text(path: Path) -> str:
    """Return a path as text for records (inverse: `path_of`): itself, or a file: URI if its bytes are not UTF-8."""
    content = os.fsencode(path)
    try:
        if (text := content.decode()) == str(path) and not text.startswith(FILE_URI):
            return text
    except UnicodeDecodeError:
        pass
    return FILE_URI + quote_from_bytes(content)


def path_of(text: str | Path) -> Path:
    """Return the path for a text from `path_text`, which may be a file: URI of this host."""
    text = str(Path(text))  # file:///a is file:/a
    return Path(os.fsdecode(unquote_to_bytes(text.removeprefix(FILE_URI)))) if text.startswith(FILE_URI) else Path(text)


def shell_word(word: str | Path) -> str:
    """Quote a path or word for a shell command; bytes that are not UTF-8 as bash, zsh and ksh read them ($'...')."""
    if as_utf8(str(word)) == str(word):
        return shlex.quote(str(word))
    octal = (chr(byte) if chr(byte) in PLAIN else f"\\{byte:03o}" for byte in os.fsencode(word))
    return f"$'{''.join(octal)}'"
