"""Train recipes in full with several seeds, and compare their mean test accuracy with a required figure.

    python tests/benchmarks/accuracy.py [--run-dir runs/accuracy] [NAME...]

Without names it trains all recipes, which takes hours on a CPU. The same command resumes and trains nothing twice.
Data sets are found or downloaded as by `dist-mnist train --dataset`.
The exit code is 1 if a mean is below its figure.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Entry:
    """A benchmark: training options, number of seeds, and the required mean test accuracy (None: not known yet)."""

    options: tuple[str, ...]
    seeds: int
    figure: float | None
    dataset: str = "mnist"
    together: float | None = None  # required accuracy of all seeds' networks as an ensemble
    beside: tuple[str, ...] = ()  # entries whose networks are also in the ensemble


FORMER = ("--recipe=best", "--dropout=0.4", "--no-pool-first", "--crop-fraction=0.7")  # before it took half the time
LONG = (*FORMER, "--epochs=40")
HALF = (*FORMER, "--epochs=20")
ENTRIES = {
    "default": Entry((), 5, 0.9930),
    "notebook": Entry(("--recipe=notebook",), 3, 0.9899),
    "fast": Entry(("--recipe=fast",), 5, 0.9900),
    "sprint": Entry(("--recipe=sprint",), 10, 0.9900),
    "accurate": Entry(("--recipe=accurate",), 5, 0.9970),
    "best": Entry(("--recipe=best",), 5, 0.9973),
    "long": Entry(LONG, 5, 0.9975),
    "deep": Entry((*LONG, "--conv-layers=4"), 5, 0.9970, together=0.9980, beside=("long",)),
    # Large batches: the learning rate grows with the square root of the batch size, and the EMA spans as many images as
    # with a batch of 250.
    "batch-1000": Entry((*HALF, "--batch-size=1000", "--lr=0.2", "--ema-decay=0.996"), 1, 0.9960),
    "batch-4000": Entry((*HALF, "--batch-size=4000", "--lr=0.4", "--ema-decay=0.984"), 1, 0.9940),
    "batch-8000": Entry((*HALF, "--batch-size=8000", "--lr=0.57", "--ema-decay=0.968"), 1, 0.9900),
    "fashion": Entry(("--recipe=fashion",), 3, 0.9500, dataset="fashion-mnist"),
    "kuzushiji": Entry(("--recipe=kuzushiji",), 3, None, dataset="kmnist"),
    "kuzushiji-49": Entry(("--recipe=kuzushiji",), 3, None, dataset="kuzushiji-49"),
    "letters": Entry(("--recipe=letters",), 3, None, dataset="emnist-letters"),
}


def output(*words: object) -> dict:
    """Return what `dist-mnist WORDS --json` prints."""
    command = [sys.executable, "-m", "dist_mnist", *map(str, words), "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def held(what: str, accuracy: float, figure: float | None) -> bool:
    """Print an accuracy and its required figure; return whether it reaches the figure, if there is one."""
    good = figure is None or accuracy >= figure
    requirement = "" if figure is None else f", {'and' if good else 'BUT'} {figure:.2%} is its figure"
    print(f"{what}: {accuracy:.2%}{requirement}", flush=True)
    return good


def train(entry: Entry, folder: Path) -> list[Path]:
    """Train the missing runs of an entry; return all run directories."""
    seeds = [f"seed={seed}" for seed in range(entry.seeds)]
    options = [*entry.options, f"--run-dir={folder}", f"--dataset={entry.dataset}"]
    subprocess.run([sys.executable, "-m", "dist_mnist", "sweep", *seeds, *options], check=True)
    return [folder / seed for seed in seeds]


def check(name: str, root: Path) -> bool:
    """Train an entry; return whether the results reach its figures."""
    entry = ENTRIES[name]
    runs = train(entry, root / name)
    row, *others = output("compare", "--mean", *runs)["means"]
    if others:
        sys.exit(f"the runs in {root / name} differ in more than their seeds (dist-mnist compare): remove the older")
    spread = f"{row['runs']} run" + "s" * (row["runs"] > 1)
    if row["interval"]:
        low, high = row["interval"]
        spread += f", standard deviation {row['deviation']:.3%}, 95 % CI {low:.2%} to {high:.2%}"
    good = held(f"{name}, {spread}, {row['training_s'] / 60:.1f} minutes each", row["accuracy"], entry.figure)
    if entry.together is not None:
        for other in entry.beside:
            runs += train(ENTRIES[other], root / other)
        ensemble = output("eval", *(f"--ckpt={run}" for run in runs))
        names = " and ".join([name, *entry.beside])
        good &= held(f"{names}, all {len(runs)} networks together", ensemble["accuracy"], entry.together)
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *ENTRIES], metavar="NAME", help=", ".join(ENTRIES))
    parser.add_argument("--run-dir", type=Path, default=Path("runs/accuracy"))
    arguments = parser.parse_args()
    names = arguments.names or list(ENTRIES)
    good = [check(name, arguments.run_dir) for name in names]
    sys.exit(0 if all(good) else 1)


if __name__ == "__main__":
    main()
