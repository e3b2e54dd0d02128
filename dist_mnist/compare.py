"""Runs beside one another: results with intervals, what differs in their settings, and whether one of two is better.

Intervals hold what they should in 95 of 100 cases: Wilson's for the accuracy of one run, of which the images are drawn
(Wilson: "Probable inference, the law of succession, and statistical inference", 1927), Student's for the mean of
several runs on the same images, of which the seeds are.
"""

import itertools
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dist_mnist.checkpoint import DATA
from dist_mnist.config import FIELDS
from dist_mnist.errors import UserError
from dist_mnist.form import each, number, or_null, parse, share, string, whole

Z = statistics.NormalDist().inv_cdf(0.975)
# Student's t, of which 95 % lie within plus and minus so much, for 1 to 30 degrees of freedom (standard tables).
STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


# What compare and report need to find in a run's files.
CONFIG = {"settings": {"recipe": string, "optimizer": string}, "data": DATA, "versions": {}, "machine": or_null({})}
METRICS = (
    "epoch", "loss", "accuracy", "learning_rate", "images_per_s", "waiting_for_data", "communicating",
    "slowest_rank_ms_per_step", "fastest_rank_ms_per_step", "memory_gb", "device_memory_gb",
)  # fmt: skip
RECORD = {"kind": string, "step": whole(1), "elapsed_s": number} | dict.fromkeys(METRICS, or_null(number))
RESULT = {
    "split": string, "accuracy": share, "correct": whole(0), "images": whole(1), "loss": or_null(number),
    "step": whole(0), "parameters": or_null(whole(0)),
    "confusion_matrix": each(each(whole(0)), least=1), "per_class_accuracy": each(or_null(number), least=1),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What a run directory tells of its run; `result` is None as long as that is not finished."""

    path: Path
    config: dict[str, Any]  # what config.json holds: settings, data, versions, machine
    records: list[dict[str, Any]]  # the lines of metrics.jsonl
    result: dict[str, Any] | None

    @property
    def settings(self) -> dict[str, Any]:
        """The settings as resolved."""
        return self.config["settings"]

    @property
    def fingerprint(self) -> str:
        """Of the data."""
        return self.config["data"]["fingerprint"]

    @cached_property
    def essential(self) -> dict[str, Any]:
        """The settings that bear on its result, and its data; settings that it was made before are as by default."""
        settings = {name: self.settings.get(name, declared.default) for name, declared in FIELDS.items()}
        found = {name: value for name, value in settings.items() if not FIELDS[name].metadata["changeable"]}
        chosen_by = {"validate_every": settings["validate_every"]}  # when the best checkpoint can be made
        return found | chosen_by | {"data": f"{Path(self.config['data']['folder']).name} {self.fingerprint[:8]}"}

    @property
    def images_per_s(self) -> float | None:
        """The median of the log intervals."""
        return self.median("images_per_s")

    @property
    def training_s(self) -> float | None:
        """Seconds that the steps took, with pauses; of a run that was continued, the sum over its starts."""
        elapsed = [record["elapsed_s"] for record in self.records]
        ends = [one for one, following in itertools.pairwise([*elapsed, -1.0]) if following < one]
        return sum(ends) if ends else None

    def median(self, name: str) -> float | None:
        """Of a metric over the log intervals, where it was measured."""
        values = [record[name] for record in self.records if record["kind"] == "train" and record.get(name) is not None]
        return statistics.median(values) if values else None


def read_run(path: Path) -> Run:
    """Read a run directory.

    Raises:
        UserError: it is none, or one of its files is not what a run writes.
    """
    config, result = _read(path / "config.json", CONFIG), None
    if (path / "result.json").exists():
        result = _read(path / "result.json", RESULT)
        matrix = result["confusion_matrix"]
        right = sum(row[true] for true, row in enumerate(matrix) if true < len(row))
        square = {len(row) for row in matrix} == {len(matrix)}
        if not square or (sum(map(sum, matrix)), right) != (result["images"], result["correct"]):
            raise UserError(f"{path / 'result.json'} cannot be read: its confusion matrix is not that of its images")
    metrics = path / "metrics.jsonl"
    whole_lines = _bytes(metrics).splitlines(keepends=True) if metrics.exists() else []
    if whole_lines and not whole_lines[-1].endswith(b"\n"):
        whole_lines.pop()  # its writer was killed
    return Run(path, config, [_parse(metrics, line, RECORD) for line in whole_lines], result)


def _read(path: Path, form: dict[str, Any]) -> dict[str, Any]:
    return _parse(path, _bytes(path), form)


def _bytes(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} should be a file and is none")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path.parent}: this is not the folder of a run ({error.strerror}: {path})") from None


def _parse(path: Path, content: bytes, form: dict[str, Any]) -> dict[str, Any]:
    try:
        return parse(content, form)
    except ValueError as error:
        raise UserError(f"{path} cannot be read, as a run would not write it so: {error}") from None


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


def wilson(correct: int, images: int) -> list[float]:
    """The interval for a share, from `correct` of so many independent images."""
    share, part = correct / images, Z**2 / images
    middle = (share + part / 2) / (1 + part)
    half = Z / (1 + part) * math.sqrt(share * (1 - share) / images + part / (4 * images))
    return [middle - half, middle + half]


def student(degrees: int) -> float:
    """The quantile of Student's t for an interval of 95 %, with so many degrees of freedom."""
    if degrees <= len(STUDENT):
        return STUDENT[degrees - 1]
    return Z + (Z**3 + Z) / (4 * degrees) + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * degrees**2)  # Cornish and Fisher


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact p-value of two classifiers, from the images that only one of them gets right.

    It is the chance of a split at least as uneven if both were equally good: two-sided, by the binomial distribution
    (McNemar: "Note on the sampling error of the difference between correlated proportions or percentages", 1947).
    """
    total = only_first + only_second
    tail = sum(math.comb(total, count) for count in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**total)


def _predict_test(path: Path) -> Any:
    from dist_mnist.distributed import World, use_device
    from dist_mnist.evaluate import predict_test

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
