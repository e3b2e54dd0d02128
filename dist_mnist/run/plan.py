"""Preparation of a run: settings, data, run directory and schedule, checked before any process group is formed.

Nothing here imports torch, so that `dist-mnist train` can check a run in an instant before it starts processes.
"""

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import msgspec

from dist_mnist.config.choices import Precision
from dist_mnist.config.overrides import Overrides
from dist_mnist.config.resolve import check_same, resolve
from dist_mnist.config.settings import TRACKERS, Config, is_own_code, named_again
from dist_mnist.config.stages import Stages
from dist_mnist.data.sampler import GlobalOrder
from dist_mnist.data.sources.resolve import data_folder
from dist_mnist.data.splits import Data, open_data
from dist_mnist.model.source import ModelSource, UserCode, parse_arguments
from dist_mnist.run.directory import RunDirectory
from dist_mnist.run.records import (
    Arithmetic,
    CheckpointInfo,
    DataFacts,
    EarlyStoppingState,
    Ended,
    InitFacts,
    ValidationScore,
)
from dist_mnist.utils.errors import UserError, short
from dist_mnist.utils.files import path_of, path_text, to_json
from dist_mnist.utils.versions import versions

MAX_NAMES_BYTES = 1 << 18  # limit for class names in a checkpoint, whose header is limited


@dataclass(frozen=True)
class Plan:
    """The plan of a run: settings, data and their folder, sample order, and run directory."""

    config: Config
    folder: Path
    data: Data
    order: GlobalOrder
    run: RunDirectory
    started: CheckpointInfo | None = None  # description in the checkpoint to resume from

    @cached_property
    def code_digest(self) -> str | None:
        """SHA-256 of the file with the user's own network."""
        return ModelSource.parse(self.config.model).digest()

    @property
    def total_steps(self) -> int:
        """Number of optimizer steps of the whole run."""
        return self.config.steps or max(1, round((self.config.epochs or 0) * self.order.steps_per_epoch))

    def ends_epoch(self, steps_done: int) -> bool:
        """Whether an epoch ends after `steps_done` steps."""
        return steps_done % self.order.steps_per_epoch == 0

    def wants_log(self, steps_done: int) -> bool:
        """Whether to log after `steps_done` steps."""
        return steps_done % self.config.log_every == 0 or steps_done == self.total_steps

    def wants_validation(self, steps_done: int, ended: Ended | None = None) -> bool:
        """Whether to validate after `steps_done` steps; `ended` says whether the run ends early there."""
        every = self.config.validate_every or self.order.steps_per_epoch
        due = steps_done % every == 0 or steps_done == self.total_steps or ended is not None
        return due and len(self.data.validation) > 0

    def owes_validation(self, steps_done: int, validated: bool, ended: Ended | None) -> bool:
        """Whether a resumed run has to make up for a validation that a stop request prevented."""
        return steps_done > 0 and not validated and self.wants_validation(steps_done, ended)

    def wants_checkpoint(self, steps_done: int, ended: Ended | None = None) -> bool:
        """Whether to save after `steps_done` steps, in addition to saves by the clock; validated states are saved."""
        every = self.config.checkpoint_every
        due = steps_done == self.total_steps or (every > 0 and steps_done % every == 0) or ended is not None
        return due or self.wants_validation(steps_done)

    def pauses(self, steps_done: int, ended: Ended | None = None) -> bool:
        """Whether to log, validate or save after `steps_done` steps."""
        return self.wants_log(steps_done) or self.wants_checkpoint(steps_done, ended)

    def check_resumes(self, started: CheckpointInfo) -> None:
        """Check that a checkpoint belongs to this run: another run may have started since `prepare`.

        Raises:
            UserError: it was trained with other settings or data.
        """
        check_same(started.config(self.run.checkpoints.folder), self.config, self.run.path)
        _check_data(started, self.data, self.folder, self.run.path)

    @cached_property
    def data_facts(self) -> DataFacts:
        """The facts about the data in a run's records; they must not change when the run is resumed."""
        data = self.data
        facts = DataFacts(
            folder=path_text(self.folder.resolve()),
            fingerprint=data.fingerprint,
            image_shape=data.train.image_shape,
            num_classes=data.num_classes,
            label_numbers=None if data.label_numbers == tuple(range(data.num_classes)) else data.label_numbers,
            light_ground=data.train.has_light_ground,
        )
        named = data.class_names != facts.names and len(to_json(data.class_names)) <= MAX_NAMES_BYTES
        return msgspec.structs.replace(facts, class_names=data.class_names) if named else facts

    def checkpoint_info(
        self,
        steps_done: int,
        ledger: list[int],
        meter: list[float],
        validation: ValidationScore | None = None,
        init: InitFacts | None = None,
        computed_by: Arithmetic | None = None,
        early_stopping: EarlyStoppingState = EarlyStoppingState(),  # noqa: B008 (it is immutable)
    ) -> CheckpointInfo:
        """Return the description of a checkpoint after `steps_done` steps, with sums of `Coverage` and `Meter`."""
        return CheckpointInfo(
            settings=self.config.to_json(),
            data=self.data_facts,
            step=steps_done,
            epoch=steps_done / self.order.steps_per_epoch,
            validation=validation,
            versions=versions(),
            ledger=(ledger[0], ledger[1], ledger[2], ledger[3]),
            meter=(meter[0], meter[1], meter[2]),
            early_stopping=early_stopping,
            code_sha256=self.code_digest,
            init=init,
            settings_sha256=self.config.sha256(),
            computed_by=computed_by,
        )


