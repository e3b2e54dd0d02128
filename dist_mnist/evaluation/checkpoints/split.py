"""The images that models are evaluated on, checked against the data that these were trained on."""

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
    """Images to evaluate models on, what their classes are called, and how many of the training images they are.

    `validation` are other images that no model was trained on, for the best temperature; None where there are none.
    """

    dataset: IdxDataset
    class_names: tuple[str, ...]
    test_fraction: float  # 0 where there are test files
    validation: IdxDataset | None


def open_split(
    models: Sequence[TrainedModel], split: Split, data_dir: Path | None, test_fraction: float | None = None
) -> EvaluatedSplit:
    """The images to evaluate models on.

    Args:
        data_dir: folder of idx files; None for the one that the first model was trained on.
        test_fraction: of the training images, where there are no test files; None for that of the first model's run.

    Raises:
        UserError: the data cannot be read, or does not go together with a model.
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
                f"{model.path} was trained on {described(facts)}, but {folder} holds {list(data.test.image_shape)} in "
                f"{data.num_classes}; give another --data-dir"
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
        warn(f"{folder} calls the classes {listed(data.class_names)}, {models[0].path} {listed(first.names)}")
    held_out = split in (Split.TEST, Split.TEST50K) and all(_same_validation(model, data, config) for model in models)
    validation = data.validation if held_out else None
    return EvaluatedSplit(dataset, first.class_names or data.class_names, data.test_fraction, to_calibrate(validation))


def to_calibrate(validation: IdxDataset | None) -> IdxDataset | None:
    """Validation images to fit one number on, of which there need not be more than some thousand."""
    return validation.first(MOST_TO_CALIBRATE) if validation else None


def _same_validation(model: TrainedModel, data: Data, config: Config) -> bool:
    """Whether the validation split of `data`, made by the settings `config`, is that of a model's run."""
    own = model.config
    settings = [(one.split_seed, one.validation_fraction, one.validation_fold) for one in (own, config)]
    same = own.test_fraction == data.test_fraction and data.fingerprint == model.info.data.fingerprint
    return same and settings[0] == settings[1]


def _check_split(model: TrainedModel, split: Split, data: Data, folder: Path, config: Config) -> None:
    """Check that a split which is a part of training files is not, in part, what a model was trained on."""
    same_files, own = data.fingerprint == model.info.data.fingerprint, model.config
    same_split = (own.split_seed, own.test_fraction) == (config.split_seed, data.test_fraction)
    if split == Split.TEST:
        if same_files and data.test_fraction and not same_split:
            raise UserError(
                f"{model.path} was trained with --test-fraction {own.test_fraction:g} and --seed {own.seed}: among "
                "other test images there would be some that it was trained on"
            )
    elif not _same_validation(model, data, config):
        raise UserError(
            f"{model.path}: the {split} split is a part of the files that a checkpoint was trained on; those in "
            f"{folder}, or the settings by which they are split, are others; evaluate --split test"
        )
