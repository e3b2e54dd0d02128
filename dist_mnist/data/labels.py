"""Labels in any common form: integers or one-hot, numbered from 0 or by arbitrary numbers."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dist_mnist.utils.errors import UserError, short

MAX_CLASSES = 4096  # a confusion matrix of this size easily fits into memory
SCAN = 1 << 20  # labels scanned at once
FEW = 4  # images per typical class from which on a class with a single image is treated as a labelling error


class Counts(NamedTuple):
    """The distinct labels of a file, ascending, and the number of images with each; int64."""

    labels: np.ndarray
    images: np.ndarray


def flat_labels(stored: np.ndarray, path: Path) -> np.ndarray:
    """Return labels (N,) from a file's array: (N,) unchanged, (N, 1) as a view, one-hot (N, K) as uint16 indices.

    Raises:
        UserError: the array is none of these.
    """
    if stored.ndim == 1 or (stored.ndim == 2 and stored.shape[1] == 1):
        if stored.dtype.kind not in "iu":
            raise UserError(
                f"{path}: expected labels as integers in 1 dimension, or one-hot, got {stored.dtype} {stored.shape}"
            )
        return stored.reshape(-1)
    if stored.ndim != 2 or not 2 <= stored.shape[1] <= MAX_CLASSES:
        raise UserError(
            f"{path}: expected labels in 1 dimension, or one-hot in 2 (images, classes), got shape {stored.shape}"
        )
    places = np.empty(len(stored), np.uint16)
    rows_at_once = max(1, SCAN // stored.shape[1])
    for start in range(0, len(stored), rows_at_once):
        rows = np.asarray(stored[start : start + rows_at_once])
        one_hot = ((rows == 0) | (rows == 1)).all(1) & ((rows == 1).sum(1) == 1)
        if not one_hot.all():
            index = int(np.argmin(one_hot))
            raise UserError(
                f"{path}: labels in 2 dimensions {stored.shape} must be one-hot (a single 1 among zeros in each row), "
                f"but row {start + index} is {np.array2string(rows[index], threshold=12)}"
            )
        places[start : start + rows_at_once] = rows.argmax(1)
    return places


def count_labels(labels: np.ndarray, path: Path) -> Counts:
    """Count the images of each distinct label in labels (N,).

    Raises:
        UserError: a label is negative, or there are more than 4096 distinct labels.
    """
    total = dict[int, int]()
    for start in range(0, len(labels), SCAN):
        part = labels[start : start + SCAN]
        if part.min() < 0:
            index = int(np.argmax(part < 0))
            raise UserError(f"{path}: label {part[index]} at index {start + index} is negative: expected 0 or more")
        if part.max() < SCAN:
            counts = np.bincount(part.astype(np.int64))
            found = np.flatnonzero(counts)
            counts = counts[found]
        else:
            found, counts = np.unique(part.astype(np.int64), return_counts=True)
        for label, count in zip(found.tolist(), counts.tolist(), strict=True):
            total[label] = total.get(label, 0) + count
        if len(total) > MAX_CLASSES:
            raise UserError(
                f"{path}: the file has more than {MAX_CLASSES} distinct labels, up to {max(total)}; at most "
                f"{MAX_CLASSES} classes are supported"
            )
    ordered = np.array(sorted(total.items()), np.int64).reshape(-1, 2)
    return Counts(ordered[:, 0], ordered[:, 1])


def label_numbers(
    labels: np.ndarray, train: Counts, test: Counts | None, names: Sequence[str] | None, path: Path
) -> tuple[int, ...]:
    """Return the label in the files of each class, from the training `labels` and their counts.

    Labels that use at least half of the numbers from 0 up are class indices; a class may lack images. Other numbers
    (sparse, or starting at 1) are renumbered in ascending order. If classes.json exists, the number of its `names`
    decides.

    Raises:
        UserError: there are too few or too many names, or a label is so rare that it must be an error.
    """
    used = tuple(train.labels.tolist())
    if names is not None:
        return _as_named(used, len(names), path)
    known = test is None or set(test.labels.tolist()) <= set(used)
    are_indices = 2 * len(used) > used[-1] and used[-1] < MAX_CLASSES
    if are_indices and (used[0] == 0 or not known):
        return tuple(range(used[-1] + 1))
    _check_no_mistake(labels, train, path)
    return used


def _as_named(used: tuple[int, ...], num_names: int, path: Path) -> tuple[int, ...]:
    if num_names > MAX_CLASSES:
        raise UserError(f"{path}: classes.json has {num_names} names; at most {MAX_CLASSES} classes are supported")
    if used[-1] < num_names:
        return tuple(range(num_names))
    if len(used) == num_names:
        return used
    raise UserError(
        f"{path}: the file has {len(used)} distinct labels up to {used[-1]}, but classes.json has {num_names} names, "
        f"for labels 0 to {num_names - 1}: correct one of the files"
    )


def _check_no_mistake(labels: np.ndarray, train: Counts, path: Path) -> None:
    """Raise a UserError for a label that hardly any image has: it is an error, which would become a class."""
    usual = float(np.median(train.images))
    rare = np.flatnonzero(train.images <= max(1, usual / 100))
    if usual < FEW or not rare.size:
        return
    label, images = train.labels[rare[-1]], train.images[rare[-1]]
    raise UserError(
        f"{path}: label {label} (index {int(np.argmax(labels == label))}) has {images} of the images, other labels "
        f"have about {usual:.0f} each, and most numbers up to {train.labels[-1]} are unused; correct this label, or "
        "name all classes in classes.json"
    )


def check_labels(labels: np.ndarray, counts: Counts, numbers: Sequence[int], path: Path) -> None:
    """Raise a UserError for the first label that belongs to no class."""
    if not (strange := sorted(set(counts.labels.tolist()) - set(numbers))):
        return
    index = int(np.flatnonzero(np.isin(labels, strange))[0])
    from_zero = tuple(numbers) == tuple(range(len(numbers)))
    expected = f"0 to {len(numbers) - 1}" if from_zero else listed(numbers)
    raise UserError(
        f"{path}: label {labels[index]} at index {index} is unknown: expected {expected}, the classes of the training "
        "labels"
    )


def as_classes(labels: np.ndarray, numbers: Sequence[int]) -> np.ndarray:
    """Return the class of each label (N,): the label itself, or its index in `numbers` as uint16."""
    if tuple(numbers) == tuple(range(len(numbers))):
        return labels
    classes, ordered = np.empty(len(labels), np.uint16), np.asarray(numbers, np.int64)
    for start in range(0, len(labels), SCAN):
        classes[start : start + SCAN] = np.searchsorted(ordered, labels[start : start + SCAN].astype(np.int64))
    return classes


def listed(values: Sequence[object]) -> str:
    """Return comma-separated values; long lists are abbreviated in the middle."""
    shown = [short(value, 30) for value in values]
    return ", ".join(shown if len(shown) <= 10 else [*shown[:8], "...", shown[-1]])
