"""The split that models are evaluated on, checked against their training data."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dist_mnist.config.settings import Config
from dist_mnist.data.dataset import IdxDataset
from dist_mnist.data.labels import listed
from dist_mnist.data.splits import Data, open_data, open_test50k
from dist_mnist.evaluation.checkpoints.load import TrainedModel, described
from dist_mnist.evaluation.choices import Split
from dist_mnist.utils.errors import UserError, warn
from dist_mnist.utils.files import path_of

MOST_TO_CALIBRATE = 10_000


class EvaluatedSplit(NamedTuple):
    """Images to evaluate models on, their class names, and the fraction of training images held out as the test split.

    `validation`: other images that no model was trained on, to fit the temperature; None if there are none.
    """

    dataset: IdxDataset
    class_names: tuple[str, ...]
    test_fraction: float  # 0 if the data has test files
    validation: IdxDataset | None


def open_split(
    models: Sequence[TrainedModel], split: Split, data_dir: Path | None, test_fraction: float | None = None
) -> EvaluatedSplit:
    """Open the split to evaluate models on.

    Args:
        data_dir: folder of idx files; None for the folder that the first model was trained on.
        test_fraction: fraction of the training images held out as the test split if there are no test files; None for
            the setting of the first model's run.

    Raises:
        UserError: the data cannot be read, or does not match a model.
    """
    first, config = models[0].info.data, models[0].config
    folder = data_dir or path_of(first.folder)
    data = open_data(
        folder, config.validation_fraction, config.split_seed, layout=config.layout, like=first.reading,
        validation_fold=config.fold,
        test_fraction=config.test_fraction if test_fraction is None else test_fraction,
    )  # fmt: skip
    for note in data.notes:
        warn(note)
    dataset: IdxDataset = open_test50k(folder, data) if split == Split.TEST50K else getattr(data, split)
    for model in models:
        facts = model.info.data
        if data.test.image_shape != facts.image_shape or data.num_classes > facts.num_classes:
            raise UserError(
                f"{model.path} was trained on {described(facts)}, but {folder} holds images of "
                f"{list(data.test.image_shape)} in {data.num_classes} classes; give another --data-dir"
            )
        if facts.reading.label_numbers != data.label_numbers and facts.names != data.class_names:
            raise UserError(
                f"{model.path} was trained on the classes {listed(facts.names)}, but {folder} holds "
                f"{listed(data.class_names)}; give another --data-dir"
            )
        if split != Split.TEST50K:
            _check_split(model, split, data, folder, config)
        if len(dataset) == 0:
            raise UserError(f"{model.path} was trained without a {split} split (--validation-fraction 0)")
    classes = zip(data.label_numbers, data.class_names, first.names, strict=True)
    if first.class_names and any(here != there and here != str(label) for label, here, there in classes):
        names = f"{listed(data.class_names)}, in {models[0].path} {listed(first.names)}"
        warn(f"the class names differ: in {folder} they are {names}; the latter are used")
    held_out = split in (Split.TEST, Split.TEST50K) and all(_same_validation(model, data, config) for model in models)
    validation = data.validation if held_out else None
    return EvaluatedSplit(dataset, first.class_names or data.class_names, data.test_fraction, to_calibrate(validation))


def to_calibrate(validation: IdxDataset | None) -> IdxDataset | None:
    """Return the first 10 000 validation images at most: enough to fit one number."""
    return validation.first(MOST_TO_CALIBRATE) if validation else None


def _same_validation(model: TrainedModel, data: Data, config: Config) -> bool:
    """Return whether `data`, split by the settings `config`, has the validation split of a model's run."""
    own = model.config
    settings = [(one.split_seed, one.validation_fraction, one.validation_fold) for one in (own, config)]
    same = own.test_fraction == data.test_fraction and data.fingerprint == model.info.data.fingerprint
    return same and settings[0] == settings[1]


def _check_split(model: TrainedModel, split: Split, data: Data, folder: Path, config: Config) -> None:
    """Check that a split that is part of the training files matches the split of a model's run."""
    same_files, own = data.fingerprint == model.info.data.fingerprint, model.config
    same_split = (own.split_seed, own.test_fraction) == (config.split_seed, data.test_fraction)
    if split == Split.TEST:
        if same_files and data.test_fraction and not same_split:
            raise UserError(
                f"{model.path} was trained with --test-fraction {own.test_fraction:g} and --seed {own.seed}: "
                "another test split would contain images that it was trained on"
            )
    elif not _same_validation(model, data, config):
        raise UserError(
            f"{model.path}: the {split} split depends on the files and settings of its run, but {folder} holds other "
            "files, or the settings of the split differ; give --split test"
        )
