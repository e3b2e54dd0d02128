"""Preparing a run: settings, data, folder and calendar, all checked before any process group is formed.

Nothing here needs torch, so that `dist-mnist train` can check a run in the blink of an eye before it starts processes.
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

MAX_NAMES_BYTES = 1 << 18  # of the class names in a checkpoint, whose header has a limit


@dataclass(frozen=True)
class Plan:
    """What a run is going to do: its settings, its data and the folder they come from, its order and its directory."""

    config: Config
    folder: Path
    data: Data
    order: GlobalOrder
    run: RunDirectory
    started: CheckpointInfo | None = None  # what the checkpoint says of the run that is resumed

    @cached_property
    def code_digest(self) -> str | None:
        """The SHA-256 of the file with the user's own network."""
        return ModelSource.parse(self.config.model).digest()

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.config.steps or max(1, round((self.config.epochs or 0) * self.order.steps_per_epoch))

    def ends_epoch(self, steps_done: int) -> bool:
        """Whether the last of so many steps was an epoch's last."""
        return steps_done % self.order.steps_per_epoch == 0

    def wants_log(self, steps_done: int) -> bool:
        """Whether to report after so many steps."""
        return steps_done % self.config.log_every == 0 or steps_done == self.total_steps

    def wants_validation(self, steps_done: int, ended: Ended | None = None) -> bool:
        """Whether to validate after so many steps, by which the run may have `ended` early."""
        every = self.config.validate_every or self.order.steps_per_epoch
        due = steps_done % every == 0 or steps_done == self.total_steps or ended is not None
        return due and len(self.data.validation) > 0

    def owes_validation(self, steps_done: int, validated: bool, ended: Ended | None) -> bool:
        """Whether a run that resumes has to make up for a validation, because a stop request came first."""
        return steps_done > 0 and not validated and self.wants_validation(steps_done, ended)

    def wants_checkpoint(self, steps_done: int, ended: Ended | None = None) -> bool:
        """Whether to save after so many steps, whatever the clock says: a validated state is always saved."""
        every = self.config.checkpoint_every
        due = steps_done == self.total_steps or (every > 0 and steps_done % every == 0) or ended is not None
        return due or self.wants_validation(steps_done)

    def pauses(self, steps_done: int, ended: Ended | None = None) -> bool:
        """Whether there is more to do after so many steps than to take the next."""
        return self.wants_log(steps_done) or self.wants_checkpoint(steps_done, ended)

    def check_resumes(self, started: CheckpointInfo) -> None:
        """Check what a checkpoint says of its run against this one: another may have begun since `prepare` looked.

        Raises:
            UserError: it was made with other settings or data.
        """
        check_same(started.config(self.run.checkpoints.folder), self.config, self.run.path)
        _check_data(started, self.data, self.folder, self.run.path)

    @cached_property
    def data_facts(self) -> DataFacts:
        """What a run directory records of the data, which must stay the same when the run is resumed."""
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
        """The description of a checkpoint after `steps_done` steps; sums as `Coverage` and `Meter` gave them."""
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
    """Resolve the settings over the overrides, find and open the data, and look into the run directory.

    `resolve_precision` says what `--precision auto` means with a `--device`; without it, that is left open.

    Raises:
        UserError: something does not fit, or the run directory holds a run with other settings or data.
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
        raise UserError(f"--test-fraction holds out training images, but {folder} has test images: leave it out")
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
            f"--patience counts validations, and --validation-fraction {config.validation_fraction:g} leaves no images "
            "for them: give more, or --patience 0"
        )
    if config.batch_size > len(data.train):
        raise UserError(f"--batch-size {config.batch_size} is more than the {len(data.train)} training images")
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
            f"the run in {run_dir} has made {started.step} steps already, more than the {plan.total_steps} that are "
            "asked for: leave its length out to evaluate it, or give another --run-dir"
        )
    return plan


def check_batch_divides(config: Config, world_size: int) -> None:
    """Raise a UserError if so many processes cannot share a batch."""
    if config.batch_size < world_size:
        raise UserError(
            f"--batch-size {config.batch_size} is the global batch, which {world_size} processes cannot share; give "
            f"{world_size} or more"
        )
    if config.invariant and config.microbatches % world_size:
        raise UserError(
            f"--invariant cuts a batch into {config.microbatches} microbatches, which {world_size} processes cannot "
            "share equally: give a power of two up to that, or more --microbatches"
        )


def _check_data(started: CheckpointInfo, data: Data, folder: Path, run_dir: Path) -> None:
    if started.data.fingerprint != data.fingerprint:
        raise UserError(
            f"the run in {run_dir} was started on other data ({started.data.folder}) than {folder} holds now; "
            "give its --data-dir, or another --run-dir"
        )
    if started.data.reading.label_numbers != data.label_numbers:
        raise UserError(
            f"the run in {run_dir} was started with {started.data.num_classes} classes, and classes.json in {folder} "
            f"now makes {data.num_classes} of the same labels: put the former back, or give another --run-dir"
        )


def settings_of(overrides: Overrides, run_dir: Path | None) -> tuple[Config, CheckpointInfo | None]:
    """The settings, over those of the run in `run_dir` if there is one to resume, and what its checkpoint says.

    Raises:
        UserError: a value is out of its limits, or would change what that run computes.
    """
    run = RunDirectory(run_dir) if run_dir else None
    if run is None or (started := run.checkpoints.newest_info()) is None:
        config = _checked(resolve(overrides))
        if config.init and not os.path.exists(config.init):  # a run that resumes has no need of it
            raise UserError(f"--init {config.init}: there is no such file or run directory")
        return config, None
    before = started.config(run.checkpoints.folder)
    if is_own_code(before.model) and "model" not in overrides:
        raise UserError(
            f"the run in {run_dir} trains a network of your own, whose code is never taken from a run: say where it "
            f"is, such as --model {short(named_again(before.model), 200)}"
        )
    return _checked(resolve(overrides, before)), started


def _checked(config: Config) -> Config:
    """The same settings, if what they say of the user's code has the right form, and files and packages are there."""
    ModelSource.parse(config.model).check_file()
    parse_arguments(config.model_args)
    for name in config.log_to:
        if name not in TRACKERS:
            UserCode.of(name, "--log-to").check_file()
        elif importlib.util.find_spec(name) is None:
            raise UserError(f"--log-to {name} needs a package that is not installed: pip install 'dist-mnist[{name}]'")
    return config


def _folder(overrides: Overrides, config: Config, started: CheckpointInfo | None) -> Path:
    """Where the data is: where the user says, or where the resumed run had it, or where it is found or put."""
    need_test = not config.test_fraction
    if started and not overrides.keys() & {"data_dir", "dataset"}:
        return data_folder(None, path_of(started.data.folder), need_test)
    return data_folder(config.dataset, config.data_dir, need_test)
