"""Services that keep runs, such as MLflow: a thread sends them what a run directory has and they lack.

The run directory is what counts. A tracker is asked which steps it has, when it is opened and after each failure, and
gets the lines of metrics.jsonl beyond them. So no step is there twice, though a run that was killed repeats some, and
none is missing, though the tracker was down: what it lacks it gets when it is back, at the next start of the run, or by
`dist-mnist log`.
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
from msgspec.structs import asdict

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
from dist_mnist.utils.files import atomic_write, shell_word, to_json
from dist_mnist.utils.schema import parse

EVERY_S = 2.0  # from one look at metrics.jsonl to the next; twice as long after each failure, up to
LONGEST_S = 30.0
RETRY_S = 1.0  # at the end
PATIENCE_S: Mapping[Outcome, float] = {"finished": 30.0, "stopped": 5.0, "failed": 5.0}  # at the end, at most
BATCH = 40  # points that are sent at once; MLflow takes 1000 metrics


class Identity(Struct, frozen=True, kw_only=True):
    """`mlflow.json` and the like in a run directory: by what key the tracker knows the run, and what that computes."""

    key: Annotated[str, Meta(pattern="^[0-9a-f]{16}$")]
    digest: str


class Sync:
    """Brings a tracker up to date with a run directory.

    Args:
        check_owner: raises where the run is another process's by now.
        start_step: of a run that is trained now; where it begins anew with other settings, it gets a key of its own.
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
        self.sent: dict[str, int] | None = None  # the last step of each kind; None: to be asked for
        self.offset = 0  # of what was read of metrics.jsonl
        self.cancelled = False

    def catch_up(self) -> None:
        """Send what the tracker lacks of metrics.jsonl; raises whatever keeps it from that."""
        self.check_owner()
        try:
            if self.sent is None:
                self.sent, self.offset = dict(self.tracker.open(self.run)), 0
            points = self._missing(self.sent)
            while batch := list(islice(points, BATCH)):
                if self.cancelled:
                    raise TimeoutError("it takes too long")
                self.tracker.send(batch)
                self.sent |= {point.kind: point.step for point in batch}
        except BaseException:
            self.sent = None
            raise

    def finish(self, outcome: Outcome) -> None:
        """Send all that it lacks, the result of a finished run too, and say how the run ended."""
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
        """Those of metrics.jsonl beyond the offset that are whole."""
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
    """Writes report.html at the end, for trackers."""

    def __str__(self) -> str:
        return "report.html cannot be written"

    def on_start(self, start: RunStart) -> None:
        """Note where."""
        self.run_dir = start.run_dir

    def on_end(self, end: RunEnd) -> None:
        """Write it, of what was predicted already."""
        if end.tested:
            found, dataset = end.tested.probabilities, end.tested.dataset
            write_report(self.run_dir, None if found is None else lambda _: (torch.from_numpy(found), dataset))


