"""Comparison of runs: accuracies with confidence intervals, settings that differ, and which of two runs is better.

Confidence intervals are 95 %. For the accuracy of one run: Wilson's, as images are a random sample (Wilson: "Probable
inference, the law of succession, and statistical inference", 1927). For the mean of several runs on the same images:
Student's, as seeds are. For the mean difference of two runs on the same images: the normal one.
"""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct, field

from dist_mnist.evaluation.metrics import brier_scores, log_losses
from dist_mnist.reporting.statistics import mcnemar, paired, student, wilson
from dist_mnist.run.records import EvaluationResult, RunSummary
from dist_mnist.utils.errors import UserError
from dist_mnist.utils.files import path_text

if TYPE_CHECKING:
    import torch

    from dist_mnist.data.dataset import IdxDataset

Interval = tuple[float, float]
# Fields copied from a run's result to its row.
OF_RESULT = (
    "loss", "balanced_accuracy", "macro_f1", "top_k", "top_k_accuracy", "auc", "brier", "ece", "temperature",
    "calibrated_loss", "parameters",
)  # fmt: skip


class ComparisonRow(Struct, frozen=True, kw_only=True):
    """A run in a table; metrics are None if it is not finished or they are unknown."""

    run: str
    settings: Mapping[str, object]  # settings that differ between the runs
    accuracy: float | None
    confidence_interval: Interval | None = field(name="interval")
    loss: float | None
    balanced_accuracy: float | None
    macro_f1: float | None
    top_k: int | None
    top_k_accuracy: float | None
    auc: float | None
    brier: float | None
    ece: float | None
    temperature: float | None
    calibrated_loss: float | None
    parameters: int | None
    images_per_s: float | None
    training_s: float | None


class MeanRow(Struct, frozen=True, kw_only=True):
    """Runs that differ only in their seed; a single run has neither standard deviation nor confidence interval."""

    settings: Mapping[str, object]  # settings that differ between the rows
    recipe: str
    runs: int
    accuracy: float
    standard_deviation: float | None = field(name="deviation")
    confidence_interval: Interval | None = field(name="interval")
    lowest: float
    highest: float
    training_s: float


class PairedDifference(Struct, frozen=True, kw_only=True):
    """The first model's mean over the test images minus the second's, with its 95 % confidence interval."""

    mean: float
    low: float
    high: float


class PairedComparison(Struct, frozen=True, kw_only=True):
    """Numbers of test images that two models get right, McNemar's exact p-value, and differences of their means."""

    both: int
    only_first: int
    only_second: int
    neither: int
    p_value: float
    loss_difference: PairedDifference | None  # nats; None if not finite
    brier_difference: PairedDifference | None


class NoComparison(Struct, frozen=True, kw_only=True):
    """Why two models cannot be compared on the same images, as a clause."""

    impossible: str


def differing(runs: Sequence[RunSummary], but: str = "") -> list[str]:
    """Return the names of the essential settings, except `but`, that differ between the runs."""
    names = [name for run in runs[:1] for name in run.essential if name != but]
    return [name for name in names if len({json.dumps(run.essential[name]) for run in runs}) > 1]


def compare(runs: Sequence[RunSummary]) -> list[ComparisonRow]:
    """Return a table row for each run."""
    shown = differing(runs)
    return [
        ComparisonRow(
            run=path_text(run.path),
            settings={name: run.essential[name] for name in shown},
            accuracy=run.result.accuracy if run.result else None,
            confidence_interval=wilson(run.result.correct, run.result.images) if run.result else None,
            **{name: getattr(run.result, name, None) for name in OF_RESULT},
            images_per_s=run.median("images_per_s"),
            training_s=run.training_s,
        )
        for run in runs
    ]


