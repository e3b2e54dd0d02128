"""What a run's files hold, as frozen records: checkpoint descriptions, config.json, metrics.jsonl, result.json.

A record is made once, when its file is read (`parse`) or before it is written (`to_json`);
`msgspec.structs.replace` makes a changed copy. The order of its fields is that of the keys in the file.
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

MAX_SIDE = 1 << 16  # classes, channels and pixels a side, that a checkpoint may speak of
Side = Annotated[int, Meta(ge=1, le=MAX_SIDE)]
Seconds = Annotated[float, Meta(ge=0)]
R = TypeVar("R")


class DataFacts(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The data that a network is trained on."""

    folder: str  # as `path_text` writes it, as are all paths in records
    fingerprint: str
    image_shape: tuple[Side, Side, Side]  # channels, height, width
    num_classes: Side
    label_numbers: tuple[Count, ...] | None = None  # of the classes in the files, where they are not 0 to n - 1
    class_names: tuple[str, ...] | None = None  # where they are not these numbers, and do not take too many bytes
    light_ground: bool = False  # whether gray images are dark on light

    def __post_init__(self) -> None:
        names, numbers = self.class_names, self.label_numbers
        if names is not None and len(names) != self.num_classes:
            raise ValueError(f"it has {len(names)} names of {self.num_classes} classes")
        if numbers is not None and (len(numbers) != self.num_classes or sorted(set(numbers)) != list(numbers)):
            raise ValueError(f"the labels of its {self.num_classes} classes are not as many in ascending order")

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each class, or else its label in the files."""
        return self.class_names or tuple(map(str, self.reading.label_numbers))

    @property
    def reading(self) -> Reading:
        """How the files were read."""
        return Reading(self.image_shape, self.label_numbers or tuple(range(self.num_classes)))


class ValidationScore(Struct, frozen=True, kw_only=True):
    """The result on the validation split; `loss` in nats, None where it is not finite."""

    accuracy: Fraction
    loss: float | None = None


class Ended(StrEnum):
    """Why a run ended."""

    LENGTH = "length"  # --epochs or --steps
    PATIENCE = "patience"
    MAX_TIME = "max_time"


class EarlyStoppingState(Struct, frozen=True, kw_only=True):
    """What `--patience` and `--max-time` count, over all starts of a run."""

    training_s: Seconds = 0.0  # steps, validations and saves
    best_accuracy: Fraction | None = None  # of the validations
    validations_since_best: Count = 0


class InitFacts(Struct, frozen=True, kw_only=True):
    """What a run started from, instead of random weights."""

    path: str
    sha256: str  # of the file, hexadecimal


class Arithmetic(Struct, frozen=True, kw_only=True):
    """What decides, beside settings, data and software, which bits a run computes."""

    device: str  # the GPU's or the processor's name, on rank 0
    processes: Positive
    threads: Count  # of each, that compute; 0 on a GPU


class CheckpointInfo(Struct, frozen=True, kw_only=True):
    """The description that a checkpoint carries beside its arrays."""

    settings: Mapping[str, object]  # as JSON values, of whatever version; see `config`
    data: DataFacts
    step: Count
    epoch: float
    validation: ValidationScore | None = None
    versions: Mapping[str, str] = {}
    ledger: tuple[Int64, Int64, Int64, Int64] | None = None  # sums over ids since the epoch began, on all ranks
    meter: tuple[float | None, float | None, float | None] | None = None  # loss, correct, images since the last log
    early_stopping: EarlyStoppingState = EarlyStoppingState()
    code_sha256: str | None = None  # of the file with the user's own network, as information
    init: InitFacts | None = None
    computed_by: Arithmetic | None = None  # the processes that trained to this step since the last one
    # Digests, hexadecimal; see `chain`.
    parent: str | None = None  # of the run's checkpoint before this one
    settings_sha256: str | None = None
    arrays_sha256: str | None = None

    def config(self, where: object, **changes: object) -> Config:
        """The settings, some of them changed.

        Raises:
            UserError: another version's settings, or values out of their limits; `where` says in which file.
        """
        return from_json({**self.settings, **changes}, where)


class Machine(Struct, frozen=True, kw_only=True):
    """The machine that a run is made on, as rank 0 sees it."""

    host: str
    system: str
    device: str
    cores: Count
    processes: Positive


class RunConfig(Struct, frozen=True, kw_only=True):
    """config.json."""

    settings: Mapping[str, object]  # as JSON values, of whatever version
    data: DataFacts
    versions: Mapping[str, str]
    machine: Machine | None = None
    code_sha256: str | None = None
    init: InitFacts | None = None

    def __post_init__(self) -> None:
        for name in ("recipe", "optimizer"):
            if not isinstance(self.settings.get(name), str):
                raise ValueError(f"its settings have no name of the {name}")


class MetricsRecord(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A line of metrics.jsonl: what was measured since the last one, or by a validation; None where it was not."""

    kind: str  # "train" or "validation"
    step: Positive
    epoch: float | None = None
    loss: float | None = None  # nats
    accuracy: float | None = None
    learning_rate: float | None = None
    gradient_norm: float | None = None  # of the last step, before clipping
    skipped_steps: Count | None = None  # since this start of the run
    spikes: Count | None = None  # steps of unusual loss or gradient norm since this start of the run
    images_per_s: float | None = None
    waiting_for_data: float | None = None  # fraction of the time
    memory_gb: float | None = None  # of the host, by the largest process
    device_memory_gb: float | None = None
    communicating: float | None = None  # fraction of the time
    slowest_rank_ms_per_step: float | None = None
    median_rank_ms_per_step: float | None = None
    fastest_rank_ms_per_step: float | None = None
    elapsed_s: float  # since this start of the run
    unix_time_s: float | None = None  # when it was measured, since 1970

    @property
    def error_rate(self) -> float | None:
        """Fraction of the images whose class was not predicted."""
        return None if self.accuracy is None else 1 - self.accuracy


