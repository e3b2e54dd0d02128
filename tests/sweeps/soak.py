"""Soak test: train for an hour or more with a fault every minute; all runs must end, and no process may grow.

    python tests/sweeps/soak.py [--minutes 60] [--every 60] [--nproc 2] [--folder DIR] [-- options of dist-mnist train]

Runs with seeds 0, 1, ... are trained one after the other until the time is over; the last one may finish. Without
training options they use generated digits and a small network. The faults:

    pause     a rank is suspended for three seconds
    no_room   rank 0's files cannot grow for ten seconds, as on a full disk
    rot       a bit of the newest checkpoint flips
    lose      the newest checkpoint is deleted
    kill      one rank is killed; torchrun restarts all ranks
    term      the run gets a stop request; it is started again, as a user would
    end       torchrun and all ranks are killed; the run is started again

Every fourth fault ends ranks, so that some ranks live for minutes. Open files, threads and memory of every process are
sampled every few seconds. For processes that live long enough, the medians of the two halves of their life are
compared, without its first 45 seconds. A process that has grown, a run that does not end, and one that leaves processes
or unfinished files behind are failures. (`dist-mnist drill` verifies the final bits.)
"""

import argparse
import json
import os
import random
import resource
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from dist_mnist.data.sources.synthetic import write_digits
from dist_mnist.elastic.progress import read_progress
from dist_mnist.tools.drill.faults import SMALL_FILE, rot
from dist_mnist.tools.drill.training import DisturbedTraining
from dist_mnist.utils.errors import UserError

SMALL = (
    "--steps=16000", "--batch-size=50", "--conv-channels=8,8", "--dense-units=64", "--threads=1", "--log-every=500",
    "--checkpoint-every=500", "--validate-every=2000", "--ema-decay=0.99",
)  # fmt: skip
LATE_S = 3600.0  # time limit for the last run after the time is over
SAMPLE_S = 5.0
SETTLED_S = 45.0  # after which a rank should not grow any more
GROWTH = {"open files": 2, "threads": 2, "MB": 40}  # more growth is a leak


