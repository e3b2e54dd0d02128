"""A fire drill: the same short training undisturbed and under a fault, by real processes, and whether the end is one.

Each run is `dist-mnist train` on a small set of generated digits, with everything on that draws at random. At a random
moment of it the fault is done; where that ends the run, it is started again, as its user would. In the end the bits of
all weights, averages and optimizer states are compared.
"""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dist_mnist.data.sources.synthetic import write_digits
from dist_mnist.elastic.progress import read_progress
from dist_mnist.run.checkpoint import arrays_digest, load_checkpoint
from dist_mnist.run.directory import RunDirectory
from dist_mnist.tools.choices import Fault
from dist_mnist.utils.errors import UserError

STEPS = 60
SETTINGS = (
    f"--steps={STEPS}", "--batch-size=50", "--conv-channels=8,8", "--dense-units=64", "--ema-decay=0.9",
    "--checkpoint-every=5", "--log-every=5", "--stall-timeout=10", "--device=cpu", "--threads=1", "--precision=fp32",
    "--no-tensorboard",
)  # fmt: skip
TIMEOUT_S = 240.0
STARTS = 6  # after which a run that does not come to its end is given up
OUTSIDE_THE_STEPS = 0.5  # share of the moments that are drawn in time
SMALL_FILE = 20_000  # bytes; no checkpoint fits


@dataclass(frozen=True)
class Outcome:
    """What came of one drill."""

    fault: str
    moment_s: float  # after the run's start
    step: int | None  # where rank 0 was; None before it had begun, or after its end
    phase: str
    starts: int
    seconds: float
    same: bool
    left: list[str]  # processes and unfinished files that should have gone
    said: str  # the last warning, error or farewell


class Run:
    """A training in a folder, with its processes."""

    def __init__(self, folder: Path, data: Path, nproc: int, options: tuple[str, ...] = ()):
        self.directory = RunDirectory(folder)
        self.log_path = folder.with_suffix(".log")
        self.command = [
            sys.executable, "-m", "dist_mnist", "train", f"--nproc={nproc}", f"--data-dir={data}",
            f"--run-dir={folder}", *SETTINGS, *options,
        ]  # fmt: skip
        self.starts = 0
        self.began = time.monotonic()
        self.process: subprocess.Popen[bytes]

    def start(self) -> None:
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, start_new_session=True)
        self.starts += 1

    def ranks(self) -> list[int]:
        """Process ids of the ranks that are alive, in the order of their start."""
        return sorted(_children(self.process.pid))

    def end_all(self) -> None:
        """Kill torchrun and its ranks, and wait until they have gone."""
        for pid in (self.process.pid, *self.ranks()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def finish(self) -> None:
        """Wait for the end, starting again what ended early.

        Raises:
            UserError: it does not end, or not well.
        """
        until = time.monotonic() + TIMEOUT_S
        while not self.directory.result_path.exists():
            try:
                self.process.wait(timeout=until - time.monotonic())
            except subprocess.TimeoutExpired:
                self.end_all()
                raise UserError(f"the run {self.directory.path} does not end; see {self.log_path}") from None
            if self.directory.result_path.exists():
                break
            if self.starts == STARTS:
                raise UserError(f"{STARTS} starts of {self.directory.path} came to no result; see {self.log_path}")
            self.start()
        self.process.wait(timeout=60)

    def digest(self) -> str:
        """Of all arrays in the last checkpoint, which has to be that of the last step."""
        last = load_checkpoint(self.directory.checkpoints.paths()[-1])
        return arrays_digest(last.arrays) if last.info.step == STEPS else f"ended at step {last.info.step}"

    def left(self) -> list[str]:
        """Processes of this run that are alive, and files that were not finished."""
        option = f"--run-dir={self.directory.path}".encode()
        files = [path for path in self.directory.path.rglob(".*") if path.name != ".lock"]
        return [f"process {pid}" for pid, words in _command_lines() if option in words] + list(map(str, files))

    def last_words(self) -> str:
        lines = self.log_path.read_text(errors="replace").splitlines()
        told = [line for line in lines if line.startswith(("error: ", "warning: ", "stopped "))]
        return told[-1] if told else ""


def drill(
    faults: list[str], times: int, nproc: int, seed: int, folder: Path, phase: str | None = None
) -> Iterator[Outcome]:
    """Do each of `faults` so many `times` to a run of its own below `folder`; outcomes come as they are known.

    Their moments are random: now in time, from start to end, now when rank 0 comes to a random step, because a short
    run spends most of its time in starting; or, with `phase`, when rank 0 is in a phase of that name.

    Raises:
        UserError: a run does not come to its end.
    """
    data = folder / "data"
    write_digits(data, num_train=1_000, num_test=200)
    undisturbed = Run(folder / "undisturbed", data, nproc)
    undisturbed.start()
    undisturbed.finish()
    length_s = time.monotonic() - undisturbed.began
    draw = random.Random(seed)
    for number in range(times):
        for fault in faults:
            run = Run(folder / f"{fault}-{number}", data, nproc)
            moment_s, step = draw.uniform(0, length_s), draw.randrange(STEPS * 9 // 10)
            run.start()
            if phase is None and draw.random() < OUTSIDE_THE_STEPS:
                _wait_until(run, time.monotonic() + moment_s)
            else:
                _wait_for(run, phase, step)
            yield _disturb(run, fault, draw, undisturbed.digest())


def _wait(run: Run, until: Callable[[], bool]) -> None:
    """Wait for something, but not beyond the run's end."""
    while not until() and run.process.poll() is None:
        time.sleep(0.0005)


def _wait_until(run: Run, moment: float) -> None:
    _wait(run, lambda: time.monotonic() >= moment)


def _wait_for(run: Run, phase: str | None, step: int) -> None:
    """Wait until rank 0 is at a step or later, in a phase if one is named; some are not of a step."""

    def there() -> bool:
        at, now = read_progress(run.directory.progress_path) or (-1, "")
        return phase in (None, now) and (at >= step or phase in ONCE)

    _wait(run, there)


def _disturb(run: Run, fault: str, draw: random.Random, expected: str) -> Outcome:
    if fault in NEED_A_CHECKPOINT:
        _wait(run, lambda: bool(run.directory.checkpoints.paths()))
    step, phase = read_progress(run.directory.progress_path) or (None, "before or after the steps")
    moment_s = time.monotonic() - run.began
    with suppress(ProcessLookupError):  # it may have ended by itself just now
        FAULTS[fault](run, draw)
    run.finish()
    same = run.digest() == expected
    return Outcome(
        fault, moment_s, step, phase, run.starts, time.monotonic() - run.began, same, run.left(), run.last_words()
    )


def _kill(run: Run, draw: random.Random) -> None:
    """One rank, or torchrun, or everything at once."""
    victims = [*run.ranks(), run.process.pid]
    victim = draw.choice([*victims, None])
    if victim is None:
        run.end_all()
    else:
        os.kill(victim, signal.SIGKILL)


def _term(run: Run, draw: random.Random) -> None:
    """A request to stop, to torchrun or to a rank."""
    os.kill(draw.choice([*run.ranks(), run.process.pid]), draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]))


