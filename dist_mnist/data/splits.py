"""The training, validation and test splits of a folder of idx files, checked and counted."""

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
CHANNELS = (1, 3, 4)  # of images as people have them


class Reading(NamedTuple):
    """How the files of a model's data were read: channels, height and width, and the label of each class."""

    image_shape: tuple[int, int, int]
    label_numbers: tuple[int, ...]


class Data(NamedTuple):
    """All that a run reads: its three splits, its classes, and a fingerprint of the files.

    `label_numbers` are the classes' labels in the files, usually 0 to n - 1; `class_names` are those of classes.json or
    of a known dataset, or else these numbers. `test_fraction` is that of the training images which are the test split,
    0 where there are test files. `notes` say what a user should know of how the files were read.

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
    """Open a folder of idx files (with `stage`, copies on this machine) and check that its parts belong together.

    Validation images are drawn by the seed; without one they are the last of the file.

    Args:
        validation_fold: a fold from 0 and their number, instead of the fraction: see `IdxDataset.fold`.
        test_fraction: of the training images, held out in the same way where there are no test files.
        need_test: without it and a `test_fraction`, the test split of a folder without test files is empty.
        layout: of images in 4 dimensions: "nhwc", "nchw", or "auto" for what their shape tells.
        like: how a model's data were read, which decides where these files may be read in several ways.

    Raises:
        UserError: see `find_files` and `IdxDataset`; or labels of the test set are not among those of the training set,
            its images have another shape or dtype, or classes.json does not suit the labels.

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
    """Whether images are NxCxHxW; and what is to be said where their shape alone tells so."""
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
            f"{path}: its images are {test.images.dtype} {test.image_shape}, those for training {train.images.dtype} "
            f"{train.image_shape} (channels, height, width): they do not belong together"
        )


def _number(
    found: dict[str, IdxDataset], folder: Path, files: Mapping[str, SplitFiles], like: Reading | None
) -> tuple[tuple[int, ...], tuple[str, ...], tuple[str, ...]]:
    """Make classes of the labels in `found`; gives each class's label and name, and what is to be said of that."""
    counts = {split: count_labels(dataset.labels, files[split].labels) for split, dataset in found.items()}
    path = files["train"].labels
    in_file = next(filter(None, (read_class_names(folder / sub) for sub in SUBFOLDERS)), None)
    numbers = label_numbers(found["train"].labels, counts["train"], counts.get("test"), in_file, path)
    names = _names(numbers, in_file or _known_names(folder))
    if like and set(numbers) <= set(like.label_numbers):
        numbers = like.label_numbers
    if len(numbers) < 2:
        raise UserError(f"{path}: all labels are {numbers[0]}; training needs two classes or more")
    class_names = tuple(names.get(number, str(number)) for number in numbers)
    renumbered = numbers != tuple(range(len(numbers)))
    notes: tuple[str, ...] = ()
    if renumbered and not like:  # who has a model knows
        notes = (f"{path}: its labels {listed(numbers)} become classes 0 to {len(numbers) - 1}, called "
                 f"{listed(class_names)}",)  # fmt: skip
    for split, dataset in found.items():
        check_labels(dataset.labels, counts[split], numbers, files[split].labels)
        if renumbered:
            found[split] = dataset.with_labels(as_classes(dataset.labels, numbers))
    return numbers, class_names, notes


def _names(numbers: tuple[int, ...], names: Sequence[str] | None) -> dict[int, str]:
    """Names by label: they count from label 0, or else are in the order of `numbers`."""
    if names and (numbers[-1] < len(names) or len(numbers) == len(names)):
        return dict(zip(range(len(names)) if numbers[-1] < len(names) else numbers, names, strict=True))
    return {}


def _known_names(folder: Path) -> tuple[str, ...] | None:
    name = identify(folder)
    return CATALOG[name].class_names if name else None


def open_test50k(folder: Path, data: Data) -> IdxDataset:
    """QMNIST's 50 000 test images beyond MNIST's, which `data get qmnist` puts beside the four files of `data`.

    Raises:
        UserError: they are not there, are damaged, or do not belong to `data`.
    """
    files = SplitFiles(folder / "test50k-images-idx3-ubyte", folder / "test50k-labels-idx1-ubyte")
    if not files.images.exists():
        raise UserError(
            f"{folder} has no test50k split ({files.images.name}); QMNIST has one: give --data-dir the folder of "
            "`dist-mnist data get qmnist`"
        )
    dataset = IdxDataset.open(files)
    check_labels(dataset.labels, count_labels(dataset.labels, files.labels), data.label_numbers, files.labels)
    if dataset.image_shape != data.test.image_shape or dataset.images.dtype != data.test.images.dtype:
        raise UserError(f"{files.images}: its images are unlike those of the test split: they do not belong together")
    return dataset.with_labels(as_classes(dataset.labels, data.label_numbers))


def _fingerprint(*datasets: IdxDataset) -> str:
    """16 hexadecimal digits over the shapes, dtypes and evenly chosen rows of the files; equal for equal data."""
    digest = hashlib.sha256()
    for dataset in datasets:
        total = len(dataset.images)
        rows = np.unique(np.linspace(0, total - 1, min(total, FINGERPRINT_BLOCKS)).astype(np.int64))
        digest.update(f"{dataset.images.shape} {dataset.images.dtype} {dataset.labels.dtype}".encode())
        digest.update(dataset.images[rows].tobytes() + dataset.labels[rows].tobytes())
    return digest.hexdigest()[:16]
