"""The description of a folder of idx files, for `dist-mnist data info`."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from dist_mnist.data.convert.summary import RECORD, Progress, count_duplicates, no_progress, records_of
from dist_mnist.data.dataset import IdxDataset
from dist_mnist.data.idx import CHUNK
from dist_mnist.data.sources.contact_sheet import contact_sheet
from dist_mnist.data.splits import open_data
from dist_mnist.utils.errors import warn


def describe(folder: Path, seen: Path | None = None, progress: Progress = no_progress) -> dict[str, object]:
    """Describe a folder of idx files as JSON values; `seen`: write a contact sheet of training images there.

    Duplicates are images with equal pixels, whatever their labels; the first of each in a split is not counted.

    Raises:
        UserError: as `open_data`, except that test files may be missing; or the contact sheet cannot be written.
    """
    data = open_data(folder, need_test=False)
    for note in data.notes:
        warn(note)
    mean, deviation = data.train.pixel_statistics()
    if seen:
        contact_sheet(data.train.images, data.train.labels, data.class_names, seen)
    return {
        "training images": len(data.train),
        "test images": len(data.test),
        "image shape (channels, height, width)": list(data.train.image_shape),
        "dtype": data.train.images.dtype.name,
        "classes": data.num_classes,
        "class names": list(data.class_names),
        "images per class (training)": _per_class(data.train, data.num_classes),
        "images per class (test)": _per_class(data.test, data.num_classes),
        **_survey(data.train, data.test, progress),
        "pixel mean": mean.tolist(),
        "pixel standard deviation": deviation.tolist(),
        "bytes": (len(data.train) + len(data.test)) * data.train.images[0].nbytes,
        "fingerprint": data.fingerprint,
    }


def _per_class(dataset: IdxDataset, num_classes: int) -> list[int]:
    return np.bincount(dataset.sample_labels, minlength=num_classes).tolist()


def _survey(train: IdxDataset, test: IdxDataset, progress: Progress) -> dict[str, int]:
    """Count duplicate images, also across splits or with different labels, and blank images."""
    total = len(train) + len(test)
    of_train = _records(train, lambda done: progress(done, total))
    of_test = _records(test, lambda done: progress(len(train) + done, total))
    found = count_duplicates(of_train, of_test)
    return {
        "duplicates (training)": found.in_training,
        "duplicates (test)": found.in_test,
        "test images that are in training, too": found.between,
        "images that have another label, too": found.of_other_classes,
        "blank images (training)": int(of_train["blank"].sum()),
        "blank images (test)": int(of_test["blank"].sum()),
    }


def _records(dataset: IdxDataset, progress: Callable[[int], object]) -> np.ndarray:
    """Return a RECORD of each sample (N,), reading about a megabyte at a time."""
    records = np.empty(len(dataset), RECORD)
    step = max(1, CHUNK // dataset.images[0].nbytes)
    for start in range(0, len(dataset), step):
        samples = dataset.__getitems__(np.arange(start, min(start + step, len(dataset))))
        records[start : start + step] = records_of(samples.images, samples.labels)
        progress(start + len(samples.ids))
    return records
