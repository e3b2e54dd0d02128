"""Synchronisation of trackers such as MLflow: a thread sends them what they lack of a run directory.

The run directory is authoritative. A tracker is asked for its last steps when it is opened and after each failure, and
gets the later lines of metrics.jsonl. So no step is there twice, though a killed run repeats some, and none is missing,
though the tracker was down: it gets the rest when it is back, at the next start of the run, or by `dist-mnist log`.
"""

import math
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
from msgspec import Meta, Struct
from msgspec.structs import asdict, replace

from dist_mnist.config.resolve import from_json
from dist_mnist.config.settings import TRACKERS
from dist_mnist.distributed.world import World
from dist_mnist.reporting.compare import PredictTest
from dist_mnist.reporting.listener import Listener, Outcome, RunEnd, RunStart
from dist_mnist.reporting.listeners.tracker import Point, TrackedRun, Tracker
from dist_mnist.run.directory import RunDirectory
from dist_mnist.run.ownership import TakenOver
from dist_mnist.run.records import MetricsRecord, RunConfig, RunResult, read_run
from dist_mnist.utils.errors import UserError, short, unknown, warn
from dist_mnist.utils.files import atomic_write, path_of, path_text, shell_word, to_json
from dist_mnist.utils.schema import parse

EVERY_S = 2.0  # between two reads of metrics.jsonl; doubled after each failure, up to LONGEST_S
LONGEST_S = 30.0
RETRY_S = 1.0  # between two attempts at the end of a run
PATIENCE_S: Mapping[Outcome, float] = {"finished": 30.0, "stopped": 5.0, "failed": 5.0}  # longest wait at the end
BATCH = 40  # points per request; MLflow accepts 1000 metrics


class Identity(Struct, frozen=True, kw_only=True):
    """`mlflow.json`, say, in a run directory: the run's key in the tracker, and the digest of its settings and data."""

    key: Annotated[str, Meta(pattern="^[0-9a-f]{16}$")]
    digest: str
    folder: str = ""  # the run directory


class Sync:
    """Brings a tracker up to date with a run directory.

    Args:
        check_owner: raises if another process has taken over the run directory.
        start_step: steps done before this start of training, None without training; a run that starts at step 0 with
            other settings than before gets a new key.
    """

    def __init__(
        self,
        tracker: Tracker,
        run_dir: Path,
        config: RunConfig,
        check_owner: Callable[[], None],
        start_step: int | None = None,
    ):
        self.tracker, self.metrics, self.check_owner = tracker, run_dir / "metrics.jsonl", check_owner
        key = _identity(run_dir, tracker.name, config, start_step).key
        self.run = TrackedRun(path=run_dir, key=key, config=config)
        self.sent: dict[str, int] | None = None  # last step of each kind; None: the tracker must be asked
        self.offset = 0  # bytes of metrics.jsonl that were read
        self.cancelled = False

    def catch_up(self) -> None:
        """Send what the tracker lacks of metrics.jsonl; raises any error of the tracker."""
        self.check_owner()
        try:
            if self.sent is None:
                self.sent, self.offset = dict(self.tracker.open(self.run)), 0
            points = self._missing(self.sent)
            while batch := list(islice(points, BATCH)):
                if self.cancelled:
                    raise TimeoutError("sending takes too long")
                self.tracker.send(batch)
                self.sent |= {point.kind: point.step for point in batch}
        except BaseException:
            self.sent = None
            raise

    def finish(self, outcome: Outcome) -> None:
        """Send all that the tracker lacks, with the result of a finished run, and record how the run ended."""
        self.catch_up()
        assert self.sent is not None
        try:
            result = read_run(self.run.path).result if outcome == "finished" else None
            point = _test_point(self.run.path, result) if result else None
            if result and point and self.sent.get("test", -1) < point.step:
                self.tracker.send_result(point, result, _files(self.run.path, result))
            self.tracker.close(outcome)
        finally:
            self.sent = None

    def _missing(self, sent: Mapping[str, int]) -> Iterator[Point]:
        for line in self._new_lines():
            record = parse(line, MetricsRecord)
            if record.step > sent.get(record.kind, -1):
                figures = _figures(asdict(record).items())
                yield Point(record.kind, record.step, record.unix_time_s, figures)

    def _new_lines(self) -> Iterator[bytes]:
        """Yield the complete lines of metrics.jsonl after the offset."""
        if not self.metrics.exists() or os.path.getsize(self.metrics) <= self.offset:
            return
        with self.metrics.open("rb") as file:
            file.seek(self.offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self.offset += len(line)
                yield line


class Report(Listener):
    """Writes report.html at the end of a run, for trackers."""

    def __str__(self) -> str:
        return "report.html cannot be written"

    def on_start(self, start: RunStart) -> None:
        """Remember the run directory."""
        self.run_dir = start.run_dir

    def on_end(self, end: RunEnd) -> None:
        """Write the report, from the predictions that the run has made already."""
        if end.tested:
            found, dataset = end.tested.probabilities, end.tested.dataset
            write_report(self.run_dir, None if found is None else lambda _: (torch.from_numpy(found), dataset))


class Follower(Listener):
    """Keeps a tracker up to date during training, from a separate thread; `check_owner` as for `Sync`."""

    def __init__(self, tracker: Tracker, check_owner: Callable[[], None]):
        self.tracker, self.check_owner = tracker, check_owner
        self.outcome: Outcome = "failed"
        self.ending, self.done = threading.Event(), threading.Event()
        self.give_up_at = self.longest_wait_s = math.inf

    def on_start(self, start: RunStart) -> None:
        """Start the thread."""
        stall_timeout = start.config.settings["stall_timeout"]
        assert isinstance(stall_timeout, float)
        self.longest_wait_s = stall_timeout / 2
        self.sync = Sync(self.tracker, start.run_dir, start.config, self.check_owner, start.step)
        threading.Thread(target=self._follow, name=f"log to {self.tracker.name}", daemon=True).start()

    def on_end(self, end: RunEnd) -> None:
        """Wait for a limited time until all is sent."""
        path, name = self.sync.run.path, self.tracker.name
        wait_s = min(PATIENCE_S[end.outcome], self.longest_wait_s)
        self.outcome, self.give_up_at = end.outcome, time.monotonic() + wait_s
        self.ending.set()
        if not self.done.wait(wait_s):
            self.sync.cancelled = True
            command = f"dist-mnist log {shell_word(path)} --to {name}"
            warn(f"{name} does not have all of {path}: {command}, or the next start of the run, sends the rest")

    def _follow(self) -> None:
        pause_s, told = 0.0, False
        while not self.done.is_set() and time.monotonic() < self.give_up_at:
            ending = self.ending.wait(pause_s)
            try:
                self.sync.finish(self.outcome) if ending else self.sync.catch_up()
                pause_s, told = EVERY_S, False
                if ending:
                    self.done.set()
            except TakenOver:  # the new owner has its own follower
                self.done.set()
            except Exception as error:
                if not told:
                    told = True
                    self._warn(error)
                pause_s = min(max(2 * pause_s, EVERY_S), LONGEST_S)
                if ending:
                    time.sleep(RETRY_S)

    def _warn(self, error: Exception) -> None:
        what = f"{self.sync.run.path}: logging to {self.tracker.name} failed ({_why(error)})"
        warn(f"{what}; training goes on, and the rest is sent later")


def tracker(name: str) -> Tracker:
    """Import a tracker's library, and return the tracker.

    Raises:
        UserError: the name is unknown, or the library cannot be imported.
    """
    if name not in TRACKERS:
        raise UserError(unknown("tracker", name, TRACKERS))
    try:
        if name == "mlflow":
            from dist_mnist.reporting.listeners.to_mlflow import MLflow

            return MLflow()
        from dist_mnist.reporting.listeners.to_wandb import WandB

        return WandB()
    except ImportError as error:
        raise UserError(f"{name} cannot be imported ({error}): pip install 'dist-mnist[{name}]'") from None


def log_run(run_dir: Path, name: str) -> None:
    """Send a tracker what it lacks of a run that is not being trained.

    Raises:
        UserError: the run cannot be read, another process owns its directory, or the tracker fails.
    """
    run, to = read_run(run_dir), tracker(name)
    with (directory := RunDirectory(run_dir)).owned():
        if run.result:
            write_report(run_dir)
        try:
            Sync(to, run_dir, run.config, directory.ownership.check).finish("finished" if run.result else "stopped")
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"logging to {name} failed: {_why(error)}") from None


