"""Files that appear whole or not at all, whatever a file system lacks; JSON that every reader takes; paths as text."""

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

# What file systems say to calls that they do not have; to locks also where no server keeps them (NFS).
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
NO_LOCKS = (*UNSUPPORTED, errno.ENOLCK)
PLAIN = frozenset(string.ascii_letters + string.digits + "/._-")  # characters that no shell minds
FILE_URI = "file:"  # begins a path whose other characters are percent-encoded bytes
MAX_LINE = 1 << 16  # bytes of a line that is appended
UNFINISHED = ".*.tmp"  # files that `atomic_write` has not finished


@contextmanager
def atomic_write(path: Path, replace: bool = True) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path` for writing; on success it takes the name `path`, durably.

    The bytes reach the disk before the name does, and the name before this returns (fsync of file, rename, fsync of
    folder), if the file system has fsync. On any error the temporary file is removed and what stood at `path` before is
    untouched. Without `replace` a file that has taken the name meanwhile, on whatever node, stays: others may have
    mapped it.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
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
    """Make the names in `folder` durable, if its file system has fsync."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        sync(handle, folder)
    finally:
        os.close(handle)


def sync(handle: int, folder: Path) -> None:
    """Make an open file in `folder`, or the folder itself, durable; a file system without fsync is warned of, once.

    Raises:
        OSError: the disk does not take what was written.
    """
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        warn_once(
            f"fsync {os.fstat(handle).st_dev}",
            f"{folder}: this file system has no fsync ({error.strerror}), so nothing is made durable: if the node "
            "crashes, the newest files may be lost or damaged; a run resumes from its newest checkpoint that is whole",
        )


@contextmanager
def locked(path: Path, otherwise: str, wait_s: float = -1) -> Iterator[bool]:
    """Hold a lock file for a `with` block, which gets whether it does: not every file system has locks.

    Where there are none, a warning says once what is the case `otherwise`.

    Raises:
        filelock.Timeout: another process has held it for `wait_s` seconds; if negative, that is waited for.
        OSError: the file cannot be made.
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
    """What a file system without locks says to one of the file `path`, which is made; None if it has locks.

    filelock's releases differ in what they make of that: an error, another kind of lock, or waiting for it.
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
    """JSON text, of records (`msgspec.Struct`) too; numbers that are not finite, which JSON does not have, are null."""
    finite = json.loads(json.dumps(msgspec.to_builtins(value)), parse_constant=lambda name: None)  # NaN, Infinity
    text = json.dumps(finite, indent=indent)
    return json.dumps(_as_utf8(finite), indent=indent) if "\\ud" in text else text  # of an emoji, or of half of one


def _as_utf8(value: Any) -> Any:
    if isinstance(value, str):
        return as_utf8(value)
    if isinstance(value, list):
        return [_as_utf8(one) for one in value]
    return {as_utf8(key): _as_utf8(one) for key, one in value.items()} if isinstance(value, dict) else value


def path_text(path: Path) -> str:
    """A path as records have it, which `path_of` turns back: itself, or a file: URI if its bytes are not UTF-8."""
    content = os.fsencode(path)
    try:
        if (text := content.decode()) == str(path) and not text.startswith(FILE_URI):
            return text
    except UnicodeDecodeError:
        pass
    return FILE_URI + quote_from_bytes(content)


def path_of(text: str | Path) -> Path:
    """The path that a text names, which may be a file: URI of this host."""
    text = str(Path(text))  # file:///a is file:/a
    return Path(os.fsdecode(unquote_to_bytes(text.removeprefix(FILE_URI)))) if text.startswith(FILE_URI) else Path(text)


def shell_word(word: str | Path) -> str:
    """A path, or another word, in a shell command; bytes that are not UTF-8 as bash, zsh and ksh take them ($'...')."""
    if as_utf8(str(word)) == str(word):
        return shlex.quote(str(word))
    octal = (chr(byte) if chr(byte) in PLAIN else f"\\{byte:03o}" for byte in os.fsencode(word))
    return f"$'{''.join(octal)}'"
