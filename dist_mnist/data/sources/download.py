"""Download a known dataset: mirrors in turn, checksums verified, one downloader per folder, nothing half-written left.

The library pooch does the downloading, each file in a thread and a staging folder of its own, so that a server which
never answers, or drips a byte now and then, can be left behind. A verified file is then stored atomically.
"""

import shutil
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from dist_mnist.data.sources.catalog import KnownDataset, KnownFile
from dist_mnist.utils.errors import UserError
from dist_mnist.utils.files import atomic_write

LOCK_NAME = ".download.lock"
STAGING_PREFIX = ".dist-mnist-download-"
LOCK_WAIT_S = 3600
MIN_BYTES_PER_S = 50_000  # on the whole; a mirror that is slower is given up
BACKOFF_S = 0.5
CHUNK = 1 << 14


class _MirrorFailed(Exception):
    """What a mirror answered, in a few words, and whether asking it once more may help."""

    def __init__(self, answer: str, *, transient: bool = False) -> None:
        super().__init__(answer)
        self.transient = transient


class _Silent(_MirrorFailed):
    """A mirror did not answer at all: neither a refusal nor a first byte."""


def fetch(dataset: KnownDataset, folder: Path, *, timeout_s: float = 5.0, progress: bool | None = None) -> Path:
    """Make `folder` hold the files of `dataset`, downloading those that are missing, and return `folder`.

    A file that is there, packed or unpacked, with `-idx` or `.idx` in its name, is never fetched again; where all are,
    nothing is written and no network touched. Processes that start at once take turns, and the later ones find the
    files there. `timeout_s` is how long a mirror may stay silent; `progress` None means: a bar if stderr is a terminal.

    Raises:
        UserError: no mirror gave a file, the folder cannot be written, or another process holds it for an hour.
    """
    if not missing_files(dataset, folder):
        return folder
    from filelock import FileLock, Timeout

    show_progress = sys.stderr.isatty() if progress is None else progress
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / LOCK_NAME, timeout=LOCK_WAIT_S):
            _remove_leftovers(dataset, folder)
            fetcher = _Fetcher(dataset, folder, timeout_s, show_progress)
            for file in missing_files(dataset, folder):  # asked again: another process may have had the lock before
                fetcher.fetch(file)
    except Timeout:
        raise UserError(
            f"{folder}: another process has been downloading into this folder for {LOCK_WAIT_S // 60} minutes; end it "
            "or choose another folder"
        ) from None
    except OSError as error:
        raise UserError(
            f"{folder}: the download of {dataset.name} cannot be stored ({error.strerror or error}); make room or "
            "choose a folder that you may write"
        ) from None
    return folder


def missing_files(dataset: KnownDataset, folder: Path) -> list[KnownFile]:
    """The files of `dataset` that `folder` holds neither packed nor unpacked, under none of their accepted names."""
    return [file for file in dataset.files if not any((folder / name).is_file() for name in _accepted_names(file))]


def _accepted_names(file: KnownFile) -> list[str]:
    stems = (file.name.removesuffix(".gz"), file.name.removesuffix(".gz").replace("-idx", ".idx"))
    return [stem + ending for stem in stems for ending in ("", ".gz")]