@dataclass
class Life:
    """Samples of one process: (seconds since the first sample, open files, threads, MB)."""

    name: str
    began: float = field(default_factory=time.monotonic)
    samples: list[tuple[float, int, int, int]] = field(default_factory=list)

    def look(self, pid: int) -> None:
        with suppress(OSError, StopIteration, ProcessLookupError):
            status = Path(f"/proc/{pid}/status").read_text().splitlines()
            values = {line.split(":")[0]: line.split()[1] for line in status if line.startswith(("VmRSS", "Threads"))}
            files = len(os.listdir(f"/proc/{pid}/fd"))
            seconds = time.monotonic() - self.began
            self.samples.append((seconds, files, int(values["Threads"]), int(values.get("VmRSS", 0)) // 1024))

    def growth(self) -> dict[str, int] | None:
        """Return the growth between the medians of the two halves of the settled life; None if that is too short."""
        settled = [sample[1:] for sample in self.samples if sample[0] >= SETTLED_S]
        if len(settled) < 12:
            return None
        half = len(settled) // 2
        early, late = (list(map(sorted, zip(*part, strict=True))) for part in (settled[:half], settled[half:]))
        return {what: late[i][len(late[i]) // 2] - early[i][len(early[i]) // 2] for i, what in enumerate(GROWTH)}


class Observer(threading.Thread):
    """Samples the processes of the current run every few seconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.run_: DisturbedTraining | None = None
        self.lives: dict[tuple[int, int], Life] = {}
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(SAMPLE_S):
            run = self.run_
            if run is None or run.process.poll() is not None:
                continue
            for pid, name in [(run.process.pid, "torchrun"), *((pid, "a rank") for pid in run.ranks())]:
                with suppress(OSError, IndexError):
                    started = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19])
                    self.lives.setdefault((pid, started), Life(name)).look(pid)


def pause(run: DisturbedTraining, draw: random.Random) -> None:
    if ranks := run.ranks():
        rank = draw.choice(ranks)
        os.kill(rank, signal.SIGSTOP)
        time.sleep(3)
        os.kill(rank, signal.SIGCONT)


def no_room(run: DisturbedTraining, _: random.Random) -> None:
    for pid in run.ranks()[:1]:
        now, most = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (SMALL_FILE, most))
        time.sleep(10)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (now, most))


def lose(run: DisturbedTraining, _: random.Random) -> None:
    for path in run.directory.checkpoints.paths()[-1:]:
        path.unlink()


def kill(run: DisturbedTraining, draw: random.Random) -> None:
    if ranks := run.ranks():
        os.kill(draw.choice(ranks), signal.SIGKILL)


def term(run: DisturbedTraining, _: random.Random) -> None:
    os.kill(run.process.pid, signal.SIGTERM)


def end(run: DisturbedTraining, _: random.Random) -> None:
    run.end_all()


MILD: tuple[Callable[[DisturbedTraining, random.Random], None], ...] = (pause, no_room, rot, lose)
HARD: tuple[Callable[[DisturbedTraining, random.Random], None], ...] = (kill, term, end)


def soak(minutes: float, every_s: float, nproc: int, folder: Path, options: list[str]) -> int:
    """Run the soak test and return the number of failures."""
    if not options:
        write_digits(folder / "data", num_train=5_000, num_test=500)
        options = [f"--data-dir={folder / 'data'}", *SMALL]
    draw, observer, failures = random.Random(0), Observer(), 0
    observer.start()
    until, next_fault, faults = time.monotonic() + 60 * minutes, time.monotonic() + every_s, 0
    seed = 0
    while time.monotonic() < until:
        run = _Soaked(folder / f"seed-{seed}", nproc, [*options, f"--seed={seed}"])
        run.start()
        observer.run_, faults_before = run, faults
        try:
            while not run.directory.result_path.exists() or run.process.poll() is None:
                if run.process.poll() is not None:
                    if run.starts > faults - faults_before + 3 or time.monotonic() > until + LATE_S:
                        raise UserError(f"{run.starts} starts of {run.directory.path} came to no end; {run.log_path}")
                    run.start()
                if time.monotonic() >= next_fault:
                    fault = draw.choice(HARD if faults % 4 == 3 else MILD)
                    step, phase = read_progress(run.directory.progress_path) or (None, "no step")
                    with suppress(ProcessLookupError, FileNotFoundError):
                        fault(run, draw)
                    now = time.strftime("%H:%M:%S")
                    print(f"{now}  seed {seed}  {fault.__name__:8} at step {step} ({phase})", flush=True)
                    faults, next_fault = faults + 1, time.monotonic() + every_s
                time.sleep(0.2)
        finally:
            if run.process.poll() is None:
                run.end_all()
        left = run.left()
        failures += bool(left)
        result = json.loads(run.directory.result_path.read_text())["accuracy"]
        ended = f"seed {seed} has ended after {run.starts} starts: test accuracy {result}"
        print(f"{ended}; left behind: {left or 'nothing'}", flush=True)
        seed += 1
    observer.over.set()
    observer.join()
    for name in ("torchrun", "a rank"):
        lives = [life for life in observer.lives.values() if life.name == name]
        grown = [(life, growth) for life in lives if (growth := life.growth()) is not None]
        leaks = [(life, growth) for life, growth in grown if any(growth[what] > most for what, most in GROWTH.items())]
        failures += len(leaks)
        most = {what: max((growth[what] for _, growth in grown), default=0) for what in GROWTH}
        longest = max((life.samples[-1][0] for life, _ in grown), default=0)
        print(f"{name}: {len(lives)} processes, {len(grown)} long enough to judge (longest {longest / 60:.0f} min); "
              f"most growth: {', '.join(f'{value} {what}' for what, value in most.items())}")  # fmt: skip
    print(f"{faults} faults in {minutes:g} minutes, {seed} runs, {failures} failures")
    return failures


class _Soaked(DisturbedTraining):
    """A drill's run with only the user's own options."""

    def __init__(self, folder: Path, nproc: int, options: list[str]):
        super().__init__(folder, Path(), nproc)
        own = (f"--run-dir={folder}", "--device=cpu", "--stall-timeout=30", "--max-restarts=1000")
        self.options = (*own, *options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--every", type=float, default=60, help="seconds between faults")
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to train (default: a temporary folder)")
    parser.add_argument("options", nargs="*")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            sys.exit(bool(soak(arguments.minutes, arguments.every, arguments.nproc, folder, arguments.options)))
        except UserError as error:
            sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
