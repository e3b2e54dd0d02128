"""The training, validation and test splits of a folder of idx files, validated and counted."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dist_mnist.data.dataset import IdxDataset
from dist_mnist.data.idx import read_header
from dist_mnist.data.labels import as_classes, check_labels, count_labels, label_numbers, listed
from dist_mnist.data.sources.catalog import CATALOG
from dist_mnist.data.sources.classes import read_class_names
from dist_mnist.data.sources.files import SUBFOLDERS, SplitFiles, find_files
from dist_mnist.data.sources.resolve import identify
from dist_mnist.utils.errors import UserError

FINGERPRINT_BLOCKS = 256
CHANNELS = (1, 3, 4)  # usual numbers of channels


class Reading(NamedTuple):
    """How a model's training data was read: channels, height and width, and the label of each class."""

    image_shape: tuple[int, int, int]
    label_numbers: tuple[int, ...]


class Data(NamedTuple):
    """The data of a run: its three splits, its classes, and a fingerprint of the files.

    Attributes:
        train, validation, test: the splits; validation may be empty.
        num_classes: number of classes.
        fingerprint: 16 hexadecimal digits over shapes, dtypes and evenly spaced rows of the files.
        class_names: names from classes.json or a known dataset, else the label numbers.
        label_numbers: labels of the classes in the files, usually 0 to n - 1.
        test_fraction: fraction of the training images held out as the test split; 0 if there are test files.
        notes: sentences for the user on how the files were interpreted.

    Example:
        >>> from dist_mnist import open_data
        >>> data = open_data("data/mnist")
        >>> data.train.image_shape, data.class_names[:3]
        ((1, 28, 28), ('0', '1', '2'))
    """

    train: IdxDataset
    validation: IdxDataset
    test: IdxDataset
    num_classes: int
    fingerprint: str
    class_names: tuple[str, ...]
    label_numbers: tuple[int, ...]
    test_fraction: float = 0.0
    notes: tuple[str, ...] = ()


def open_data(
    folder: str | Path,
    validation_fraction: float = 0.0,
    seed: int | None = 0,
    stage: bool = False,
    *,
    validation_fold: tuple[int, int] | None = None,
    test_fraction: float = 0.0,
    need_test: bool = True,
    layout: str = "auto",
    like: Reading | None = None,
) -> Data:
    """Open a folder of idx files (with `stage`, local copies of them) and check that its splits are consistent.

    Validation images are chosen at random by `seed`; without a seed they are the last ones of the file.

    Args:
        validation_fold: fold (from 0) and number of folds, instead of the fraction: see `IdxDataset.fold`.
        test_fraction: fraction of the training images held out in the same way if there are no test files.
        need_test: if False, and without a `test_fraction`, a folder without test files has an empty test split.
        layout: axis order of 4-dimensional files: "nhwc", "nchw", or "auto" to infer it from the shape.
        like: how a model's training data was read; it decides if these files are ambiguous.

    Raises:
        UserError: see `find_files` and `IdxDataset`; or a test label does not occur in the training set, test images
            have another shape or dtype, or classes.json does not match the labels.

    Example:
        >>> from dist_mnist import open_data
        >>> data = open_data("data/mnist", validation_fraction=0.1, seed=0)
        >>> len(data.train), len(data.validation), len(data.test), data.num_classes
        (540, 60, 200, 10)
    """
    folder = Path(folder)
    files = find_files(folder, stage, need_test and not test_fraction)
    channels_first, notes = _is_channels_first(folder, files["train"].images, layout, like)
    found = {split: IdxDataset.open(of_split, channels_first) for split, of_split in files.items()}
    fingerprint = _fingerprint(*found.values())  # before the labels of the files become classes
    if "test" in found:
        _check_images(found["train"], found["test"], files["test"].images)
    numbers, names, of_labels = _number(found, folder, files, like)
    rest, held_out = found["train"], 0.0
    if "test" not in found:
        rest, found["test"] = rest.split(test_fraction, seed, "--test-fraction")
        held_out = test_fraction
    train, validation = rest.fold(*validation_fold, seed) if validation_fold else rest.split(validation_fraction, seed)
    notes += (*(note for split in files.values() for note in split.notes), *of_labels)
    return Data(train, validation, found["test"], len(numbers), fingerprint, names, numbers, held_out, notes)


