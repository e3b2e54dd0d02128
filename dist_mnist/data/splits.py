"""The training, validation and test splits of a folder of idx files, checked and counted."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dist_mnist.data.dataset import IdxDataset
from dist_mnist.data.sources.files import SplitFiles, find_files
from dist_mnist.utils.errors import UserError

MAX_CLASSES = 4096  # of which a confusion matrix still fits into memory with ease


SCAN = 1 << 20  # labels looked at in one go


FINGERPRINT_BLOCKS = 256


class Data(NamedTuple):
    """All that a run reads: its three splits, the number of classes, and a fingerprint of the files."""

    train: IdxDataset
    validation: IdxDataset
    test: IdxDataset
    num_classes: int
    fingerprint: str


def open_data(folder: str | Path, validation_fraction: float = 0.0, seed: int | None = 0, stage: bool = False) -> Data:
    """Open a folder of idx files (with `stage`, copies on this machine) and hold its parts against each other.

    Validation images are drawn by the seed; without one they are the last of the file.

    Raises:
        UserError: see `find_files` and `IdxDataset`; or labels of the test set lie beyond those of the training set, or
            its images have another shape or dtype.
    """
    files = find_files(Path(folder), stage)
    whole, test = IdxDataset.open(files["train"]), IdxDataset.open(files["test"])
    num_classes = len(_count_labels(whole, files["train"].labels))
    _count_labels(test, files["test"].labels, num_classes)
    if whole.image_shape != test.image_shape or whole.images.dtype != test.images.dtype:
        raise UserError(
            f"{files['test'].images}: its images are {test.images.dtype} {test.image_shape}, those for training "
            f"{whole.images.dtype} {whole.image_shape} (channels, height, width): they do not belong together"
        )
    if num_classes < 2:
        raise UserError(f"{files['train'].labels}: all labels are 0; training needs two classes or more")
    train, validation = whole.split(validation_fraction, seed)
    return Data(train, validation, test, num_classes, _fingerprint(whole, test))


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
    _count_labels(dataset, files.labels, data.num_classes)
    if dataset.image_shape != data.test.image_shape or dataset.images.dtype != data.test.images.dtype:
        raise UserError(f"{files.images}: its images are unlike those of the test split: they do not belong together")
    return dataset


def describe(folder: Path) -> dict[str, object]:
    """What a folder of idx files holds, as JSON values.

    Raises:
        UserError: as `open_data`.
    """
    data = open_data(folder, 0, 0)
    mean, deviation = data.train.pixel_statistics()
    return {
        "training images": len(data.train),
        "test images": len(data.test),
        "image shape (channels, height, width)": list(data.train.image_shape),
        "dtype": data.train.images.dtype.name,
        "classes": data.num_classes,
        "images per class (training)": np.bincount(data.train.labels, minlength=data.num_classes).tolist(),
        "images per class (test)": np.bincount(data.test.labels, minlength=data.num_classes).tolist(),
        "pixel mean": mean.tolist(),
        "pixel standard deviation": deviation.tolist(),
        "bytes": data.train.images.nbytes + data.test.images.nbytes,
        "fingerprint": data.fingerprint,
    }


def _count_labels(dataset: IdxDataset, path: Path, num_classes: int | None = None) -> np.ndarray:
    """Images of each class, (classes,), after checking all labels against `num_classes`; None: labels tell how many."""
    limit = num_classes or MAX_CLASSES
    counts = np.zeros(limit, np.int64)
    for start in range(0, len(dataset.labels), SCAN):
        labels = dataset.labels[start : start + SCAN]
        wrong = np.flatnonzero((labels < 0) | (labels >= limit))
        if wrong.size:
            raise UserError(
                f"{path}: label {labels[wrong[0]]} at index {start + wrong[0]} is out of range: expected 0 to "
                f"{limit - 1}{', the classes of the training labels' if num_classes else ''}"
            )
        counts += np.bincount(labels.astype(np.int64), minlength=limit)
    if num_classes is None:
        counts = np.trim_zeros(counts, "b")
        if 2 * np.count_nonzero(counts) < len(counts):
            last = len(counts) - 1
            raise UserError(
                f"{path}: the largest label is {last} (index {np.flatnonzero(dataset.labels == last)[0]}), but most of "
                f"the {len(counts)} classes up to it have no image; correct that label, or number the classes from 0"
            )
    return counts


def _fingerprint(*datasets: IdxDataset) -> str:
    """16 hexadecimal digits over the shapes, dtypes and evenly chosen rows of the files; equal for equal data."""
    digest = hashlib.sha256()
    for dataset in datasets:
        total = len(dataset.images)
        rows = np.unique(np.linspace(0, total - 1, min(total, FINGERPRINT_BLOCKS)).astype(np.int64))
        digest.update(f"{dataset.images.shape} {dataset.images.dtype} {dataset.labels.dtype}".encode())
        digest.update(dataset.images[rows].tobytes() + dataset.labels[rows].tobytes())
    return digest.hexdigest()[:16]
