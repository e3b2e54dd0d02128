"""Recipes compared with a conventional trainer, as whole processes: time, accuracy, and speed ratio.

    python tests/benchmarks/peers.py --data-dir DIR [--rounds 3] [--epochs 4] [--json FILE]
        [--peers conventional,sprint,fast,default] [--breakdown]

`conventional` is `conventional_trainer.py` with `--epochs`; every other name is a recipe of `python -m
dist_mnist.train`, without TensorBoard. Peers alternate; the seed of a round is its number. Ratios are to the first peer
within each round, of the time from the start of Python to the line with the test accuracy. Also reported: the time to
the exit, and from a run's result.json, training alone and with evaluation.

`--breakdown` adds where each recipe spends its time: imports, set-up, training, evaluation, exit. In alternation with
another run in each round it measures their limits: `import torch`, the exit after it, and the time of plain PyTorch for
as many images, trained in a bare loop or evaluated, on the same batch every step.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from dist_mnist.distributed.cores import num_cores
from dist_mnist.distributed.device import device_name, use_device
from dist_mnist.distributed.world import World
from dist_mnist.run.plan import prepare
from dist_mnist.run.records import RunSeconds
from dist_mnist.tools.bench import Bench
from dist_mnist.tools.measure import Measured, Watched, Way, by_turns, watch, whole_run
from dist_mnist.utils.files import to_json
from dist_mnist.utils.versions import versions

CONVENTIONAL = "conventional"
TRAINER = Path(__file__).with_name("conventional_trainer.py")
IMPORTED = "; print('imported', flush=True)"
IMPORTS = {
    "dist_mnist": "import gc; gc.disable(); import dist_mnist.train; gc.enable()" + IMPORTED,  # as a run does it
    "torch": "import torch" + IMPORTED,
}


@dataclass(frozen=True)
class Outcome:
    """The result of one process."""

    seed: int
    accuracy: float
    tested_s: float
    whole_s: float
    told: RunSeconds | None = None  # of a recipe, from its result.json


@dataclass(frozen=True)
class Spread:
    """Median and range over the rounds."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.lowest:.2f} to {self.highest:.2f})"


@dataclass(frozen=True)
class Part:
    """The seconds of a part of a run, and its limit, if it has one."""

    name: str
    seconds: Spread
    limit: str = ""
    limit_seconds: Spread | None = None


@dataclass(frozen=True)
class Peer:
    """The results of all processes of a peer."""

    name: str
    mean_accuracy: float
    tested_s: Spread
    whole_s: Spread
    times_as_fast: Spread
    as_fast_as: str  # the reference peer
    training_s: Spread | None
    training_with_evaluation_s: Spread | None
    rounds: list[Outcome]
    breakdown: tuple[Part, ...] = ()


def conventional(data_dir: Path, epochs: int, seed: int) -> Outcome:
    options = (f"--data-dir={data_dir}", f"--epochs={epochs}", f"--seed={seed}")
    seen = watch([sys.executable, str(TRAINER), *options], "test loss ")
    return Outcome(seed, float(seen.line.split()[-1].rstrip("%")) / 100, seen.line_s, seen.whole_s)


def recipe(name: str, data_dir: Path, seed: int) -> Outcome:
    seen, result = whole_run(f"--recipe={name}", f"--data-dir={data_dir}", f"--seed={seed}")
    return Outcome(seed, result.accuracy, seen.line_s, seen.whole_s, result.seconds)


def compare(ways: Mapping[str, Callable[[int], Outcome]], rounds: int) -> list[Peer]:
    """Run each way once per round, with the number of the round as seed."""
    found: dict[str, list[Outcome]] = {name: [] for name in ways}

    def times_a_second(name: str) -> float:
        found[name].append(outcome := ways[name](len(found[name])))
        text = f"round {outcome.seed}, {name}: {outcome.tested_s:.2f} s to {outcome.accuracy:.2%}"
        print(text, file=sys.stderr, flush=True)
        return 1 / outcome.tested_s

    measured = by_turns({name: partial(times_a_second, name) for name in ways}, rounds, next(iter(ways)))
    return [_peer(row, found[row.name]) for row in measured]


def _peer(measured: Measured, outcomes: list[Outcome]) -> Peer:
    told = [one.told for one in outcomes if one.told]
    return Peer(
        name=measured.name,
        mean_accuracy=statistics.mean(one.accuracy for one in outcomes),
        tested_s=Spread.of([one.tested_s for one in outcomes]),
        whole_s=Spread.of([one.whole_s for one in outcomes]),
        times_as_fast=Spread(measured.ratio, measured.lowest, measured.highest),
        as_fast_as=measured.reference,
        training_s=Spread.of([seconds.training for seconds in told]) if told else None,
        training_with_evaluation_s=Spread.of([s.training_with_evaluation for s in told]) if told else None,
        rounds=outcomes,
    )


