"""Download a known dataset: mirrors in turn, verified checksums, one process per folder, atomically stored files."""

import hashlib
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dist_mnist.data.sources.known.records import KnownDataset, KnownFile
from dist_mnist.utils.errors import UserError, os_error_as, warn
from dist_mnist.utils.files import atomic_write, locked

if TYPE_CHECKING:
    from requests import Response
    from rich.progress import Progress

LOCK_NAME = ".download.lock"
LOCK_WAIT_S = 3600
UNGUARDED = "concurrent downloads into it disturb each other: run only one at a time"
MIN_BYTES_PER_S = 50_000  # average over a file; a slower mirror is abandoned
BACKOFF_S = 0.5
CHUNK_BYTES = 1 << 16
MAX_BYTES = 1 << 30  # largest size of a file whose size is not published


class _MirrorFailed(Exception):
    """The reason why a mirror failed; `transient`: a retry may succeed; `silent`: it did not answer."""

    def __init__(self, why: str, *, transient: bool = False, silent: bool = False) -> None:
        super().__init__(why)
        self.transient, self.silent = transient, silent


def fetch(
    dataset: KnownDataset, folder: Path, *, timeout_s: float = 5.0, progress: bool | None = None, verify: bool = False
) -> Path:
    """Download the missing idx files of `dataset` into `folder`, and return `folder`.

    An existing file, packed or unpacked, with `-idx` or `.idx` in its name, is not downloaded again. If all exist,
    nothing is written and no request is made. With `verify`, all files are read, and damaged ones are named on stderr
    and replaced. Concurrent processes take turns, and the later ones find the files of the first.

    Args:
        timeout_s: seconds that a mirror may take to answer.
        progress: show a progress bar; None: if stderr is a terminal.

    Raises:
        UserError: no mirror provided a file, the folder is not writable, or another process locks it for an hour.
    """
    if _is_there(dataset, folder, verify):
        return folder
    from filelock import Timeout

    show = sys.stderr.isatty() if progress is None else progress
    advice = "free some space there, or choose a folder that you can write to"
    with os_error_as(f"{folder}: the download of {dataset.name} cannot be stored", advice):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with locked(folder / LOCK_NAME, UNGUARDED, LOCK_WAIT_S) as alone, _progress_bars(show) as bars:
                if not _is_there(dataset, folder, verify):  # checked again: another process may have finished meanwhile
                    if alone:
                        _remove_leftovers(dataset, folder)
                    _make(dataset, folder, timeout_s, bars, verify)
        except Timeout:
            raise UserError(
                f"{folder}: another process has been downloading into this folder for {LOCK_WAIT_S // 60} minutes; "
                "stop it, or choose another folder"
            ) from None
    return folder


def _is_there(dataset: KnownDataset, folder: Path, verify: bool) -> bool:
    """Whether the folder is complete. numpy is imported only if files have to be read."""
    if dataset.conversion is None and not verify:
        return not missing_files(dataset, folder)
    from dist_mnist.data.sources.known.verify import damaged_files, is_converted

    is_complete = not missing_files(dataset, folder) if dataset.conversion is None else is_converted(dataset, folder)
    return is_complete and not (verify and damaged_files(dataset, folder, _accepted_names))


def _make(dataset: KnownDataset, folder: Path, timeout_s: float, bars: "Progress", verify: bool) -> None:
    """Download or convert what is missing or damaged in `folder`. The caller must hold its lock."""
    mirrors = list(dataset.mirrors)
    is_archived = all(file.name.endswith((".npz", ".zip")) for file in dataset.files)  # names that no result has
    place = folder if dataset.conversion is None or is_archived else folder.absolute().parent
    copies = f"the {'four' if dataset.conversion is None else 'published'} files into {place}"

    def download(file: KnownFile, target: Path) -> None:
        _fetch_from_any(mirrors, file, dataset.name, target, copies, timeout_s, bars)

    if dataset.conversion is not None:
        from dist_mnist.data.sources.known.convert import make_folder
        from dist_mnist.data.sources.known.verify import damaged_files

        for path, why in damaged_files(dataset, folder, _accepted_names):
            warn(f"{path}: {why}; converting it again")
        make_folder(dataset, folder, download, partial(bars.advance, bars.add_task("converting images", total=None)))
        return
    for file in missing_files(dataset, folder):
        download(file, folder)
    if verify:
        from dist_mnist.data.sources.known.verify import mend

        mend(dataset, folder, _accepted_names, download)


def missing_files(dataset: KnownDataset, folder: Path) -> list[KnownFile]:
    """Return the files of `dataset` that `folder` has neither packed nor unpacked, under any accepted name."""
    return [file for file in dataset.files if not any((folder / name).is_file() for name in _accepted_names(file))]


def _accepted_names(file: KnownFile) -> list[str]:
    stems = (file.name.removesuffix(".gz"), file.name.removesuffix(".gz").replace("-idx", ".idx"))
    return [stem + ending for stem in stems for ending in ("", ".gz")]


