"""What a run's files hold: the form of checkpoint descriptions, config.json, metrics.jsonl and result.json."""

import itertools
import statistics
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dist_mnist.config.settings import FIELDS
from dist_mnist.utils.errors import UserError
from dist_mnist.utils.schema import each, number, or_null, parse, share, string, whole

MOST = 1 << 16  # classes, channels and pixels a side, that a checkpoint may speak of


# What is said of the data that a network was trained on.
DATA = {"folder": string, "fingerprint": string, "image_shape": [whole(1, MOST)] * 3, "num_classes": whole(1, MOST)}


# What a checkpoint says of itself: its `info`.
INFO: dict[str, Any] = {
    "step": whole(0),
    "epoch": number,
    "validation": or_null({"accuracy": share, "loss": or_null(number)}),
    "settings": {},
    "data": DATA,
    "ledger": or_null([whole(-(2**63), 2**63 - 1)] * 4),  # sums since the epoch began
    "meter": or_null([or_null(number)] * 3),  # sums since the last log line
}

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
        found = {name: value for name, value in settings.items() if not FIELDS[name].changeable}
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