class ReliabilityBin(Struct, frozen=True, kw_only=True):
    """The images whose predicted class has a probability within one of 15 bins of equal width."""

    images: Count
    confidence: Fraction | None = None  # mean probability; None without images, as is `accuracy`
    accuracy: Fraction | None = None


class EvaluationResult(Struct, frozen=True, kw_only=True):
    """What `dist-mnist eval` gives. Of several checkpoints, `step` and `views` may be tuples."""

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
    # Versions before had none of these; see `evaluation.metrics`. None where logits are not finite, or too many.
    balanced_accuracy: Fraction | None = None
    macro_f1: Fraction | None = None
    top_k: Positive | None = None
    top_k_accuracy: Fraction | None = None
    auc: Fraction | None = None  # one class against the rest, mean over classes
    brier: Annotated[float, Meta(ge=0, le=2)] | None = None
    ece: Fraction | None = None  # expected calibration error, over `reliability`
    temperature: Annotated[float, Meta(gt=0)] | None = None  # the best one for validation images, where there are any
    calibrated_loss: float | None = None  # at that temperature
    per_class_accuracy: tuple[Fraction | None, ...]  # None for a class without images
    confusion_matrix: tuple[tuple[Count, ...], ...]  # rows true, columns predicted class
    reliability: tuple[ReliabilityBin, ...] | None = None
    class_names: tuple[str, ...] | None = None
    held_out: Fraction | None = None  # of the training files' images, where the test split is a part of these

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each class, or else its number."""
        return self.class_names or tuple(map(str, range(len(self.confusion_matrix))))

    def __post_init__(self) -> None:
        matrix = self.confusion_matrix
        if {len(row) for row in matrix} != {len(matrix)} or len(self.per_class_accuracy) != len(matrix):
            raise ValueError("its confusion matrix does not have a row and a column for each class")
        if self.class_names is not None and len(self.class_names) != len(matrix):
            raise ValueError("its class names are not as many as its classes")
        correct = sum(row[true] for true, row in enumerate(matrix))
        if (sum(map(sum, matrix)), correct) != (self.images, self.correct):
            raise ValueError("its confusion matrix is not that of its images")


class RunSeconds(Struct, frozen=True, kw_only=True):
    """Wall-clock seconds of a run that trained from its first step to its result in one process, on rank 0.

    Published speed records tell `training` or `training_with_evaluation`: imports and set-up are not in them.
    """

    training: Seconds  # first step's begin to last checkpoint on the disk, log lines in between, validations not
    training_with_evaluation: Seconds  # first step's begin to the test result, with validations and leaving the group
    since_start: Seconds  # start of Python to the test result


class RunResult(EvaluationResult, frozen=True, kw_only=True):
    """result.json."""

    seconds: RunSeconds | None = None  # not known of a run that resumed
    ended: Ended = Ended.LENGTH


class Owner(Struct, frozen=True, kw_only=True):
    """`.owner`: the process that owns a run directory."""

    token: str
    run_id: str | None = None  # of torchrun's rendezvous
    process: Positive
    host: str
    started_at: float | None = None  # that process, in seconds since 1970


class Failures(Struct, frozen=True, kw_only=True):
    """`.failures`: how many times in a row a run has failed at which step."""

    step: Int64 = -1
    times: Count = 0


class Stopped(Struct, frozen=True, kw_only=True):
    """stopped.json: after which step, and by which signal, a run was stopped."""

    step: Count
    signal: str


@dataclass(frozen=True)
class RunSummary:
    """A run directory's files but the checkpoints; `result` is None as long as the run is not finished."""

    path: Path
    config: RunConfig
    records: tuple[MetricsRecord, ...]
    result: RunResult | None

    @property
    def settings(self) -> Mapping[str, object]:
        """The settings as resolved, as JSON values."""
        return self.config.settings

    @cached_property
    def essential(self) -> dict[str, object]:
        """The settings that bear on the result, and the data; defaults where an older version had no such setting."""
        settings = {name: self.settings.get(name, declared.default) for name, declared in FIELDS.items()}
        found = {name: value for name, value in settings.items() if not FIELDS[name].changeable}
        chosen_by = {name: settings[name] for name in ("validate_every", "patience", "max_time")}  # the best checkpoint
        data = self.config.data
        return found | chosen_by | {"data": f"{path_of(data.folder).name} {data.fingerprint[:8]}"}

    @property
    def training_s(self) -> float | None:
        """Seconds that the steps took, with pauses; of a run that was resumed, the sum over its starts."""
        elapsed = [record.elapsed_s for record in self.records]
        ends = [one for one, following in itertools.pairwise([*elapsed, -1.0]) if following < one]
        return sum(ends) if ends else None

    def median(self, name: str) -> float | None:
        """The median of a metric over the log intervals in which it was measured."""
        values = [getattr(record, name) for record in self.records if record.kind == "train"]
        known = [value for value in values if value is not None]
        return statistics.median(known) if known else None


def read_config(path: Path) -> RunConfig:
    """The config.json of a run directory; errors as of `read_run`."""
    return _parse(path / "config.json", _bytes(path / "config.json"), RunConfig)


def read_run(path: Path) -> RunSummary:
    """Read a run directory.

    Raises:
        UserError: it is none, or one of its files is not what a run writes.
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
            raise UserError(f"{path} should be a file and is none")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path.parent}: this is not the folder of a run ({error.strerror}: {path})") from None


def _parse(path: Path, content: bytes, kind: type[R]) -> R:
    try:
        return parse(content, kind)
    except ValueError as error:
        raise UserError(f"{path} cannot be read, as a run would not write it so: {error}") from None
