"""Runs beside one another: results with intervals, what differs in their settings, and whether one of two is better.

Intervals hold what they should in 95 of 100 cases: Wilson's for the accuracy of one run, of which the images are drawn
(Wilson: "Probable inference, the law of succession, and statistical inference", 1927), Student's for the mean of
several runs on the same images, of which the seeds are.
"""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dist_mnist.reporting.statistics import mcnemar, student, wilson
from dist_mnist.run.records import Run
from dist_mnist.utils.errors import UserError


def differing(runs: list[Run], but: str = "") -> list[str]:
    """What is essential and not the same in all runs."""
    names = [name for run in runs[:1] for name in run.essential if name != but]
    return [name for name in names if len({json.dumps(run.essential[name]) for run in runs}) > 1]


def compare(runs: list[Run]) -> list[dict[str, Any]]:
    """A row for each run, as JSON values; accuracies are shares."""
    shown = differing(runs)
    return [
        {
            "run": str(run.path),
            "settings": {name: run.essential[name] for name in shown},
            "accuracy": run.result and run.result["accuracy"],
            "interval": run.result and wilson(run.result["correct"], run.result["images"]),
            "loss": run.result and run.result["loss"],
            "parameters": run.result and run.result.get("parameters"),
            "images_per_s": run.images_per_s,
            "training_s": run.training_s,
        }
        for run in runs
    ]


def means(runs: list[Run]) -> list[dict[str, Any]]:
    """A row for all runs together that differ in their seed alone; JSON values.

    Unfinished ones are left out, and of several of the same folder all but one.
    """
    runs = list({run.path.resolve(): run for run in runs if run.result}.values())
    shown = differing(runs, but="seed")
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps({name: run.essential[name] for name in shown}), []).append(run)
    rows = []
    for settings, members in groups.items():
        accuracies = [run.result["accuracy"] for run in members if run.result]
        mean, several = statistics.mean(accuracies), len(accuracies) > 1
        deviation = statistics.stdev(accuracies) if several else None
        half = student(len(accuracies) - 1) * deviation / math.sqrt(len(accuracies)) if deviation is not None else None
        rows.append(
            {
                "settings": json.loads(settings), "recipe": members[0].settings["recipe"], "runs": len(members),
                "accuracy": mean, "deviation": deviation,
                "interval": None if half is None else [max(0.0, mean - half), min(1.0, mean + half)],
                "lowest": min(accuracies), "highest": max(accuracies),
                "training_s": statistics.mean(run.training_s or 0.0 for run in members),
            }
        )  # fmt: skip
    return rows


def _predict_test(path: Path) -> Any:
    from dist_mnist.distributed.device import use_device
    from dist_mnist.distributed.world import World
    from dist_mnist.evaluation.checkpoints import predict_test

    return predict_test(path, None, use_device(World.from_environment().alone(), "auto"))


def contest(runs: Sequence[Run], predict_test: Callable[[Path], Any] = _predict_test) -> dict[str, Any] | None:
    """The best networks of two finished runs on the same test images, and McNemar's test; None for other runs.

    JSON values; `impossible` alone, a sentence, if their data differ, or a checkpoint or the data cannot be read.

    Args:
        predict_test: `evaluate.predict_test` of a run's path; by default with each run's own data.
    """
    if len(runs) != 2 or not all(run.result for run in runs):
        return None
    try:
        return _contest(runs[0], runs[1], predict_test)
    except UserError as error:
        return {"impossible": str(error)}


def _contest(first: Run, second: Run, predict_test: Callable[[Path], Any]) -> dict[str, Any]:
    if first.fingerprint != second.fingerprint:
        raise UserError(
            f"{first.path} and {second.path} were made on different data: their test images are not the same"
        )
    seen = [predict_test(run.path) for run in (first, second)]
    one, other = [probabilities.argmax(1).numpy() == test.labels for probabilities, test in seen]
    only_first, only_second = int((one & ~other).sum()), int((other & ~one).sum())
    return {
        "both": int((one & other).sum()), "only_first": only_first, "only_second": only_second,
        "neither": int((~one & ~other).sum()), "p_value": mcnemar(only_first, only_second),
    }  # fmt: skip