def _remove_leftovers(dataset: KnownDataset, folder: Path) -> None:
    """Remove what a killed download left; only the lock's holder may, for then no other download is under way."""
    for path in folder.glob(f"{STAGING_PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)
    for file in dataset.files:
        for path in folder.glob(f".{file.name}.*.tmp"):  # atomic_write's name for an unfinished file
            path.unlink()


class _Fetcher:
    """Fetches files one by one and remembers, from file to file, which mirror is good and how patient to be."""

    def __init__(self, dataset: KnownDataset, folder: Path, timeout_s: float, show_progress: bool) -> None:
        import pooch
        import requests  # noqa: F401  (pooch would import it in the midst of a timed download)

        pooch.get_logger().setLevel("WARNING")
        self.dataset = dataset
        self.mirrors = list(dataset.mirrors)
        self.folder = folder
        self.timeout_s = timeout_s
        self.patience_s = timeout_s
        self.show_progress = show_progress

    def fetch(self, file: KnownFile) -> None:
        """Download `file` from the first mirror that has it.

        Raises:
            UserError: none has; the message says what each answered.
            OSError: the folder cannot be written.
        """
        answers = []
        for mirror in list(self.mirrors):
            try:
                self._fetch_from(mirror, file)
            except _MirrorFailed as failed:
                answers.append(f"{mirror}: {failed}")
            else:
                self.mirrors.sort(key=lambda other: other != mirror)  # the next file tries this one first
                return
        raise UserError(
            f"{self.dataset.name}: {file.name} could not be downloaded ({'; '.join(answers)}). Copy the four files "
            f"into {self.folder}, or train on generated digits with --dataset synthetic."
        )

    def _fetch_from(self, mirror: str, file: KnownFile) -> None:
        """Try `mirror`, and once more after a failure that may pass."""
        try:
            self._try(mirror, file)
        except _Silent:
            # Halving keeps a network that swallows packets to some two timeouts in all, however many mirrors there are.
            self.patience_s = max(self.patience_s / 2, self.timeout_s / 4)
            raise
        except _MirrorFailed as failed:
            if not failed.transient:
                raise
            time.sleep(BACKOFF_S)
            self._try(mirror, file)

    def _try(self, mirror: str, file: KnownFile) -> None:
        with tempfile.TemporaryDirectory(prefix=STAGING_PREFIX, dir=self.folder, ignore_cleanup_errors=True) as staging:
            download = _Download(mirror + file.name, file, Path(staging), self.timeout_s, self.show_progress)
            download.start()
            try:
                download.wait(self.patience_s)
            finally:
                download.abandon()
            self.patience_s = self.timeout_s
            # A copy, because pooch's file is readable by its owner alone and not yet safe on the disk.
            with open(Path(staging) / file.name, "rb") as source, atomic_write(self.folder / file.name) as target:
                shutil.copyfileobj(source, target)


class _Download(threading.Thread):
    """One file from one mirror, by pooch, into a staging folder. It is pooch's progress bar as well."""

    def __init__(self, url: str, file: KnownFile, staging: Path, timeout_s: float, show_progress: bool) -> None:
        from tqdm import tqdm

        super().__init__(daemon=True)
        self.url = url
        self.file = file
        self.staging = staging
        self.timeout_s = timeout_s
        self.answered = threading.Event()  # a response has begun, or the thread has ended
        self.response: Any = None
        self.complete = False  # the body came whole
        self.abandoned = False
        self.error: Exception | None = None
        self.bar = tqdm(
            total=file.num_bytes, desc=file.name, unit="B", unit_scale=True, leave=False, disable=not show_progress
        )
        self.total = file.num_bytes  # pooch sets it to what the server claims; not used

    def wait(self, patience_s: float) -> None:
        """Return when the file lies in the staging folder, its checksum verified.

        Raises:
            _MirrorFailed: it does not, or the mirror did not begin within `patience_s`, or went on too slowly.
            OSError: the staging folder cannot be written.
        """
        if not self.answered.wait(patience_s):
            raise _Silent(f"no answer within {patience_s:g} s")
        self.join(2 * self.timeout_s + self.file.num_bytes / MIN_BYTES_PER_S)
        if self.is_alive():
            raise _MirrorFailed("too slow")
        if self.error is not None:
            raise self._failure(self.error) from None

    def abandon(self) -> None:
        """Stop caring: the bar goes, and a thread that still runs ends at its next byte."""
        self.abandoned = True
        self.bar.close()
        if self.is_alive() and self.response is not None:
            with suppress(Exception):  # only wakes the thread earlier; urllib3 has it since 2.3
                self.response.raw.shutdown()

    def run(self) -> None:
        """The thread: pooch downloads to a temporary file in the staging folder, verifies it and renames it."""
        import pooch

        downloader = pooch.HTTPDownloader(
            progressbar=self,
            chunk_size=CHUNK,
            timeout=self.timeout_s,
            headers={"Accept-Encoding": "identity"},
            hooks={"response": self._on_response},
        )
        try:
            pooch.retrieve(self.url, f"sha256:{self.file.sha256}", self.file.name, self.staging, downloader=downloader)
        except Exception as error:
            self.error = error
        finally:
            self.answered.set()

    def update(self, _: int) -> None:
        """Called by pooch after each chunk: show how far it is, and end what must not go on."""
        received = self.response.raw.tell()
        if self.abandoned or received > self.file.num_bytes:
            raise _MirrorFailed(f"more than the file's {self.file.num_bytes} bytes")
        self.bar.update(received - self.bar.n)

    def reset(self) -> None:
        """Called by pooch when the body has ended."""
        self.complete = True
        self.bar.leave = True  # bars of failed tries vanish

    def close(self) -> None:
        """Called by pooch at the end of a download."""
        self.bar.close()

    def _on_response(self, response: Any, **_: Any) -> None:
        # Some servers declare a .gz file as an encoding of its content; unpacked on the way it would not be the file.
        response.raw.headers.discard("Content-Encoding")
        self.response = response
        self.answered.set()

    def _failure(self, error: Exception) -> Exception:
        """What the user is told about `error`: a mirror's answer, or the error itself where it is this machine's."""
        from requests import exceptions as http

        match error:
            case _MirrorFailed():
                return error
            case http.HTTPError():
                status = self.response.status_code
                return _MirrorFailed(str(status), transient=status >= 500 or status == 429)
            case http.Timeout() if self.response is None:
                return _Silent(f"no answer within {self.timeout_s:g} s")
            case http.SSLError():
                return _MirrorFailed("no secure connection")
            case http.ConnectionError() | http.Timeout() | http.ChunkedEncodingError():
                return _MirrorFailed("no connection" if self.response is None else "connection lost", transient=True)
            case http.InvalidSchema():
                return _MirrorFailed("redirected to an address that is not http")
            case http.TooManyRedirects():
                return _MirrorFailed("redirected without end")
            case ValueError() if self.complete:
                return _MirrorFailed("wrong checksum", transient=True)
            case OSError() if not isinstance(error, http.RequestException):
                return error
            case _:
                return _MirrorFailed(f"unusable answer ({type(error).__name__})")
