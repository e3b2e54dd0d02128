"""Times from a kill to training again, from a stop request to the end, and from a rank's stall to its report.

    python tests/sweeps/times.py [--rounds 10] [--nproc 2]

Each is measured on separate runs, on generated digits, and printed as minimum, median and maximum in seconds. The time
to report a stall includes the stall timeout (10 s in these runs).
"""

import argparse
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from dist_mnist.data.sources.synthetic import write_digits
from dist_mnist.elastic.progress import read_progress
from dist_mnist.tools.drill.training import NETWORK, DisturbedTraining

STEADY = 20  # the first step at which faults are injected
TIMEOUT_S = 120


def wait(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.001)


def step(run: DisturbedTraining) -> int:
    return (read_progress(run.directory.progress_path) or (-1, ""))[0]


def killed_to_training_again(run: DisturbedTraining) -> None:
    """Kill a rank and wait for a step beyond the last one."""
    reached = step(run)
    os.kill(run.ranks()[-1], signal.SIGKILL)
    wait(lambda: step(run) > reached)


def asked_to_stop_to_the_end(run: DisturbedTraining) -> None:
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.process.wait(timeout=TIMEOUT_S) == 0


def stopped_to_its_name(run: DisturbedTraining) -> None:
    rank = run.ranks()[-1]
    os.kill(rank, signal.SIGSTOP)
    wait(lambda: f"(process {rank})" in run.log_path.read_text(errors="replace"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--nproc", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        write_digits(Path(scratch) / "data", num_train=1_000, num_test=200)
        for measure in (killed_to_training_again, asked_to_stop_to_the_end, stopped_to_its_name):
            seconds = []
            for number in range(arguments.rounds):
                folder, data = Path(scratch) / f"{measure.__name__}-{number}", Path(scratch) / "data"
                run = DisturbedTraining(folder, data, arguments.nproc, (*NETWORK, "--steps=100000"))
                run.start()
                wait(lambda run=run: step(run) >= STEADY)
                began = time.monotonic()
                measure(run)
                seconds.append(time.monotonic() - began)
                run.end_all()
            name = measure.__name__.replace("_", " ")
            print(
                f"{name:26} {min(seconds):5.2f}  {statistics.median(seconds):5.2f}  {max(seconds):5.2f} s", flush=True
            )


if __name__ == "__main__":
    main()