def _stop(run: Run, draw: random.Random) -> None:
    """One rank stands still, and does not wake up again."""
    if ranks := run.ranks():
        os.kill(draw.choice(ranks), signal.SIGSTOP)


def _truncate(run: Run, draw: random.Random) -> None:
    """Everything is killed, and the newest checkpoint has lost its end."""
    run.end_all()
    for path in run.directory.checkpoints.paths()[-1:]:
        os.truncate(path, draw.randrange(path.stat().st_size))


def _flip(run: Run, draw: random.Random) -> None:
    """Everything is killed, and one bit of the newest checkpoint has changed."""
    run.end_all()
    flip_bit(run, draw)


def flip_bit(run: Run, draw: random.Random) -> None:
    """Change one bit of the newest checkpoint, if there is one."""
    for path in run.directory.checkpoints.paths()[-1:]:
        content = bytearray(path.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)


def _no_room(run: Run, _: random.Random) -> None:
    """From now on rank 0's writes of checkpoints fail, as on a full disk."""
    for pid in run.ranks()[:1]:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (SMALL_FILE, SMALL_FILE))


FAULTS: dict[str, Callable[[Run, random.Random], None]] = {
    Fault.KILL: _kill,
    Fault.TERM: _term,
    Fault.STOP: _stop,
    Fault.TRUNCATE: _truncate,
    Fault.FLIP: _flip,
    Fault.NO_ROOM: _no_room,
}
ONCE = ("start", "rendezvous", "set-up", "evaluation", "exit")  # phases outside the steps
NEED_A_CHECKPOINT = (Fault.TRUNCATE, Fault.FLIP)


def _command_lines() -> Iterator[tuple[int, list[bytes]]]:
    """Process ids and command lines of all processes."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            yield int(path.parent.name), path.read_bytes().split(b"\0")


def _children(pid: int) -> set[int]:
    """Process ids of a process's children, on Linux."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").glob("*/children"))
        return {int(child) for task in tasks for child in task.read_text().split()}
    except OSError:
        return set()
