"""The cost of a kill with default settings: seconds of work lost, and seconds until the run trains again.

    python tests/sweeps/kills.py --data-dir DIR [--kills 50] [--nproc 2] [--pause 8 32] [--seed 0] [options of training]

Random ranks of one `dist-mnist train` are killed, each a random number of seconds (`--pause`) after the run trains
again. The work lost is the time between the step that the run resumes from and the kill. The run trains again once it
has finished a step. Both are printed for each kill, then as minimum, median and maximum.
"""

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from dist_mnist.elastic.agent import children
from dist_mnist.elastic.progress import read_progress
from dist_mnist.run.directory import RunDirectory

BEFORE_TRAINING = ("", "start", "rendezvous", "set-up")  # phases of an attempt
TIMEOUT_S = 300
POLL_S = 0.004


class WatchedRun:
    """A run, and the time (time.monotonic) at which each step was finished."""

    def __init__(self, run_dir: Path, command: list[str], log: int):
        self.progress_path = RunDirectory(run_dir).progress_path
        self.process = subprocess.Popen(command, stdout=log, stderr=log)
        self.made_at: dict[int, float] = {}

    def wait(self, condition: Callable[[int, str], bool]) -> int:
        """Wait until the finished steps and the phase meet a condition; return the number of steps."""
        until = time.monotonic() + TIMEOUT_S
        while True:
            step, phase = read_progress(self.progress_path) or (-1, "")
            self.made_at.setdefault(step, time.monotonic())
            if condition(step, phase):
                return step
            assert self.process.poll() is None, "the run has ended"
            assert time.monotonic() < until, f"it stays at step {step}, phase {phase!r}"
            time.sleep(POLL_S)

    def kill(self, victim: int) -> tuple[float, float]:
        """Kill a rank; return the seconds of work lost, and the seconds until a new step is finished."""
        ranks = sorted(rank.pid for rank in children(self.process.pid))
        killed_at = time.monotonic()
        os.kill(ranks[victim], signal.SIGKILL)
        self.wait(lambda step, phase: phase in BEFORE_TRAINING)
        resumed = self.wait(lambda step, phase: phase not in BEFORE_TRAINING and step >= 0)
        lost_s = killed_at - self.made_at.get(resumed, killed_at)
        self.made_at = {step: at for step, at in self.made_at.items() if step <= resumed}
        self.wait(lambda step, phase: step > resumed)
        return lost_s, time.monotonic() - killed_at


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--pause", type=float, nargs=2, default=(8.0, 32.0))
    parser.add_argument("--seed", type=int, default=0)
    arguments, options = parser.parse_known_args()
    draws = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as scratch, open(Path(scratch) / "log", "wb") as log:
        run_dir = Path(scratch) / "run"
        words = ["train", f"--nproc={arguments.nproc}", f"--data-dir={arguments.data_dir}", f"--run-dir={run_dir}"]
        forever = ["--epochs=100000", f"--max-restarts={arguments.kills}"]
        run = WatchedRun(run_dir, [sys.executable, "-m", "dist_mnist", *words, *forever, *options], log.fileno())
        try:
            costs = []
            for number in range(arguments.kills):
                run.wait(lambda step, phase: step > 0)
                until = time.monotonic() + draws.uniform(*arguments.pause)
                run.wait(lambda step, phase, until=until: time.monotonic() > until)
                lost_s, again_s = run.kill(draws.randrange(arguments.nproc))
                costs.append((lost_s, again_s))
                print(f"kill {number + 1:3}: {lost_s:6.2f} s lost, trains again after {again_s:5.2f} s", flush=True)
        finally:
            run.process.terminate()
            run.process.wait()
    for name, seconds in zip(("lost", "to train again"), zip(*costs, strict=True), strict=True):
        print(f"{name:14}  {min(seconds):5.2f}  {statistics.median(seconds):5.2f}  {max(seconds):5.2f} s")


if __name__ == "__main__":
    main()
