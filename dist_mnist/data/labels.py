"""Labels as people have them: in one column or one-hot, numbered from 0 or by whatever numbers they chose."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dist_mnist.utils.errors import UserError, short

MAX_CLASSES = 4096  # of which a confusion matrix still fits into memory with ease
SCAN = 1 << 20  # labels looked at in one go
FEW = 4  # images of most classes, from which on a class of a single image is taken for a mistake


class Counts(NamedTuple):
    """The different labels of a file, ascending, and how many images have each; int64."""

    labels: np.ndarray
    images: np.ndarray


def flat_labels(stored: np.ndarray, path: Path) -> np.ndarray:
    """Labels (N,) from those of a file: the same where they are (N,), a view of (N, 1), and the 1's places in one-hot
    (N, K), uint16.

    Raises:
        UserError: they are none of these.
    """
    if stored.ndim == 1 or (stored.ndim == 2 and stored.shape[1] == 1):
        if stored.dtype.kind not in "iu":
            raise UserError(
                f"{path}: labels are integers in 1 dimension, or one-hot, not {stored.dtype} {stored.shape}"
            )
        return stored.reshape(-1)
    if stored.ndim != 2 or not 2 <= stored.shape[1] <= MAX_CLASSES:
        raise UserError(
            f"{path}: labels are integers in 1 dimension, or one-hot in 2 (images, classes), not {stored.shape}"
        )
    places = np.empty(len(stored), np.uint16)
    rows_at_once = max(1, SCAN // stored.shape[1])
    for start in range(0, len(stored), rows_at_once):
        rows = np.asarray(stored[start : start + rows_at_once])
        one_hot = ((rows == 0) | (rows == 1)).all(1) & ((rows == 1).sum(1) == 1)
        if not one_hot.all():
            index = int(np.argmin(one_hot))
            raise UserError(
                f"{path}: labels in 2 dimensions {stored.shape} have to be one-hot, a single 1 among zeros in a row; "
                f"row {start + index} is {np.array2string(rows[index], threshold=12)}"
            )
        places[start : start + rows_at_once] = rows.argmax(1)
    return places


def count_labels(labels: np.ndarray, path: Path) -> Counts:
    """The different labels (N,) and their numbers of images.

    Raises:
        UserError: one is negative, or they are more than 4096.
    """
    total = dict[int, int]()
    for start in range(0, len(labels), SCAN):
        part = labels[start : start + SCAN]
        if part.min() < 0:
            index = int(np.argmax(part < 0))
            raise UserError(f"{path}: label {part[index]} at index {start + index} is out of range: expected 0 or more")
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
                f"{path}: it has more than {MAX_CLASSES} different labels, up to {max(total)}; at most {MAX_CLASSES} "
                "classes can be trained"
            )
    ordered = np.array(sorted(total.items()), np.int64).reshape(-1, 2)
    return Counts(ordered[:, 0], ordered[:, 1])


def label_numbers(
    labels: np.ndarray, train: Counts, test: Counts | None, names: Sequence[str] | None, path: Path
) -> tuple[int, ...]:
    """The label in the files of each class, from the training `labels` and how many there are of each.

    Labels that use half of the numbers from 0 on are classes themselves: a class may be without images. Other numbers,
    few of many or beginning with 1, are names of classes, in ascending order. `names`, those of classes.json, say by
    their number which it is.

    Raises:
        UserError: names are too few or too many; or a label seems to be a mistake, as hardly an image has it.
    """
    used = tuple(train.labels.tolist())
    if names is not None:
        return _as_named(used, len(names), path)
    known = test is None or set(test.labels.tolist()) <= set(used)
    as_they_are = 2 * len(used) > used[-1] and used[-1] < MAX_CLASSES
    if as_they_are and (used[0] == 0 or not known):
        return tuple(range(used[-1] + 1))
    _check_no_mistake(labels, train, path)
    return used


def _as_named(used: tuple[int, ...], num_names: int, path: Path) -> tuple[int, ...]:
    if num_names > MAX_CLASSES:
        raise UserError(f"{path}: classes.json has {num_names} names; at most {MAX_CLASSES} classes can be trained")
    if used[-1] < num_names:
        return tuple(range(num_names))
    if len(used) == num_names:
        return used
    raise UserError(
        f"{path}: its labels are {len(used)} different numbers up to {used[-1]}, and classes.json has {num_names} "
        f"names, by labels 0 to {num_names - 1}: correct one of the files"
    )


def _check_no_mistake(labels: np.ndarray, train: Counts, path: Path) -> None:
    """One wrong label would be a class of its own: hardly an image has it, where the other classes have many."""
    usual = float(np.median(train.images))
    rare = np.flatnonzero(train.images <= max(1, usual / 100))
    if usual < FEW or not rare.size:
        return
    label, images = train.labels[rare[-1]], train.images[rare[-1]]
    raise UserError(
        f"{path}: label {label} (index {int(np.argmax(labels == label))}) has {images} of the images, where others "
        f"have some {usual:.0f} each, and most numbers up to {train.labels[-1]} have none; correct that label, or name "
        "all classes in classes.json"
    )


def check_labels(labels: np.ndarray, counts: Counts, numbers: Sequence[int], path: Path) -> None:
    """Raise a UserError at the first label that no class has."""
    if not (strange := sorted(set(counts.labels.tolist()) - set(numbers))):
        return
    index = int(np.flatnonzero(np.isin(labels, strange))[0])
    from_zero = tuple(numbers) == tuple(range(len(numbers)))
    expected = f"0 to {len(numbers) - 1}" if from_zero else listed(numbers)
    raise UserError(
        f"{path}: label {labels[index]} at index {index} is out of range: expected {expected}, the classes of the "
        "training labels"
    )


def as_classes(labels: np.ndarray, numbers: Sequence[int]) -> np.ndarray:
    """The class of each label (N,): itself, or its place in `numbers`, uint16."""
    if tuple(numbers) == tuple(range(len(numbers))):
        return labels
    classes, ordered = np.empty(len(labels), np.uint16), np.asarray(numbers, np.int64)
    for start in range(0, len(labels), SCAN):
        classes[start : start + SCAN] = np.searchsorted(ordered, labels[start : start + SCAN].astype(np.int64))
    return classes


def listed(values: Sequence[object]) -> str:
    """Numbers or names with commas between them; of many, the first and the last."""
    shown = [short(value, 30) for value in values]
    return ", ".join(shown if len(shown) <= 10 else [*shown[:8], "...", shown[-1]])
