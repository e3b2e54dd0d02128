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

import psutil

from dist_mnist.data.sources.synthetic import write_digits
from dist_mnist.elastic.agent import children
from dist_mnist.elastic.preemption import SIGNALS
from dist_mnist.elastic.progress import read_progress
from dist_mnist.run.checkpoints.file import arrays_digest, load_checkpoint
from dist_mnist.run.directory import RunDirectory
from dist_mnist.tools.choices import Fault
from dist_mnist.utils.errors import UserError

STEPS = 60
NETWORK = ("--conv-channels=8,8", "--dense-units=64")
SETTINGS = (
    f"--steps={STEPS}", "--batch-size=50", "--ema-decay=0.9", "--checkpoint-every=5", "--log-every=5",
    "--stall-timeout=10", "--device=cpu", "--threads=1", "--precision=fp32", "--no-tensorboard",
)  # fmt: skip
TIMEOUT_S = 240.0
STARTS = 6  # after which a run that does not come to its end is given up
OUTSIDE_THE_STEPS = 0.5  # share of the moments that are drawn in time
SMALL_FILE = 20_000  # bytes; no checkpoint fits


@dataclass(frozen=True)
class Outcome:
    """What came of one drill."""

    fault: Fault
    moment_s: float  # after the run's start
    step: int | None  # where rank 0 was; None before it had begun, or after its end
    phase: str
    starts: int
    seconds: float
    same: bool
    left: list[str]  # processes and unfinished files that should have gone
    said: str  # the last warning, error or farewell


class DisturbedTraining:
    """A training that faults are done to: its processes, its run directory, and its starts until it has a result."""

    def __init__(self, folder: Path, data: Path, nproc: int, options: tuple[str, ...] = NETWORK):
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
        return sorted(rank.pid for rank in children(self.process.pid))

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
        option = f"--run-dir={self.directory.path}"
        processes = [p.pid for p in psutil.process_iter(["cmdline"]) if option in (p.info["cmdline"] or [])]
        files = [path for path in self.directory.path.rglob(".*") if path.name != ".lock"]
        return [f"process {pid}" for pid in processes] + list(map(str, files))

    def last_words(self) -> str:
        lines = self.log_path.read_text(errors="replace").splitlines()
        told = [line for line in lines if line.startswith(("error: ", "warning: ", "stopped "))]
        return told[-1] if told else ""


def drill(
    faults: list[Fault],
    times: int,
    nproc: int,
    seed: int,
    folder: Path,
    phase: str | None = None,
    model: str | None = None,
) -> Iterator[Outcome]:
    """Do each of `faults` so many `times` to a run of its own below `folder`; outcomes come as they are known.

    Their moments are random: now in time, from start to end, now when rank 0 comes to a random step, because a short
    run spends most of its time in starting; or, with `phase`, when rank 0 is in a phase of that name. Runs train a
    small CNN, or `model`.

    Raises:
        UserError: a run does not come to its end.
    """
    data, network = folder / "data", (f"--model={model}",) if model else NETWORK
    write_digits(data, num_train=1_000, num_test=200)
    undisturbed = DisturbedTraining(folder / "undisturbed", data, nproc, network)
    undisturbed.start()
    undisturbed.finish()
    length_s = time.monotonic() - undisturbed.began
    draw = random.Random(seed)
    for number in range(times):
        for fault in faults:
            training = DisturbedTraining(folder / f"{fault}-{number}", data, nproc, network)
            moment_s, step = draw.uniform(0, length_s), draw.randrange(STEPS * 9 // 10)
            training.start()
            if phase is None and draw.random() < OUTSIDE_THE_STEPS:
                _wait_until(training, time.monotonic() + moment_s)
            else:
                _wait_for(training, phase, step)
            yield _disturb(training, fault, draw, undisturbed.digest())


def _wait(training: DisturbedTraining, until: Callable[[], bool]) -> None:
    """Wait for something, but not beyond the run's end."""
    while not until() and training.process.poll() is None:
        time.sleep(0.0005)


def _wait_until(training: DisturbedTraining, moment: float) -> None:
    _wait(training, lambda: time.monotonic() >= moment)


def _wait_for(training: DisturbedTraining, phase: str | None, step: int) -> None:
    """Wait until rank 0 is at a step or later, in a phase if one is named; some are not of a step."""

    def there() -> bool:
        at, now = read_progress(training.directory.progress_path) or (-1, "")
        return phase in (None, now) and (at >= step or phase in ONCE)

    _wait(training, there)


def _disturb(training: DisturbedTraining, fault: Fault, draw: random.Random, expected: str) -> Outcome:
    if fault in NEED_A_CHECKPOINT:
        _wait(training, lambda: bool(training.directory.checkpoints.paths()))
    step, phase = read_progress(training.directory.progress_path) or (None, "before or after the steps")
    moment_s = time.monotonic() - training.began
    with suppress(ProcessLookupError):  # it may have ended by itself just now
        FAULTS[fault](training, draw)
    training.finish()
    same, seconds = training.digest() == expected, time.monotonic() - training.began
    return Outcome(fault, moment_s, step, phase, training.starts, seconds, same, training.left(), training.last_words())


def _kill(training: DisturbedTraining, draw: random.Random) -> None:
    """One rank, or torchrun, or everything at once."""
    victims = [*training.ranks(), training.process.pid]
    victim = draw.choice([*victims, None])
    if victim is None:
        training.end_all()
    else:
        os.kill(victim, signal.SIGKILL)


def _term(training: DisturbedTraining, draw: random.Random) -> None:
    """A request to stop, to torchrun or to a rank."""
    os.kill(draw.choice([*training.ranks(), training.process.pid]), draw.choice(SIGNALS))


def _stop(training: DisturbedTraining, draw: random.Random) -> None:
    """One rank stands still, and does not wake up again."""
    if ranks := training.ranks():
        os.kill(draw.choice(ranks), signal.SIGSTOP)


def _truncate(training: DisturbedTraining, draw: random.Random) -> None:
    """Everything is killed, and the newest checkpoint has lost its end."""
    training.end_all()
    for path in training.directory.checkpoints.paths()[-1:]:
        os.truncate(path, draw.randrange(path.stat().st_size))


def _flip(training: DisturbedTraining, draw: random.Random) -> None:
    """Everything is killed, and one bit of the newest checkpoint has changed."""
    training.end_all()
    flip_bit(training, draw)


def flip_bit(training: DisturbedTraining, draw: random.Random) -> None:
    """Change one bit of the newest checkpoint, if there is one."""
    for path in training.directory.checkpoints.paths()[-1:]:
        content = bytearray(path.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)


def _no_room(training: DisturbedTraining, _: random.Random) -> None:
    """From now on rank 0's writes of checkpoints fail, as on a full disk."""
    for pid in training.ranks()[:1]:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (SMALL_FILE, SMALL_FILE))


FAULTS: dict[Fault, Callable[[DisturbedTraining, random.Random], None]] = {
    Fault.KILL: _kill, Fault.TERM: _term, Fault.STOP: _stop, Fault.TRUNCATE: _truncate, Fault.FLIP: _flip,
    Fault.NO_ROOM: _no_room,
}  # fmt: skip
ONCE = ("start", "rendezvous", "set-up", "evaluation", "exit")  # phases outside the steps
NEED_A_CHECKPOINT = (Fault.TRUNCATE, Fault.FLIP)
