"""Measure alternatives in alternation and compare them within each round, since the speed of machines drifts."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dist_mnist.run.records import MetricsRecord, RunResult
from dist_mnist.utils.schema import parse

TIMEOUT_S = 3600

Way = Callable[[], float]


@dataclass(frozen=True)
class Measured:
    """Median of an alternative over the rounds; median and range of its ratio to the reference in the same round."""

    name: str
    value: float
    reference: str
    ratio: float
    lowest: float
    highest: float

    def __str__(self) -> str:
        return f"{self.name:32}{quantity(self.value):>9}  {self.ratio:.3f} ({self.lowest:.3f} to {self.highest:.3f})"


def by_turns(ways: Mapping[str, Way], rounds: int, reference: str) -> list[Measured]:
    """Measure each way once per round, in reverse order every other round; ratios are to the way named `reference`."""
    measured: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in list(ways)[:: -1 if number % 2 else 1]:
            measured[name].append(ways[name]())
    ratios = {
        name: [value / other for value, other in zip(values, measured[reference], strict=True)]
        for name, values in measured.items()
    }
    return [
        Measured(name, statistics.median(measured[name]), reference, statistics.median(found), min(found), max(found))
        for name, found in ratios.items()
    ]


def print_rows(unit: str, rows: Sequence[Measured], rounds: int) -> None:
    """Print a table."""
    print(f"{unit}, medians of {rounds} rounds; ratio to {rows[0].reference!r} (range)")
    print(*rows, "", sep="\n", flush=True)


def quantity(value: float) -> str:
    """Format with at least three significant digits: `5.50 M`, `1,680`, `8.01`."""
    return f"{value / 1e6:.2f} M" if value >= 1e5 else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def rate(pipeline: Callable[[], Iterator[int]], seconds: float) -> float:
    """Return the images per second of a pipeline that yields batch sizes, after its first, for `seconds` at most."""
    batch_sizes = pipeline()
    next(batch_sizes)
    began, images, elapsed = time.perf_counter(), 0, 0.0
    for size in batch_sizes:
        images, elapsed = images + size, time.perf_counter() - began
        if elapsed >= seconds:
            break
    return images / elapsed


class Watched(NamedTuple):
    """Observation of a process: the last line of output with the given beginning, its time, and that of the exit."""

    line: str
    line_s: float  # seconds since the process was started
    whole_s: float


def watch(command: Sequence[str], beginning: str, **options: Any) -> Watched:
    """Run a command to its end and watch for lines with this `beginning`; "" matches any line, and none is required.

    `options` are passed to Popen.

    Raises:
        subprocess.CalledProcessError: the command failed.
        ValueError: no line of its output began with `beginning`.
    """
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options) as process:
        assert process.stdout is not None
        try:
            lines = [(line, time.perf_counter()) for line in process.stdout if line.startswith(beginning)]
            process.wait(TIMEOUT_S)
        except BaseException:  # such as Ctrl-C
            process.terminate()
            raise
        ended = time.perf_counter()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    if beginning and not lines:
        raise ValueError(f"no line of the output of {' '.join(command)} began with {beginning!r}")
    line, at = lines[-1] if lines else ("", ended)
    return Watched(line.rstrip(), at - began, ended - began)


def train(*options: object, nproc: int = 1, checkout: Path | None = None) -> list[MetricsRecord]:
    """Train in new processes, with the package of `checkout` if given; return the training records of metrics.jsonl.

    Raises:
        subprocess.CalledProcessError: the run failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        _watch_run(folder, nproc, options, checkout)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
        return [record for line in lines if (record := parse(line, MetricsRecord)).kind == "train"]


def first_step_s(*options: object, checkout: Path | None = None) -> float:
    """Return the seconds from the start of Python to the first step of a run, started as by `train`."""
    with tempfile.TemporaryDirectory() as folder:
        return _watch_run(folder, 1, ("--steps=1", "--log-every=1", *options), checkout, "step 1/").line_s


def whole_run(*options: object, checkout: Path | None = None) -> tuple[Watched, RunResult]:
    """Watch a run, started as by `train`, from the start of Python to its exit; the line is its test accuracy."""
    with tempfile.TemporaryDirectory() as folder:
        watched = _watch_run(folder, 1, options, checkout, "test accuracy ")
        return watched, parse((Path(folder) / "run" / "result.json").read_bytes(), RunResult)


def _watch_run(
    folder: str, nproc: int, options: Sequence[object], checkout: Path | None, beginning: str = ""
) -> Watched:
    module = ["dist_mnist.train"] if nproc == 1 else ["dist_mnist", "train", f"--nproc={nproc}", "--max-restarts=0"]
    command = [sys.executable, "-m", *module, "--no-tensorboard", f"--run-dir={folder}/run", *map(str, options)]
    # Python searches the working directory before PYTHONPATH.
    environment = os.environ | ({"PYTHONPATH": str(checkout)} if checkout else {})
    return watch(command, beginning, env=environment, cwd=folder if checkout else None)