class Follower(Listener):
    """Keeps a tracker up to date while a run trains, from a thread of its own; `check_owner` as of `Sync`."""

    def __init__(self, tracker: Tracker, check_owner: Callable[[], None]):
        self.tracker, self.check_owner = tracker, check_owner
        self.outcome: Outcome = "failed"
        self.ending, self.done = threading.Event(), threading.Event()
        self.give_up_at = self.longest_wait_s = math.inf

    def on_start(self, start: RunStart) -> None:
        """Begin to follow."""
        stall_timeout = start.config.settings["stall_timeout"]
        assert isinstance(stall_timeout, float)
        self.longest_wait_s = stall_timeout / 2
        self.sync = Sync(self.tracker, start.run_dir, start.config, self.check_owner, start.step)
        threading.Thread(target=self._follow, name=f"log to {self.tracker.name}", daemon=True).start()

    def on_end(self, end: RunEnd) -> None:
        """Wait until all is sent, for a limited time."""
        path, name = self.sync.run.path, self.tracker.name
        wait_s = min(PATIENCE_S[end.outcome], self.longest_wait_s)
        self.outcome, self.give_up_at = end.outcome, time.monotonic() + wait_s
        self.ending.set()
        if not self.done.wait(wait_s):
            self.sync.cancelled = True
            command = f"dist-mnist log {shell_word(path)} --to {name}"
            warn(f"{name} lacks a part of {path}: {command}, or the next start, sends it")

    def _follow(self) -> None:
        pause_s, told = 0.0, False
        while not self.done.is_set() and time.monotonic() < self.give_up_at:
            ending = self.ending.wait(pause_s)
            try:
                self.sync.finish(self.outcome) if ending else self.sync.catch_up()
                pause_s, told = EVERY_S, False
                if ending:
                    self.done.set()
            except TakenOver:  # whose new owner has a follower, too
                self.done.set()
            except Exception as error:
                if not told:
                    told = True
                    self._warn(error)
                pause_s = min(max(2 * pause_s, EVERY_S), LONGEST_S)
                if ending:
                    time.sleep(RETRY_S)

    def _warn(self, error: Exception) -> None:
        what = f"{self.sync.run.path}: {self.tracker.name} takes nothing ({_why(error)})"
        warn(f"{what}; training goes on, and what it lacks is sent later")


def tracker(name: str) -> Tracker:
    """The tracker of that name, with its library imported.

    Raises:
        UserError: there is none of that name, or its library cannot be imported.
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
    """Send a tracker what it lacks of a run that no process trains in.

    Raises:
        UserError: the run cannot be read, a process is at work in it, or the tracker takes nothing.
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
            raise UserError(f"{name} takes nothing: {_why(error)}") from None


def write_report(run_dir: Path, predict: PredictTest | None = None) -> None:
    """Write a finished run's report.html, unless there is one newer than the result; `predict` as of `write_page`."""
    from dist_mnist.reporting.html import write_page

    page = run_dir / "report.html"
    if not page.exists() or page.stat().st_mtime < (run_dir / "result.json").stat().st_mtime:
        write_page([read_run(run_dir)], page, None, World(0, 1, 0, 1, torch.device("cpu")), predict=predict)


def _identity(run_dir: Path, name: str, config: RunConfig, start_step: int | None) -> Identity:
    """By what a tracker knows a run, kept in its directory; a new one for other settings that begin there anew."""
    path = run_dir / f"{name}.json"
    digest = from_json(config.settings, run_dir / "config.json").digest(config.data.fingerprint)
    with suppress(OSError, ValueError):
        found = parse(path.read_bytes(), Identity)
        if start_step != 0 or found.digest == digest:
            return found
    made = Identity(key=secrets.token_hex(8), digest=digest)
    with atomic_write(path) as file:
        file.write(to_json(made).encode() + b"\n")
    return made


def _test_point(run_dir: Path, result: RunResult) -> Point:
    assert isinstance(result.step, int)  # of one checkpoint
    seconds = asdict(result.seconds) if result.seconds else {}
    figures = asdict(result) | {f"{name}_s": value for name, value in seconds.items()}
    return Point("test", result.step, (run_dir / "result.json").stat().st_mtime, _figures(figures.items()))


def _why(error: Exception) -> str:
    return short(" ".join(str(error).split()) or type(error).__name__, 300)


def _figures(values: Iterable[tuple[str, object]]) -> dict[str, float]:
    """Those that are numbers; time stands beside them."""
    return {name: value for name, value in values if isinstance(value, int | float) and name != "unix_time_s"}


def _files(run_dir: Path, result: RunResult) -> list[Path]:
    """What a finished run leaves for others: records, the page, and the checkpoint that was tested."""
    names = ("config.json", "metrics.jsonl", "result.json", "report.html")
    paths = [*map(run_dir.joinpath, names), *(run_dir / "checkpoints" / Path(name).name for name in result.checkpoints)]
    return [path for path in paths if path.exists()]