def break_down(name: str, data_dir: Path, rounds: int) -> tuple[Part, ...]:
    """Measure the parts of a recipe's time and their limits; imports in separate processes, bare loops in this one."""
    given = {"recipe": name, "data_dir": data_dir, "tensorboard": False}
    plan = prepare(given, 1)
    batch_size = plan.config.batch_size
    bench = Bench(given, plan, use_device(World.from_environment().alone(), plan.config.device), 1, print)
    runs: list[Outcome] = []
    imports: dict[str, list[Watched]] = {module: [] for module in IMPORTS}
    bare: dict[str, list[float]] = {"loop": [], "inference": []}

    def run() -> float:
        runs.append(recipe(name, data_dir, len(runs)))
        return runs[-1].whole_s

    def importing(module: str) -> float:
        imports[module].append(watch([sys.executable, "-c", IMPORTS[module]], "imported"))
        return imports[module][-1].line_s

    def computing(what: str, images: int, images_per_s: Way) -> float:
        bare[what].append(images / images_per_s())
        return bare[what][-1]

    ways: dict[str, Way] = {
        "run": run,
        **{module: partial(importing, module) for module in IMPORTS},
        "loop": partial(computing, "loop", plan.total_steps * batch_size, partial(bench.bare_rate, batch_size)),
        "inference": partial(computing, "inference", len(plan.data.test), bench.inference_rate),
    }
    by_turns(ways, rounds, "run")
    ours, torch_alone = imports["dist_mnist"], imports["torch"]
    told = [one.told for one in runs if one.told]
    before = [seconds.since_start - seconds.training_with_evaluation for seconds in told]
    seconds_by_part = {
        "imports": [one.line_s for one in ours],
        "set-up": [one - imported.line_s for one, imported in zip(before, ours, strict=True)],
        "training": [seconds.training for seconds in told],
        "evaluation": [seconds.training_with_evaluation - seconds.training for seconds in told],
        "exit": [one.whole_s - seconds.since_start for one, seconds in zip(runs, told, strict=True)],
        "whole process": [one.whole_s for one in runs],
    }
    limits = {
        "imports": ("import torch", [one.line_s for one in torch_alone]),
        "training": ("a bare loop", bare["loop"]),
        "evaluation": ("bare inference", bare["inference"]),
        "exit": ("exit after import torch", [one.whole_s - one.line_s for one in torch_alone]),
    }
    parts = []
    for part, seconds in seconds_by_part.items():
        limit, of_limit = limits.get(part, ("", []))
        parts.append(Part(part, Spread.of(seconds), limit, Spread.of(of_limit) if of_limit else None))
    return tuple(parts)


def show(peers: Sequence[Peer], rounds: int) -> None:
    """Print the tables."""
    console = Console(width=150)
    first = peers[0].as_fast_as
    table = Table(title=f"{rounds} rounds, each with another seed; medians (range), seconds", title_justify="left")
    for column in (
        "", "mean accuracy", "start to tested", "start to exit", f"times as fast as {first}", "training alone",
        "with evaluation",
    ):  # fmt: skip
        table.add_column(column, justify="left" if not column else "right")
    for peer in peers:
        seconds = [peer.tested_s, peer.whole_s, peer.times_as_fast, peer.training_s, peer.training_with_evaluation_s]
        table.add_row(peer.name, f"{peer.mean_accuracy:.3%}", *("-" if one is None else str(one) for one in seconds))
    console.print(table)
    for peer in peers:
        if peer.breakdown:
            table = Table("", "seconds", "limit", "its seconds", title=f"where {peer.name} spends its time")
            for part in peer.breakdown:
                table.add_row(part.name, str(part.seconds), part.limit, str(part.limit_seconds or ""))
            console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4, help="of the conventional trainer")
    parser.add_argument("--peers", default="conventional,sprint,fast,default", metavar="NAME,NAME")
    parser.add_argument("--breakdown", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    data_dir = given.data_dir.resolve()
    ways = {
        name: partial(conventional, data_dir, given.epochs) if name == CONVENTIONAL else partial(recipe, name, data_dir)
        for name in given.peers.split(",")
    }
    peers = compare(ways, given.rounds)
    if given.breakdown:
        peers = [
            peer
            if peer.name == CONVENTIONAL
            else replace(peer, breakdown=break_down(peer.name, data_dir, given.rounds))
            for peer in peers
        ]
    show(peers, given.rounds)
    machine = {"cpu": device_name(torch.device("cpu")), "cores": num_cores(), **versions()}
    print(", ".join(f"{what}: {value}" for what, value in machine.items()))
    if given.json:
        facts = {"data_dir": str(data_dir), "rounds": given.rounds, "epochs_of_conventional": given.epochs}
        given.json.write_text(to_json({**machine, **facts, "peers": peers}, indent=2) + "\n")


if __name__ == "__main__":
    main()