def _remove_leftovers(dataset: KnownDataset, folder: Path) -> None:
    """Remove leftovers of a killed download. The caller must hold the lock: another download might be running."""
    for file in dataset.files:
        for path in folder.glob(f".{file.name}.*.tmp"):  # atomic_write's names of unfinished files
            path.unlink()


def _progress_bars(show: bool) -> "Progress":
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress

    return Progress(*Progress.get_default_columns(), DownloadColumn(), console=Console(stderr=True), disable=not show)


def _fetch_from_any(
    mirrors: list[str], file: KnownFile, dataset: str, folder: Path, copies: str, timeout_s: float, bars: "Progress"
) -> None:
    """Store `file` from the first mirror that provides it; mirrors that fail move to the end of `mirrors`.

    Raises:
        UserError: no mirror provides it; the message has the answer of each.
        OSError: the folder cannot be written.
    """
    answers, patience_s = [], timeout_s
    for mirror in list(mirrors):
        try:
            _fetch_from(mirror, file, folder, patience_s, timeout_s, bars)
        except _MirrorFailed as failed:
            answers.append(f"{mirror}: {failed}")
            mirrors.sort(key=mirror.__eq__)
            if failed.silent:  # halved, so that a network that drops packets costs about two timeouts in total
                patience_s = max(patience_s / 2, timeout_s / 4)
        else:
            return
    raise UserError(
        f"{dataset}: {file.name} could not be downloaded ({'; '.join(answers)}). Copy {copies}, or train on generated "
        "digits with --dataset synthetic."
    )


def _fetch_from(
    mirror: str, file: KnownFile, folder: Path, patience_s: float, timeout_s: float, bars: "Progress"
) -> None:
    """Store `file` from `mirror`, with one retry after a transient failure."""
    for may_retry in (True, False):
        bar = bars.add_task(file.name, total=file.num_bytes)
        try:
            with (
                _open(mirror + file.name, patience_s, timeout_s) as response,
                atomic_write(folder / file.name) as target,
            ):
                algorithm, expected = file.checksum.split(":")
                digest = hashlib.new(algorithm, usedforsecurity=False)
                most = file.num_bytes or _announced(response)
                bars.update(bar, total=most)
                for chunk in _chunks(response, most, 2 * timeout_s + most / MIN_BYTES_PER_S):
                    digest.update(chunk)
                    target.write(chunk)
                    bars.advance(bar, len(chunk))
                if digest.hexdigest() != expected:
                    raise _MirrorFailed("wrong checksum", transient=True)
            return
        except _MirrorFailed as failed:
            bars.remove_task(bar)
            if not (failed.transient and may_retry):
                raise
        time.sleep(BACKOFF_S)


def _open(url: str, patience_s: float, timeout_s: float) -> "Response":
    """Request `url`, and return the response with its body unread.

    A thread sends the request and is abandoned after `patience_s`, because a DNS lookup cannot be interrupted.

    Raises:
        _MirrorFailed: there is no response, or it is an error.
    """
    import requests
    from requests import exceptions as http

    answer: Future[Response] = Future()

    def ask() -> None:
        try:
            headers = {"Accept-Encoding": "identity"}
            answer.set_result(requests.get(url, stream=True, timeout=timeout_s, headers=headers))
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=ask, name=url, daemon=True).start()
    try:
        response = answer.result(patience_s)
    except (TimeoutError, http.Timeout):
        raise _MirrorFailed(f"no answer within {patience_s:g} s", silent=True) from None
    except http.SSLError:
        raise _MirrorFailed("no secure connection") from None
    except http.ConnectionError:
        raise _MirrorFailed("no connection", transient=True) from None
    except http.InvalidSchema:
        raise _MirrorFailed("redirected to an address that is not http") from None
    except http.TooManyRedirects:
        raise _MirrorFailed("too many redirects") from None
    except http.RequestException as error:
        raise _MirrorFailed(f"unusable answer ({type(error).__name__})") from None
    if response.ok:
        return response
    response.close()
    raise _MirrorFailed(str(response.status_code), transient=response.status_code in (429, *range(500, 600)))


def _announced(response: "Response") -> int:
    """Return the server's Content-Length for a file without published size, at most MAX_BYTES."""
    length = response.headers.get("Content-Length", "")
    return min(int(length), MAX_BYTES) if length.isdecimal() else MAX_BYTES


def _chunks(response: "Response", num_bytes: int, seconds: float) -> Iterator[bytes]:
    """Yield the response's body as it arrives, without decoding, even if the server declares .gz as an encoding.

    Raises:
        _MirrorFailed: it exceeds `num_bytes` or `seconds`, or the connection is lost.
    """
    from urllib3.exceptions import HTTPError

    deadline, received = time.monotonic() + seconds, 0
    try:
        while chunk := response.raw.read1(CHUNK_BYTES, decode_content=False):  # what has arrived, however little
            received += len(chunk)
            if received > num_bytes:
                raise _MirrorFailed(f"more than the file's {num_bytes} bytes")
            if time.monotonic() > deadline:
                raise _MirrorFailed("too slow")
            yield chunk
    except HTTPError:
        raise _MirrorFailed("connection lost", transient=True) from None
