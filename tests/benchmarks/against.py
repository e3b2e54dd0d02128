"""This checkout against another one, such as that of an earlier commit: is it as fast?

    python tests/benchmarks/against.py --baseline CHECKOUT --data-dir DIR [--rounds 5] [--steps 60]

By turns, as ratios within each round (above 1: this one is faster): the training loop (recipe `default` with batches of
250, the notebook's network), the start of Python to the first step, and the loader alone with batches of 100 and 250.
Each measurement is a process of its own, which finds its package in one of the two folders.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from dist_mnist.tools.measure import TIMEOUT_S, Way, by_turns, first_step_s, print_rows, train

THIS = Path(__file__).resolve().parents[2]
LOG_EVERY = 20
NETWORKS = {"default, batch 250": ("--recipe=default", "--batch-size=250"), "notebook": ("--recipe=notebook",)}

# Public names alone, which stay where modules move.
LOADER = """
import sys, time
from dist_mnist import GlobalOrder, Loader, World, open_data, use_device
folder, batch_size = sys.argv[1], int(sys.argv[2])
world = use_device(World.from_environment(), "cpu")
train = open_data(folder).train
batches = iter(Loader(train, GlobalOrder(num_samples=len(train), global_batch_size=batch_size), range(1 << 40), world))
def run(seconds):
    began, images = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        images += len(next(batches).labels)
    return images / (time.perf_counter() - began)
run(0.2)
print(run(1.0))
"""


def loop_rate(options: tuple[str, ...], checkout: Path) -> float:
    """Images per second of a run's training, without its first log line, in which everything is slow."""
    return statistics.harmonic_mean([line.images_per_s for line in train(*options, checkout=checkout)[1:]])


def loader_rate(data_dir: Path, batch_size: int, checkout: Path) -> float:
    """Images per second of the loader."""
    command = [sys.executable, "-c", LOADER, str(data_dir), str(batch_size)]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    with tempfile.TemporaryDirectory() as folder:  # Python looks in the working directory first
        return float(subprocess.check_output(command, timeout=TIMEOUT_S, env=environment, cwd=folder))


def starts_per_minute(options: tuple[str, ...], checkout: Path) -> float:
    """How often a minute holds the time from the start of Python to a first step."""
    return 60 / first_step_s(*options, checkout=checkout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", type=Path, required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    given = parser.parse_args()
    data_dir, baseline = given.data_dir.resolve(), given.baseline.resolve()
    common = (f"--data-dir={data_dir}", "--device=cpu", "--validation-fraction=0")
    length = (f"--steps={given.steps}", f"--log-every={LOG_EVERY}")

    measures: dict[str, Callable[[Path], float]] = {
        f"training, {name}, images/s": partial(loop_rate, (*common, *length, *network))
        for name, network in NETWORKS.items()
    }
    measures["start of Python to first step, times a minute"] = partial(starts_per_minute, common)
    measures |= {f"loader, batch {size}, images/s": partial(loader_rate, data_dir, size) for size in (100, 250)}
    for what, measure in measures.items():
        ways: dict[str, Way] = {"baseline": partial(measure, baseline), "this checkout": partial(measure, THIS)}
        print_rows(what, by_turns(ways, given.rounds, "baseline"), given.rounds)


if __name__ == "__main__":
    main()
