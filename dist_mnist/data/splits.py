"""The training, validation and test splits of a folder of idx files, checked and counted."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dist_mnist.data.dataset import IdxDataset
from dist_mnist.data.idx import CHUNK
from dist_mnist.data.sources.catalog import CATALOG
from dist_mnist.data.sources.classes import read_class_names
from dist_mnist.data.sources.contact_sheet import contact_sheet
from dist_mnist.data.sources.files import SplitFiles, find_files
from dist_mnist.data.sources.resolve import identify
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


def describe(folder: Path, seen: Path | None = None) -> dict[str, object]:
    """What a folder of idx files holds, as JSON values; with `seen`, a contact sheet of training images goes there.

    Duplicates are images of the same pixels, whatever their labels; of those in one split, the first is not counted.

    Raises:
        UserError: as `open_data`; or the contact sheet cannot be written.
    """
    data = open_data(folder, 0, 0)
    names = class_names(folder, data.num_classes)
    mean, deviation = data.train.pixel_statistics()
    if seen:
        contact_sheet(data.train.images, data.train.labels, names, seen)
    return {
        "training images": len(data.train),
        "test images": len(data.test),
        "image shape (channels, height, width)": list(data.train.image_shape),
        "dtype": data.train.images.dtype.name,
        "classes": data.num_classes,
        "class names": list(names),
        "images per class (training)": np.bincount(data.train.labels, minlength=data.num_classes).tolist(),
        "images per class (test)": np.bincount(data.test.labels, minlength=data.num_classes).tolist(),
        **_survey(data.train, data.test),
        "pixel mean": mean.tolist(),
        "pixel standard deviation": deviation.tolist(),
        "bytes": data.train.images.nbytes + data.test.images.nbytes,
        "fingerprint": data.fingerprint,
    }


def class_names(folder: Path, num_classes: int) -> tuple[str, ...]:
    """The names by label: of classes.json, or of the known data set that a folder holds, else the labels."""
    known = identify(folder)
    names = read_class_names(folder) or (CATALOG[known].class_names if known else ())
    return names if len(names) >= num_classes else tuple(map(str, range(num_classes)))


def _survey(train: IdxDataset, test: IdxDataset) -> dict[str, int]:
    """Counts of what deserves a look: images that are there twice, also in both splits or with two labels; blanks."""
    (train_hashes, train_blank), (test_hashes, test_blank) = _hashes(train), _hashes(test)
    hashes = np.concatenate([train_hashes, test_hashes])
    labels = np.concatenate([np.asarray(dataset.labels, np.int64) for dataset in (train, test)])
    order = np.lexsort((labels, hashes))
    hashes, labels = hashes[order], labels[order]
    first = np.flatnonzero(np.append(True, hashes[1:] != hashes[:-1]))
    sizes = np.diff(np.append(first, len(hashes)))
    contradictory = labels[first] != labels[first + sizes - 1]
    return {
        "duplicates (training)": len(train_hashes) - len(np.unique(train_hashes)),
        "duplicates (test)": len(test_hashes) - len(np.unique(test_hashes)),
        "test images that are in training, too": int(np.isin(test_hashes, train_hashes).sum()),
        "images that have another label, too": int(sizes[contradictory].sum()),
        "blank images (training)": train_blank,
        "blank images (test)": test_blank,
    }


def _hashes(dataset: IdxDataset) -> tuple[np.ndarray, int]:
    """A hash of each image's pixels, (N,) uint64, and how many images have pixels of one value alone."""
    hashes, num_blank = np.empty(len(dataset), np.uint64), 0
    step = max(1, CHUNK // dataset.images[0].nbytes)
    for start in range(0, len(dataset), step):
        images = dataset.__getitems__(np.arange(start, min(start + step, len(dataset)))).images
        images = images.reshape(len(images), -1)
        digests = b"".join(hashlib.blake2b(image.data, digest_size=8).digest() for image in images)
        hashes[start : start + len(images)] = np.frombuffer(digests, np.uint64)
        num_blank += int((images == images[:, :1]).all(1).sum())
    return hashes, num_blank


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