def prepare(
    overrides: Mapping[str, object],
    world_size: int,
    resolve_precision: Callable[[Precision, str], Precision] | None = None,
) -> Plan:
    """Resolve the settings, find and open the data, and check the run directory.

    `resolve_precision` resolves `--precision auto` for a `--device`; without it, `auto` stays.

    Raises:
        UserError: settings are wrong or do not match the data, or the run directory has a run with other settings or
            data.
    """
    overrides = Overrides(overrides)
    run_dir = overrides.run_dir
    config, started = settings_of(overrides, run_dir)
    check_batch_divides(config, world_size)
    folder = _folder(overrides, config, started)
    read = partial(
        open_data, folder, config.validation_fraction, config.split_seed, config.stage_data,
        validation_fold=config.fold, test_fraction=config.test_fraction, layout=config.layout,
    )  # fmt: skip
    data = read(like=started.data.reading if started else None)
    if config.test_fraction and not data.test_fraction:
        raise UserError(f"--test-fraction holds out training images, but {folder} has test images: omit the option")
    if run_dir is None:
        run_dir = Path("runs") / f"{config.recipe}-{folder.resolve().name}-{config.digest(data.fingerprint)}"
        config, started = settings_of(overrides, run_dir)
        data = read(like=started.data.reading) if started else data
    if started:
        _check_data(started, data, folder, run_dir)
    if config.model == "cnn":
        Stages.of_config(config).check(*data.train.image_shape[1:], config.crop)
    if config.patience and not len(data.validation):
        raise UserError(
            f"--patience needs a validation split, and --validation-fraction {config.validation_fraction:g} gives it "
            "no images: give a larger fraction, or --patience 0"
        )
    if config.batch_size > len(data.train):
        raise UserError(
            f"--batch-size {config.batch_size} is more than the {len(data.train)} training images: give at most that"
        )
    order = GlobalOrder(
        num_samples=len(data.train),
        global_batch_size=config.batch_size,
        seed=config.seed,
        drop_last=config.drop_last,
        partners=config.mixes,
    )
    if resolve_precision:
        config = replace(config, precision=resolve_precision(config.precision, config.device))
    plan = Plan(config, folder, data, order, RunDirectory(run_dir), started)
    if started and started.step > plan.total_steps:
        raise UserError(
            f"the run in {run_dir} has already trained {started.step} steps, more than the requested "
            f"{plan.total_steps}: omit --steps and --epochs to evaluate it, or give another --run-dir"
        )
    return plan


def check_batch_divides(config: Config, world_size: int) -> None:
    """Raise a UserError if a batch cannot be divided among `world_size` processes."""
    if config.batch_size < world_size:
        raise UserError(
            f"--batch-size {config.batch_size} is the global batch size, less than one sample for each of "
            f"{world_size} processes: give {world_size} or more"
        )
    if config.invariant and config.microbatches % world_size:
        raise UserError(
            f"--invariant splits a batch into {config.microbatches} microbatches, which cannot be divided equally "
            f"among {world_size} processes: use a power of two up to {config.microbatches}, or more --microbatches"
        )


def _check_data(started: CheckpointInfo, data: Data, folder: Path, run_dir: Path) -> None:
    if started.data.fingerprint != data.fingerprint:
        raise UserError(
            f"the run in {run_dir} was started on other data ({started.data.folder}) than {folder} has now; "
            "give its --data-dir, or another --run-dir"
        )
    if started.data.reading.label_numbers != data.label_numbers:
        raise UserError(
            f"the run in {run_dir} was started with {started.data.num_classes} classes, and classes.json in {folder} "
            f"now has {data.num_classes} for the same labels: restore that file, or give another --run-dir"
        )


def settings_of(overrides: Overrides, run_dir: Path | None) -> tuple[Config, CheckpointInfo | None]:
    """Return the settings, on top of those of the run in `run_dir` if it can be resumed, and its newest description.

    Raises:
        UserError: a value is out of its limits, or would change what that run computes.
    """
    run = RunDirectory(run_dir) if run_dir else None
    if run is None or (started := run.checkpoints.newest_info()) is None:
        config = _checked(resolve(overrides))
        if config.init and not os.path.exists(config.init):  # a resumed run does not need it
            raise UserError(f"--init {config.init}: there is no such file or run directory")
        return config, None
    before = started.config(run.checkpoints.folder)
    if is_own_code(before.model) and "model" not in overrides:
        raise UserError(
            f"the run in {run_dir} trains your own network, whose code is never loaded from a run: name it again, such "
            f"as --model {short(named_again(before.model), 200)}"
        )
    return _checked(resolve(overrides, before)), started


def _checked(config: Config) -> Config:
    """Return the same settings; UserError if a name of user code is malformed, or its file or a package is missing."""
    ModelSource.parse(config.model).check_file()
    parse_arguments(config.model_args)
    for name in config.log_to:
        if name not in TRACKERS:
            UserCode.of(name, "--log-to").check_file()
        elif importlib.util.find_spec(name) is None:
            raise UserError(f"--log-to {name} needs a package that is not installed: pip install 'dist-mnist[{name}]'")
    return config


def _folder(overrides: Overrides, config: Config, started: CheckpointInfo | None) -> Path:
    """Return the data folder: the user's, else the resumed run's, else the default, downloading what is missing."""
    need_test = not config.test_fraction
    if started and not overrides.keys() & {"data_dir", "dataset"}:
        return data_folder(None, path_of(started.data.folder), need_test)
    return data_folder(config.dataset, config.data_dir, need_test)
