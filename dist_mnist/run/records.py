"""The schemas of a run's files, as frozen records: checkpoint descriptions, config.json, metrics.jsonl, result.json.

A record is created when its file is read (`parse`) or before it is written (`to_json`);
`msgspec.structs.replace` returns a changed copy. The fields have the order of the keys in the file.
"""

import itertools
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Annotated, TypeVar

from msgspec import Meta, Struct

from dist_mnist.config.resolve import from_json
from dist_mnist.config.settings import FIELDS, Config
from dist_mnist.data.splits import Reading
from dist_mnist.utils.errors import UserError
from dist_mnist.utils.files import path_of
from dist_mnist.utils.schema import Count, Fraction, Int64, Positive, parse

MAX_SIDE = 1 << 16  # limit for the classes, channels and pixels per side in a checkpoint's description
Side = Annotated[int, Meta(ge=1, le=MAX_SIDE)]
Seconds = Annotated[float, Meta(ge=0)]
R = TypeVar("R")


class DataFacts(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The data that a network is trained on."""

    folder: str  # in the form of `path_text`, like all paths in records
    fingerprint: str
    image_shape: tuple[Side, Side, Side]  # channels, height, width
    num_classes: Side
    label_numbers: tuple[Count, ...] | None = None  # the classes' labels in the files, unless they are 0 to n - 1
    class_names: tuple[str, ...] | None = None  # unless they are these numbers, or take too many bytes
    light_ground: bool = False  # whether grey images are dark on a light background

    def __post_init__(self) -> None:
        names, numbers = self.class_names, self.label_numbers
        if names is not None and len(names) != self.num_classes:
            raise ValueError(f"it has {len(names)} names for {self.num_classes} classes")
        if numbers is not None and (len(numbers) != self.num_classes or sorted(set(numbers)) != list(numbers)):
            raise ValueError(f"its labels are not {self.num_classes} different numbers in ascending order")

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each class; its label in the files, if it has no name."""
        return self.class_names or tuple(map(str, self.reading.label_numbers))

    @property
    def reading(self) -> Reading:
        """The image shape and labels by which the files were read."""
        return Reading(self.image_shape, self.label_numbers or tuple(range(self.num_classes)))


class ValidationScore(Struct, frozen=True, kw_only=True):
    """The result on the validation split; `loss` in nats, None if it is not finite."""

    accuracy: Fraction
    loss: float | None = None


class Ended(StrEnum):
    """The reason why a run ended."""

    LENGTH = "length"  # --epochs or --steps
    PATIENCE = "patience"
    MAX_TIME = "max_time"


class EarlyStoppingState(Struct, frozen=True, kw_only=True):
    """The counts for `--patience` and `--max-time`, over all starts of a run."""

    training_s: Seconds = 0.0  # steps, validations and saves
    best_accuracy: Fraction | None = None  # of the validations
    validations_since_best: Count = 0


class InitFacts(Struct, frozen=True, kw_only=True):
    """The file with a run's initial weights, if they are not random."""

    path: str
    sha256: str  # of the file, hexadecimal


class Arithmetic(Struct, frozen=True, kw_only=True):
    """The facts that, besides settings, data and software, determine the bits that a run computes."""

    device: str  # the GPU's or the processor's name, on rank 0
    processes: Positive
    threads: Count  # compute threads per process; 0 on a GPU


class CheckpointInfo(Struct, frozen=True, kw_only=True):
    """The description in a checkpoint, besides its arrays."""

    settings: Mapping[str, object]  # as JSON values, of any version; see `config`
    data: DataFacts
    step: Count
    epoch: float
    validation: ValidationScore | None = None
    versions: Mapping[str, str] = {}
    ledger: tuple[Int64, Int64, Int64, Int64] | None = None  # sums over sample ids since the epoch began, on all ranks
    meter: tuple[float | None, float | None, float | None] | None = None  # loss, correct, images since the last log
    early_stopping: EarlyStoppingState = EarlyStoppingState()
    code_sha256: str | None = None  # of the file with the user's own network, for information
    init: InitFacts | None = None
    computed_by: Arithmetic | None = None  # the processes that trained from the previous checkpoint to this one
    # Digests, hexadecimal; see `chain`.
    parent: str | None = None  # of the run's checkpoint before this one
    settings_sha256: str | None = None
    arrays_sha256: str | None = None

    def config(self, where: object, **changes: object) -> Config:
        """Return the settings, with `changes`.

        Raises:
            UserError: they are another version's, or have values out of their limits; `where` names the file.
        """
        return from_json({**self.settings, **changes}, where)


class Machine(Struct, frozen=True, kw_only=True):
    """The machine of a run's rank 0."""

    host: str
    system: str
    device: str
    cores: Count
    processes: Positive


class RunConfig(Struct, frozen=True, kw_only=True):
    """config.json."""

    settings: Mapping[str, object]  # as JSON values, of any version
    data: DataFacts
    versions: Mapping[str, str]
    machine: Machine | None = None
    code_sha256: str | None = None
    init: InitFacts | None = None

    def __post_init__(self) -> None:
        for name in ("recipe", "optimizer"):
            if not isinstance(self.settings.get(name), str):
                raise ValueError(f"its settings lack the name of the {name}")


class MetricsRecord(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A line of metrics.jsonl: measurements since the last line, or of a validation; None if not measured."""

    kind: str  # "train" or "validation"
    step: Positive
    epoch: float | None = None
    loss: float | None = None  # nats
    accuracy: float | None = None
    learning_rate: float | None = None
    gradient_norm: float | None = None  # of the last step, before clipping
    skipped_steps: Count | None = None  # number since this start of the run
    spikes: Count | None = None  # number of steps with unusual loss or gradient norm since this start of the run
    images_per_s: float | None = None
    waiting_for_data: float | None = None  # fraction of the time
    memory_gb: float | None = None  # host memory of the largest process
    device_memory_gb: float | None = None
    communicating: float | None = None  # fraction of the time
    slowest_rank_ms_per_step: float | None = None
    median_rank_ms_per_step: float | None = None
    fastest_rank_ms_per_step: float | None = None
    elapsed_s: float  # since this start of the run
    unix_time_s: float | None = None  # time of the measurement, since 1970

    @property
    def error_rate(self) -> float | None:
        """Fraction of images with a wrong prediction."""
        return None if self.accuracy is None else 1 - self.accuracy


class ReliabilityBin(Struct, frozen=True, kw_only=True):
    """One of 15 bins of equal width over the probability of the predicted class."""

    images: Count
    confidence: Fraction | None = None  # mean probability; None without images, like `accuracy`
    accuracy: Fraction | None = None


class EvaluationResult(Struct, frozen=True, kw_only=True):
    """The result of `dist-mnist eval`. For several checkpoints, `step` and `views` may be tuples."""

    split: str
    checkpoints: tuple[str, ...] = ()
    checkpoint_sha256: tuple[str, ...] = ()  # as in the run's chain
    step: Count | tuple[Count, ...]
    views: Positive | tuple[Positive, ...] = 1
    parameters: Count | None = None
    images: Positive
    correct: Count
    accuracy: Fraction
    loss: float | None = None  # nats; the mean negative log-likelihood of the labels
    # Absent in older versions; see `evaluation.metrics`. None if logits are not finite, or too many.
    balanced_accuracy: Fraction | None = None
    macro_f1: Fraction | None = None
    top_k: Positive | None = None
    top_k_accuracy: Fraction | None = None
    auc: Fraction | None = None  # one class against the rest, mean over classes
    brier: Annotated[float, Meta(ge=0, le=2)] | None = None
    ece: Fraction | None = None  # expected calibration error, over `reliability`
    temperature: Annotated[float, Meta(gt=0)] | None = None  # the optimum on the validation split, if there is one
    calibrated_loss: float | None = None  # at that temperature
    per_class_accuracy: tuple[Fraction | None, ...]  # None for a class without images
    confusion_matrix: tuple[tuple[Count, ...], ...]  # rows true, columns predicted class
    reliability: tuple[ReliabilityBin, ...] | None = None
    class_names: tuple[str, ...] | None = None
    held_out: Fraction | None = None  # fraction of the training files' images, if these contain the test split

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each class; its number, if it has no name."""
        return self.class_names or tuple(map(str, range(len(self.confusion_matrix))))

    def __post_init__(self) -> None:
        matrix = self.confusion_matrix
        if {len(row) for row in matrix} != {len(matrix)} or len(self.per_class_accuracy) != len(matrix):
            raise ValueError("its confusion matrix does not have a row and a column for each class")
        if self.class_names is not None and len(self.class_names) != len(matrix):
            raise ValueError("the numbers of its class names and classes differ")
        correct = sum(row[true] for true, row in enumerate(matrix))
        if (sum(map(sum, matrix)), correct) != (self.images, self.correct):
            raise ValueError("its confusion matrix does not match its numbers of images and correct predictions")


class RunSeconds(Struct, frozen=True, kw_only=True):
    """Wall-clock seconds of a run that trained from its first step to its result in one process, on rank 0.

    Published speed records give `training` or `training_with_evaluation`, which exclude imports and set-up.
    """

    training: Seconds  # from the first step to the last checkpoint on the disk, without validations
    training_with_evaluation: Seconds  # from the first step to the test result, with validations and group shutdown
    since_start: Seconds  # start of Python to the test result


class RunResult(EvaluationResult, frozen=True, kw_only=True):
    """result.json."""

    seconds: RunSeconds | None = None  # None for a run that was resumed
    ended: Ended = Ended.LENGTH


class Owner(Struct, frozen=True, kw_only=True):
    """`.owner`: the process that owns a run directory."""

    token: str
    run_id: str | None = None  # name of torchrun's rendezvous
    process: Positive
    host: str
    started_at: float | None = None  # start time of that process, in seconds since 1970


class Failures(Struct, frozen=True, kw_only=True):
    """`.failures`: the step at which a run last failed, and how many times in a row."""

    step: Int64 = -1
    times: Count = 0


class Stopped(Struct, frozen=True, kw_only=True):
    """stopped.json: the step after which a run was stopped, and the signal."""

    step: Count
    signal: str


@dataclass(frozen=True)
class RunSummary:
    """A run directory's files except the checkpoints; `result` is None until the run is finished."""

    path: Path
    config: RunConfig
    records: tuple[MetricsRecord, ...]
    result: RunResult | None

    @property
    def settings(self) -> Mapping[str, object]:
        """The resolved settings, as JSON values."""
        return self.config.settings

    @cached_property
    def essential(self) -> dict[str, object]:
        """The settings that affect the result, and the data; defaults for settings that an older version lacked."""
        settings = {name: self.settings.get(name, declared.default) for name, declared in FIELDS.items()}
        found = {name: value for name, value in settings.items() if not FIELDS[name].changeable}
        chosen_by = {name: settings[name] for name in ("validate_every", "patience", "max_time")}  # the best checkpoint
        data = self.config.data
        return found | chosen_by | {"data": f"{path_of(data.folder).name} {data.fingerprint[:8]}"}

    @property
    def training_s(self) -> float | None:
        """Seconds of training, pauses included; for a resumed run, the sum over its starts."""
        elapsed = [record.elapsed_s for record in self.records]
        ends = [one for one, following in itertools.pairwise([*elapsed, -1.0]) if following < one]
        return sum(ends) if ends else None

    def median(self, name: str) -> float | None:
        """Return the median of a metric over the log intervals in which it was measured."""
        values = [getattr(record, name) for record in self.records if record.kind == "train"]
        known = [value for value in values if value is not None]
        return statistics.median(known) if known else None


def read_config(path: Path) -> RunConfig:
    """Read the config.json of a run directory; raises as `read_run` does."""
    return _parse(path / "config.json", _bytes(path / "config.json"), RunConfig)


def read_run(path: Path) -> RunSummary:
    """Read a run directory.

    Raises:
        UserError: it is not a run directory, or one of its files does not match its schema.
    """
    config = read_config(path)
    result_path, metrics_path = path / "result.json", path / "metrics.jsonl"
    result = _parse(result_path, _bytes(result_path), RunResult) if result_path.exists() else None
    lines = _bytes(metrics_path).splitlines(keepends=True) if metrics_path.exists() else []
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()  # its writer was killed
    return RunSummary(path, config, tuple(_parse(metrics_path, line, MetricsRecord) for line in lines), result)


def _bytes(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a regular file")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path.parent} is not a run directory ({error.strerror}: {path})") from None


def _parse(path: Path, content: bytes, kind: type[R]) -> R:
    try:
        return parse(content, kind)
    except ValueError as error:
        raise UserError(f"{path} cannot be read, as its content is invalid: {error}") from None