def write_report(run_dir: Path, predict: PredictTest | None = None) -> None:
    """Write a finished run's report.html unless it is newer than the result; `predict` as for `write_page`."""
    from dist_mnist.reporting.html import write_page

    page = run_dir / "report.html"
    if not page.exists() or page.stat().st_mtime < (run_dir / "result.json").stat().st_mtime:
        write_page([read_run(run_dir)], page, None, World(0, 1, 0, 1, torch.device("cpu")), predict=predict)


def _identity(run_dir: Path, name: str, config: RunConfig, start_step: int | None) -> Identity:
    """By what a tracker knows a run, kept in its directory, which may be moved.

    A copy, beside which there is still the original, has one of its own; so have other settings that begin there anew.
    """
    path, folder = run_dir / f"{name}.json", path_text(run_dir.resolve())
    digest = from_json(config.settings, run_dir / "config.json").digest(config.data.fingerprint)
    identity = Identity(key=secrets.token_hex(8), digest=digest, folder=folder)
    with suppress(OSError, ValueError):
        found = parse(path.read_bytes(), Identity)
        if (start_step != 0 or found.digest == digest) and not _is_copy(found, path):
            identity = replace(found, folder=folder)
            if found == identity:
                return found
    with atomic_write(path) as file:
        file.write(to_json(identity).encode() + b"\n")
    return identity


def _is_copy(identity: Identity, path: Path) -> bool:
    """Whether the folder for which an identity in the file `path` was made has the same, in a file of its own."""
    original = path_of(identity.folder) / path.name
    with suppress(OSError, ValueError):
        is_same = original.samefile(path)
        return not is_same and parse(original.read_bytes(), Identity).key == identity.key
    return False


def _test_point(run_dir: Path, result: RunResult) -> Point:
    assert isinstance(result.step, int)  # a run's result is of one checkpoint
    seconds = asdict(result.seconds) if result.seconds else {}
    figures = asdict(result) | {f"{name}_s": value for name, value in seconds.items()}
    return Point("test", result.step, (run_dir / "result.json").stat().st_mtime, _figures(figures.items()))


def _why(error: Exception) -> str:
    return short(" ".join(str(error).split()) or type(error).__name__, 300)


def _figures(values: Iterable[tuple[str, object]]) -> dict[str, float]:
    """Return the values that are numbers, except the time, which is a field of `Point`."""
    return {name: value for name, value in values if isinstance(value, int | float) and name != "unix_time_s"}


def _files(run_dir: Path, result: RunResult) -> list[Path]:
    """List the files of a finished run to upload: records, report, and the checkpoint that was tested."""
    names = ("config.json", "metrics.jsonl", "result.json", "report.html")
    paths = [*map(run_dir.joinpath, names), *(run_dir / "checkpoints" / Path(name).name for name in result.checkpoints)]
    return [path for path in paths if path.exists()]
