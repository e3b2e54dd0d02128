"""Fault injection: the same short training undisturbed and under each fault, in real processes.

Each run is `dist-mnist train` on a small set of generated digits, with every random component enabled. The fault is
injected at a random moment; if it ends the run, the run is started again, as a user would. In the end the bits of all
weights, EMA and optimizer states are compared with those of the undisturbed run.
"""

import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from dist_mnist.data.sources.synthetic import write_digits
from dist_mnist.elastic.preemption import SIGNALS
from dist_mnist.elastic.progress import read_progress
from dist_mnist.tools.choices import Fault
from dist_mnist.tools.drill.flipped import GRADIENT, Flip
from dist_mnist.tools.drill.training import NETWORK, STEPS, DisturbedTraining
from dist_mnist.utils.errors import UserError

OUTSIDE_THE_STEPS = 0.5  # fraction of the faults whose moment is a random time, not a random step
SMALL_FILE = 20_000  # bytes; no checkpoint fits


@dataclass(frozen=True)
class Outcome:
    """The result of one drill."""

    fault: Fault
    moment_s: float  # from the run's start to the fault
    step: int | None  # rank 0's step at the fault; None before its start or after its end
    phase: str
    starts: int
    seconds: float
    same: bool  # whether the final bits equal those of the undisturbed run
    verdict: str
    well: bool  # whether the verdict is as expected, and nothing is left behind
    left: list[str]  # processes and unfinished files left behind
    said: str  # the last warning, error or stop message; for FLIP, the bit that was flipped


def drill(
    faults: list[Fault],
    times: int,
    nproc: int,
    seed: int,
    folder: Path,
    phase: str | None = None,
    model: str | None = None,
) -> Iterator[Outcome]:
    """Inject each of `faults` `times` times, each in a separate run below `folder`; yield outcomes as they arrive.

    The moment is random: either a time between start and end, or when rank 0 reaches a random step, because a short run
    spends most of its time in starting; or, with `phase`, when rank 0 is in the phase of that name. Runs train a small
    CNN, or `model`.

    Raises:
        UserError: a run does not finish.
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
            if fault == Fault.FLIP:
                yield _flip(training, Flip.drawn(draw, nproc, STEPS), undisturbed.digest())
                continue
            moment_s, step = draw.uniform(0, length_s), draw.randrange(STEPS * 9 // 10)
            training.start()
            if phase is None and draw.random() < OUTSIDE_THE_STEPS:
                _wait_until(training, time.monotonic() + moment_s)
            else:
                _wait_for(training, phase, step)
            yield _disturb(training, fault, draw, undisturbed.digest())


def _flip(training: DisturbedTraining, flip: Flip, expected: str) -> Outcome:
    """Flip a bit of a rank's memory during training: the ranks should detect it, name the rank, and restart."""
    training.start(flip)
    with suppress(UserError) if flip.part == GRADIENT else nullcontext():  # a wrong gradient may make training diverge
        training.finish()
    if not (said := training.said("flipped: ")):
        raise UserError(
            f"no bit was flipped in {training.directory.path}: its first start failed; see {training.log_path}"
        )
    same, left, seconds = training.digest() == expected, training.left(), time.monotonic() - training.began
    found = training.said("error: rank ", "error: ranks ")  # not the agent's "error: the first rank to fail ..."
    if flip.part == GRADIENT:  # all ranks get the same wrong sum
        verdict, well = "same bits" if same else "other bits, detected only by dist-mnist replay", True
    elif found:
        right = found[0].startswith(f"error: rank {flip.rank} on " if training.nproc > 2 else "error: ranks ")
        late = any(step > flip.step for step in training.resumed_after())
        verdict = f"named{'' if right else ' THE WRONG RANK'}{', BUT SAVED FIRST' if late else ''}, {_bits(same)}"
        well = right and same and not late
    else:
        verdict, well = f"not detected, {_bits(same)}", same
    where = f"{flip.part} of rank {flip.rank}, {'before' if flip.before else 'after'}"
    return Outcome(
        Fault.FLIP, seconds, flip.step, where, training.starts, seconds, same, verdict, well and not left, left, said[0]
    )