def means(runs: Sequence[RunSummary]) -> list[MeanRow]:
    """Return a row for each group of runs that differ only in their seed.

    Unfinished runs are left out; a folder that is given several times counts once.
    """
    finished = {run.path.resolve(): (run, run.result) for run in runs if run.result}.values()
    shown = differing([run for run, _ in finished], but="seed")
    groups: dict[str, list[tuple[RunSummary, EvaluationResult]]] = {}
    for run, result in finished:
        groups.setdefault(json.dumps([run.essential[name] for name in shown]), []).append((run, result))
    return [_mean_row(members, shown) for members in groups.values()]


def _mean_row(members: Sequence[tuple[RunSummary, EvaluationResult]], shown: Sequence[str]) -> MeanRow:
    first, accuracies = members[0][0], [result.accuracy for _, result in members]
    mean, deviation, interval = statistics.mean(accuracies), None, None
    if len(accuracies) > 1:
        deviation = statistics.stdev(accuracies)
        half = student(len(accuracies) - 1) * deviation / math.sqrt(len(accuracies))
        interval = max(0.0, mean - half), min(1.0, mean + half)
    return MeanRow(
        settings={name: first.essential[name] for name in shown},
        recipe=str(first.settings["recipe"]),
        runs=len(members),
        accuracy=mean,
        standard_deviation=deviation,
        confidence_interval=interval,
        lowest=min(accuracies),
        highest=max(accuracies),
        training_s=statistics.mean(run.training_s or 0.0 for run, _ in members),
    )


PredictTest = Callable[[Path], "tuple[torch.Tensor, IdxDataset]"]


def predict_own_test(path: Path, code: Sequence[str] = ()) -> "tuple[torch.Tensor, IdxDataset]":
    """Return a run's probabilities for its test images, and the images; `code` as for `load_models`."""
    from dist_mnist.distributed.device import use_device
    from dist_mnist.distributed.world import World
    from dist_mnist.evaluation.checkpoints.result import predict_test

    return predict_test(path, None, use_device(World.from_environment().alone(), "auto"), code)


def compare_pair(
    runs: Sequence[RunSummary], predict_test: PredictTest = predict_own_test
) -> PairedComparison | NoComparison | None:
    """Compare the best models of two finished runs on the same test images; None for any other `runs`.

    Args:
        predict_test: returns the test predictions of the run at a path; by default on each run's own data.
    """
    if len(runs) != 2 or not all(run.result for run in runs):
        return None
    try:
        return _compare_pair(runs[0], runs[1], predict_test)
    except UserError as error:  # the data differ, or a checkpoint or the data cannot be read
        return NoComparison(impossible=str(error))


def _compare_pair(first: RunSummary, second: RunSummary, predict_test: PredictTest) -> PairedComparison:
    if first.config.data.fingerprint != second.config.data.fingerprint:
        raise UserError(f"{first.path} and {second.path} were trained on different data, so their test images differ")
    predicted = [predict_test(run.path) for run in (first, second)]
    rows, others = [test.rows_of(np.arange(len(test))).rows for _, test in predicted]
    if not np.array_equal(rows, others):
        raise UserError(f"{first.path} and {second.path} held out different test images")
    labels = [test.sample_labels for _, test in predicted]
    one, other = [found.argmax(1).numpy() == label for (found, _), label in zip(predicted, labels, strict=True)]
    losses, briers = [
        [score(found.numpy().T, label) for (found, _), label in zip(predicted, labels, strict=True)]
        for score in (log_losses, brier_scores)
    ]
    only_first, only_second = int((one & ~other).sum()), int((other & ~one).sum())
    return PairedComparison(
        both=int((one & other).sum()),
        only_first=only_first,
        only_second=only_second,
        neither=int((~one & ~other).sum()),
        p_value=mcnemar(only_first, only_second),
        loss_difference=_difference(*losses),
        brier_difference=_difference(*briers),
    )


def _difference(first: np.ndarray, second: np.ndarray) -> PairedDifference | None:
    with np.errstate(invalid="ignore"):  # the loss is infinite if a label's probability is 0
        found = paired(first - second)
    return PairedDifference(mean=found[0], low=found[1], high=found[2]) if found else None