def _is_channels_first(folder: Path, path: Path, layout: str, like: Reading | None) -> tuple[bool, tuple[str, ...]]:
    """Return whether images are NxCxHxW, and a note if this was inferred from the shape."""
    shape = read_header(path).shape
    if len(shape) != 4 or layout != "auto":
        return layout == "nchw", ()
    _, first, second, third = shape
    if like and like.image_shape in ((third, first, second), (first, second, third)):
        return like.image_shape == (first, second, third), ()
    if first in CHANNELS and third not in CHANNELS and min(second, third) > max(CHANNELS):
        return True, (f"{folder}: images of {first}x{second}x{third} are read as channels x height x width; if they "
                      "are height x width x channels, give --layout nhwc",)  # fmt: skip
    return False, ()


def _check_images(train: IdxDataset, test: IdxDataset, path: Path) -> None:
    if train.image_shape != test.image_shape or train.images.dtype != test.images.dtype:
        raise UserError(
            f"{path}: test images are {test.images.dtype} {test.image_shape}, but training images are "
            f"{train.images.dtype} {train.image_shape} (channels, height, width): the files do not belong together"
        )


def _number(
    found: dict[str, IdxDataset], folder: Path, files: Mapping[str, SplitFiles], like: Reading | None
) -> tuple[tuple[int, ...], tuple[str, ...], tuple[str, ...]]:
    """Convert the labels in `found` to class indices; return the label and name of each class, and notes."""
    counts = {split: count_labels(dataset.labels, files[split].labels) for split, dataset in found.items()}
    path = files["train"].labels
    in_file = next(filter(None, (read_class_names(folder / sub) for sub in SUBFOLDERS)), None)
    numbers = label_numbers(found["train"].labels, counts["train"], counts.get("test"), in_file, path)
    names = _names(numbers, in_file or _known_names(folder))
    if like and set(numbers) <= set(like.label_numbers):
        numbers = like.label_numbers
    if len(numbers) < 2:
        raise UserError(f"{path}: all labels are {numbers[0]}; training needs at least two classes")
    class_names = tuple(names.get(number, str(number)) for number in numbers)
    renumbered = numbers != tuple(range(len(numbers)))
    notes: tuple[str, ...] = ()
    if renumbered and not like:  # a model's user knows
        notes = (f"{path}: labels {listed(numbers)} become classes 0 to {len(numbers) - 1}, named "
                 f"{listed(class_names)}",)  # fmt: skip
    for split, dataset in found.items():
        check_labels(dataset.labels, counts[split], numbers, files[split].labels)
        if renumbered:
            found[split] = dataset.with_labels(as_classes(dataset.labels, numbers))
    return numbers, class_names, notes


def _names(numbers: tuple[int, ...], names: Sequence[str] | None) -> dict[int, str]:
    """Return names by label: one for each label from 0, or else one for each of `numbers`."""
    if names and (numbers[-1] < len(names) or len(numbers) == len(names)):
        return dict(zip(range(len(names)) if numbers[-1] < len(names) else numbers, names, strict=True))
    return {}


def _known_names(folder: Path) -> tuple[str, ...] | None:
    name = identify(folder)
    return CATALOG[name].class_names if name else None


def open_test50k(folder: Path, data: Data) -> IdxDataset:
    """Open QMNIST's 50 000 further test images, which `data get qmnist` stores next to the four files of `data`.

    Raises:
        UserError: the files are missing, damaged, or do not match `data`.
    """
    files = SplitFiles(folder / "test50k-images-idx3-ubyte", folder / "test50k-labels-idx1-ubyte")
    if not files.images.exists():
        raise UserError(
            f"{folder} has no test50k split ({files.images.name}), which only QMNIST has: run `dist-mnist data get "
            "qmnist` and give its folder as --data-dir"
        )
    dataset = IdxDataset.open(files)
    check_labels(dataset.labels, count_labels(dataset.labels, files.labels), data.label_numbers, files.labels)
    if dataset.image_shape != data.test.image_shape or dataset.images.dtype != data.test.images.dtype:
        raise UserError(f"{files.images}: shape or dtype differs from the test split: the files do not belong together")
    return dataset.with_labels(as_classes(dataset.labels, data.label_numbers))


def _fingerprint(*datasets: IdxDataset) -> str:
    """Return 16 hexadecimal digits over shapes, dtypes and evenly spaced rows of the files; equal for equal data."""
    digest = hashlib.sha256()
    for dataset in datasets:
        total = len(dataset.images)
        rows = np.unique(np.linspace(0, total - 1, min(total, FINGERPRINT_BLOCKS)).astype(np.int64))
        digest.update(f"{dataset.images.shape} {dataset.images.dtype} {dataset.labels.dtype}".encode())
        digest.update(dataset.images[rows].tobytes() + dataset.labels[rows].tobytes())
    return digest.hexdigest()[:16]
