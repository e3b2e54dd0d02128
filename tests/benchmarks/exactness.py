"""The cost of exactness and recovery: training with and without them, in alternation.

    python tests/benchmarks/exactness.py --data-dir DIR [--rounds 5] [--steps 120] [--nproc 2]

- saving: a checkpoint every 10 steps, compared with none before the end; wall-clock time of all steps, pauses included;
- proving: the defaults, digests of all ranks and checkpoints at time intervals, compared with neither; the same time;
- invariant: deterministic tree reduction, whose bits do not depend on the number of processes, compared with DDP.

`dist-mnist bench --part saving` measures the stall of a single save; `against.py` compares with another checkout.
"""

import argparse
import statistics
from functools import partial
from pathlib import Path

from dist_mnist.run.records import MetricsRecord
from dist_mnist.tools.measure import by_turns, print_rows, train

LOG_EVERY = 20


def steps_per_s(lines: list[MetricsRecord]) -> float:
    """Return the steps per second from the first log line (the steps before it include warm-up) to the last."""
    return (lines[-1].step - lines[0].step) / (lines[-1].elapsed_s - lines[0].elapsed_s)


def images_per_s(lines: list[MetricsRecord]) -> float:
    """Return the images per second, without pauses and the first log line."""
    return statistics.harmonic_mean([line.images_per_s for line in lines[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--nproc", type=int, default=2)
    given = parser.parse_args()
    length = (f"--steps={given.steps}", f"--log-every={LOG_EVERY}", "--validation-fraction=0", "--device=cpu")
    run = partial(train, f"--data-dir={given.data_dir}", *length, nproc=given.nproc)
    saving = {
        "no checkpoint on the way": lambda: steps_per_s(run()),
        "a checkpoint every 10 steps": lambda: steps_per_s(run("--checkpoint-every=10")),
    }
    proving = {
        "no digests, no checkpoints by the clock": lambda: steps_per_s(
            run("--check-ranks-every=0", "--checkpoint-every-s=0")
        ),
        "as by default": lambda: steps_per_s(run()),
    }
    exact = {"DDP": lambda: images_per_s(run()), "--invariant": lambda: images_per_s(run("--invariant"))}
    print_rows("steps/s", by_turns(saving, given.rounds, "no checkpoint on the way"), given.rounds)
    print_rows("steps/s", by_turns(proving, given.rounds, "no digests, no checkpoints by the clock"), given.rounds)
    print_rows("images/s", by_turns(exact, given.rounds, "DDP"), given.rounds)


if __name__ == "__main__":
    main()
