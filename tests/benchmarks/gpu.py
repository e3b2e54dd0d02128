"""Speed of one GPU, in a few minutes: training and evaluation compared with their limits, and the recipe `sprint`.

    python tests/benchmarks/gpu.py --data-dir DIR [--json FILE] [--recipes default,sprint] [--record sprint]
        [--seeds 10] [--rounds 3] [--device cuda] [--quick]

- training, images/s at batch 1024 of each recipe's network with its own precision, crops and augmentation, images in
  GPU memory; compared with a bare loop: the same network and precision in plain PyTorch on one batch, as a CUDA graph;
- evaluation, images/s of the test set; compared with bare inference on one batch;
- `--record`: that recipe in whole processes, one per seed: seconds of training, with evaluation, from the start of
  Python to the test accuracy, and to the exit; mean accuracy.

`--device cpu --quick` runs everything with tiny sizes, as a smoke test.
"""

import argparse
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from dist_mnist.distributed.device import device_name, use_device
from dist_mnist.distributed.world import World
from dist_mnist.reporting.statistics import student
from dist_mnist.run.plan import prepare
from dist_mnist.tools.bench import Bench, Figure
from dist_mnist.tools.measure import quantity, whole_run
from dist_mnist.utils.files import to_json
from dist_mnist.utils.versions import versions

BATCH, QUICK_BATCH = 1024, 50


@dataclass(frozen=True)
class Record:
    """A recipe in whole processes: medians of their seconds, and the accuracy of each seed."""

    recipe: str
    training_s: float
    training_with_evaluation_s: float
    tested_s: float  # from the start of Python
    whole_s: float
    accuracies: list[float]
    mean_accuracy: float
    interval: tuple[float, float] | None  # 95 % CI of the mean

    def __str__(self) -> str:
        low, high = self.interval or (math.nan, math.nan)
        return (
            f"{self.recipe}, {len(self.accuracies)} seeds: training {self.training_s:.2f} s, with evaluation "
            f"{self.training_with_evaluation_s:.2f} s, start of Python to test accuracy {self.tested_s:.2f} s, to exit "
            f"{self.whole_s:.2f} s (medians); mean accuracy {self.mean_accuracy:.3%} (95 % CI {low:.3%} to "
            f"{high:.3%}), lowest {min(self.accuracies):.2%}"
        )


def rates(recipe: str, data_dir: Path, device: str, rounds: int, batch: int) -> list[Figure]:
    """Measure training and evaluation of a recipe's network, compared with their limits."""
    given = {"recipe": recipe, "data_dir": data_dir, "device": device, "tensorboard": False}
    plan = prepare(given, 1)
    bench = Bench(given, plan, use_device(World.from_environment().alone(), device), rounds, tell)
    bench.batch_sizes = [batch]
    bench.loop()
    bench.evaluation()
    return bench.figures


def record(recipe: str, data_dir: Path, device: str, seeds: int) -> Record:
    """Train a recipe in full, each seed in a separate process."""
    runs = []
    for seed in range(seeds):
        tell(f"{recipe}, seed {seed}")
        runs.append(whole_run(f"--recipe={recipe}", f"--data-dir={data_dir}", f"--device={device}", f"--seed={seed}"))
    seconds = [result.seconds for _, result in runs if result.seconds]
    accuracies = [result.accuracy for _, result in runs]
    mean, interval = statistics.mean(accuracies), None
    if seeds > 1:
        half = student(seeds - 1) * statistics.stdev(accuracies) / math.sqrt(seeds)
        interval = mean - half, mean + half
    return Record(
        recipe=recipe,
        training_s=statistics.median(one.training for one in seconds),
        training_with_evaluation_s=statistics.median(one.training_with_evaluation for one in seconds),
        tested_s=statistics.median(watched.line_s for watched, _ in runs),
        whole_s=statistics.median(watched.whole_s for watched, _ in runs),
        accuracies=accuracies,
        mean_accuracy=mean,
        interval=interval,
    )


def tell(what: str) -> None:
    print("measuring", what, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--recipes", default="default,sprint", metavar="NAME,NAME")
    parser.add_argument("--record", default="sprint", metavar="NAME")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round, two seeds")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: torch finds no GPU here; --device cpu --quick shows that this works")
    rounds, seeds, batch = (1, 2, QUICK_BATCH) if given.quick else (given.rounds, given.seeds, BATCH)
    data_dir = given.data_dir.resolve()
    names = given.recipes.split(",")
    figures = {name: rates(name, data_dir, given.device, rounds, batch) for name in names}
    of_record = record(given.record, data_dir, given.device, seeds)
    machine = {"device": device_name(torch.device(given.device)), **versions()}
    print(", ".join(f"{what}: {value}" for what, value in machine.items()))
    for name, rows in figures.items():
        for row in rows:
            ratio = f"{row.ratio:.2f} ({row.lowest:.2f} to {row.highest:.2f}) of {row.limit}"
            print(f"{name}, {row.what}: {quantity(row.value)} {row.unit}, {ratio}: {quantity(row.limit_value)}")
    print(of_record)
    if given.json:
        found = {**machine, "rounds": rounds, "figures": figures, "record": of_record}
        given.json.write_text(to_json(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