def _bits(same: bool) -> str:
    return "same bits" if same else "DIFFERENT bits"


def _wait(training: DisturbedTraining, until: Callable[[], bool]) -> None:
    """Wait until a condition holds or the run ends."""
    while not until() and training.process.poll() is None:
        time.sleep(0.0005)


def _wait_until(training: DisturbedTraining, moment: float) -> None:
    _wait(training, lambda: time.monotonic() >= moment)


def _wait_for(training: DisturbedTraining, phase: str | None, step: int) -> None:
    """Wait until rank 0 has reached `step` and is in `phase`, if given; phases outside the steps ignore the step."""

    def there() -> bool:
        at, now = read_progress(training.directory.progress_path) or (-1, "")
        return phase in (None, now) and (at >= step or phase in ONCE)

    _wait(training, there)


def _disturb(training: DisturbedTraining, fault: Fault, draw: random.Random, expected: str) -> Outcome:
    if fault in NEED_A_CHECKPOINT:
        _wait(training, lambda: bool(training.directory.checkpoints.paths()))
    step, phase = read_progress(training.directory.progress_path) or (None, "before or after the steps")
    moment_s = time.monotonic() - training.began
    with suppress(ProcessLookupError):  # the run may have ended a moment ago
        FAULTS[fault](training, draw)
    training.finish()
    same, left, seconds = training.digest() == expected, training.left(), time.monotonic() - training.began
    starts, well = training.starts, same and not left
    return Outcome(fault, moment_s, step, phase, starts, seconds, same, _bits(same), well, left, training.last_words())


def _kill(training: DisturbedTraining, draw: random.Random) -> None:
    """Kill one rank, or torchrun, or all of them at once."""
    victims = [*training.ranks(), training.process.pid]
    victim = draw.choice([*victims, None])
    if victim is None:
        training.end_all()
    else:
        os.kill(victim, signal.SIGKILL)


def _term(training: DisturbedTraining, draw: random.Random) -> None:
    """Send a stop request to torchrun or to a rank."""
    os.kill(draw.choice([*training.ranks(), training.process.pid]), draw.choice(SIGNALS))


def _stop(training: DisturbedTraining, draw: random.Random) -> None:
    """Suspend one rank for good, so that it stalls."""
    if ranks := training.ranks():
        os.kill(draw.choice(ranks), signal.SIGSTOP)


def _truncate(training: DisturbedTraining, draw: random.Random) -> None:
    """Kill all processes and truncate the newest checkpoint."""
    training.end_all()
    for path in training.directory.checkpoints.paths()[-1:]:
        os.truncate(path, draw.randrange(path.stat().st_size))


def _rot(training: DisturbedTraining, draw: random.Random) -> None:
    """Kill all processes and flip one bit of the newest checkpoint."""
    training.end_all()
    rot(training, draw)


def rot(training: DisturbedTraining, draw: random.Random) -> None:
    """Flip one bit of the newest checkpoint, if there is one."""
    for path in training.directory.checkpoints.paths()[-1:]:
        content = bytearray(path.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)


def _no_room(training: DisturbedTraining, _: random.Random) -> None:
    """Make all further writes of checkpoints by rank 0 fail, as on a full disk."""
    for pid in training.ranks()[:1]:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (SMALL_FILE, SMALL_FILE))


# Faults in a run's processes and files. FLIP, in a rank's memory, needs special ranks: see `flipped`.
FAULTS: dict[Fault, Callable[[DisturbedTraining, random.Random], None]] = {
    Fault.KILL: _kill, Fault.TERM: _term, Fault.STOP: _stop, Fault.TRUNCATE: _truncate, Fault.ROT: _rot,
    Fault.NO_ROOM: _no_room,
}  # fmt: skip
ONCE = ("start", "rendezvous", "set-up", "evaluation", "exit")  # phases outside the steps
NEED_A_CHECKPOINT = (Fault.TRUNCATE, Fault.ROT)
