"""Speed of this checkout compared with another commit or checkout. The short form is `tests/run.sh bench`.

    python tests/benchmarks/against.py [COMMIT | --baseline CHECKOUT] [--data-dir DIR] [--rounds 5] [--steps 60]

Measured in alternation, as ratios within each round (above 1: this checkout is faster): the training loop (recipes
`default`, `sprint` and `best` with batches of 250, in one process and in two, and the notebook's network), the time
from the start of Python to the first step, and the loader alone with batches of 100 and 250. A recipe that only one of
the two has is skipped. Each measurement is a separate process, which imports the package from one of the two folders.

COMMIT is checked out into a temporary folder. Default: the last commit if tracked files differ from it, else where this
branch left origin/main, else the commit before. Data: --data-dir, else $DIST_MNIST_TEST_DATA, else generated digits.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from dist_mnist.data.sources.synthetic import write_digits
from dist_mnist.tools.measure import TIMEOUT_S, Way, by_turns, first_step_s, print_rows, train

THIS = Path(__file__).resolve().parents[2]
BATCH = "--batch-size=250"
NAMED = ("default", "sprint", "best")  # recipes to train, if both checkouts have them
GENERATED = {"num_train": 6000, "num_test": 1000}

# Only public names, which stay valid when modules move.
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


def git(*words: object) -> str:
    """Return the output of git in this checkout; exit with git's message if it fails."""
    done = subprocess.run(["git", "-C", str(THIS), *map(str, words)], capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode:
        sys.exit(f"error: git {' '.join(map(str, words))}: {done.stderr.strip()}")
    return done.stdout.strip()


def before() -> str:
    """Return the default baseline commit."""
    head = git("rev-parse", "HEAD")
    if git("status", "--porcelain", "--untracked-files=no"):
        return head
    if git("for-each-ref", "refs/remotes/origin/main"):
        base = git("merge-base", "HEAD", "origin/main")
        if base != head:
            return base
    return git("rev-parse", "HEAD~1")


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """Context manager: a commit's files in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder) / "baseline"
        try:
            with uninterrupted():
                git("worktree", "add", "--detach", checkout, commit)
            yield checkout
        finally:
            with uninterrupted():
                if checkout.exists():
                    git("worktree", "remove", "--force", checkout)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Context manager: delay Ctrl-C and SIGTERM, also in child processes; an interrupted git checkout would leave
    another process that continues it."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def python(checkout: Path, *words: object) -> str:
    """Return the output of `python WORDS` with the package of a checkout."""
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    with tempfile.TemporaryDirectory() as folder:  # Python searches the working directory first
        command = [sys.executable, *map(str, words)]
        return subprocess.check_output(command, text=True, timeout=TIMEOUT_S, env=environment, cwd=folder)


def recipes(checkout: Path) -> set[str]:
    """Return the names of a checkout's recipes."""
    return {recipe["recipe"] for recipe in json.loads(python(checkout, "-m", "dist_mnist", "recipes", "--json"))}


def loop_rate(options: tuple[str, ...], nproc: int, checkout: Path) -> float:
    """Return a run's training speed in images per second, without its first log line, which includes warm-up."""
    return statistics.harmonic_mean([line.images_per_s for line in train(*options, nproc=nproc, checkout=checkout)[1:]])


def loader_rate(data_dir: Path, batch_size: int, checkout: Path) -> float:
    """Return the images per second of the loader."""
    return float(python(checkout, "-c", LOADER, data_dir, batch_size))


def starts_per_minute(options: tuple[str, ...], checkout: Path) -> float:
    """Return how many times the start of Python up to the first step fits into a minute."""
    return 60 / first_step_s(*options, checkout=checkout)


def compare(baseline: Path, data_dir: Path, rounds: int, steps: int) -> None:
    """Run all measurements and print them."""
    common = (f"--data-dir={data_dir}", "--device=cpu", "--validation-fraction=0")
    length = (f"--steps={steps}", f"--log-every={max(1, steps // 3)}")
    known = recipes(THIS) & recipes(baseline)
    at_250 = {f"{name}, batch 250": (f"--recipe={name}", BATCH) for name in NAMED if name in known}
    loops = [(name, network, 1) for name, network in {**at_250, "notebook": ("--recipe=notebook",)}.items()]
    loops += [(f"{name}, two processes", network, 2) for name, network in at_250.items()]
    measures: dict[str, Callable[[Path], float]] = {
        f"training, {name}, images/s": partial(loop_rate, (*common, *length, *network), nproc)
        for name, network, nproc in loops
    }
    measures["start of Python to first step, times a minute"] = partial(starts_per_minute, common)
    measures |= {f"loader, batch {size}, images/s": partial(loader_rate, data_dir, size) for size in (100, 250)}
    for what, measure in measures.items():
        ways: dict[str, Way] = {"baseline": partial(measure, baseline), "this checkout": partial(measure, THIS)}
        print_rows(what, by_turns(ways, rounds, "baseline"), rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", nargs="?", metavar="COMMIT")
    parser.add_argument("--baseline", type=Path, metavar="CHECKOUT")
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("DIST_MNIST_TEST_DATA"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60, help="2 or more")
    given = parser.parse_args()
    if given.commit and given.baseline:
        parser.error("give a COMMIT or a CHECKOUT, not both")
    with tempfile.TemporaryDirectory() as generated:
        data_dir = given.data_dir.resolve() if given.data_dir else Path(generated)
        if not given.data_dir:
            write_digits(data_dir, **GENERATED)
        if given.baseline:
            compare(given.baseline.resolve(), data_dir, given.rounds, given.steps)
            return
        commit = given.commit or before()
        print(f"baseline: {git('log', '-1', '--format=%h %s', commit)}\n", flush=True)
        with checked_out(commit) as checkout:
            compare(checkout, data_dir, given.rounds, given.steps)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the checkout is removed
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
