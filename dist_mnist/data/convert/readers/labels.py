"""Conversion of labels, whether names or any numbers, to 0 ... n-1, and stratified random sampling."""

import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from dist_mnist.data.labels import MAX_CLASSES
from dist_mnist.data.permutation import Permutation
from dist_mnist.data.sources.classes import FILE_NAME, check_names, is_printable
from dist_mnist.utils.errors import UserError, short, unknown

DIGITS = re.compile(rb"[0-9]+")
WHOLE = re.compile(r"[+-]?[0-9]{1,18}(\.0*)?")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)
INDEX = re.compile(r"[0-9]{1,9}")
MISSING = ("", "nan")


def natural_key(name: bytes) -> bytes:
    """Return a key for natural sorting, with numbers in names by value: `2.png` before `10.png`.

    The name itself, which has no zero byte, follows the key's only zero byte.
    """
    return DIGITS.sub(_numeric_key, name) + b"\0" + name


def _numeric_key(digits: re.Match[bytes]) -> bytes:
    value = digits[0].lstrip(b"0")
    return b"0%c%c" % (len(value) // 255 + 1, len(value) % 255 + 1) + value  # names have at most 4096 bytes


class LabelTable:
    """A table that numbers labels in order of first occurrence, and finally maps the numbers to classes.

    Args:
        where: the source of the labels, for messages.
        known: the class names by label, if the source has them; labels are then indices into these names, or names.
        is_fixed: whether `known` defines the classes of the dataset, including those without pictures.

    Raises:
        UserError: `known` are not valid class names.
    """

    def __init__(self, where: str, known: Sequence[str] | None = None, is_fixed: bool = False):
        if known is not None:
            check_names(where, known)
        self.where, self.is_fixed = where, is_fixed and known is not None
        self._known = tuple(known) if known is not None else None
        self._by_name = {name: label for label, name in enumerate(self._known or ())}
        self._numbers: dict[str, int] = {}

    def number(self, label: str, place: str) -> int:
        """Return the number of a label.

        Raises:
            UserError: the label is invalid, or there are more distinct labels than classes allowed.
        """
        found = self._numbers.get(label)
        return self._enter(label, place) if found is None else found

    def numbers(self, labels: np.ndarray, place: str) -> np.ndarray:
        """Return the numbers (N,) int32 of labels (N,), integers or strings."""
        values, inverse = np.unique(labels, return_inverse=True)
        self._check_count(len(values), place)
        found = [self.number(str(value), place) for value in values.tolist()]
        return np.array(found, np.int32)[inverse.reshape(-1)]

    def _enter(self, label: str, place: str) -> int:
        self._check_count(len(self._numbers) + 1, place)
        self._numbers[label] = len(self._numbers)
        if self._known is not None:
            self._check_known(label, place)
        elif label == "-1":
            raise UserError(
                f"{place}: the label -1 means unlabelled; remove these pictures, or give them another label"
            )
        elif not label.strip() or not is_printable(label):
            raise UserError(f"{place}: the label {short(repr(label))} is empty or unprintable; give it a name")
        return self._numbers[label]

    def _check_count(self, count: int, place: str) -> None:
        if count > MAX_CLASSES:
            raise UserError(
                f"{place}: there are more than {MAX_CLASSES} distinct labels, the limit of a dataset; if these are not "
                "the labels, name their column by --label-column"
            )

    def _check_known(self, label: str, place: str) -> None:
        if not self._is_index(label) and label not in self._by_name:
            raise UserError(
                f"{place}: the label {short(label)} is not one of the {len(self._by_name)} classes in "
                f"{FILE_NAME if self.is_fixed else self.where}"
                f"{'; unlabelled pictures cannot be imported' if label == '-1' else ''}"
            )

    def _is_index(self, label: str) -> bool:
        return INDEX.fullmatch(label) is not None and int(label) < len(self._known or ())

    def _known_indices(self) -> list[int]:
        """Return the index of each label in the known names; labels are all indices or all names."""
        if all(map(self._is_index, self._numbers)):
            return [int(label) for label in self._numbers]
        if numbers := [label for label in self._numbers if label not in self._by_name]:
            others = [label for label in self._numbers if not self._is_index(label)]
            raise UserError(
                f"{self.where}: labels are mixed, some class numbers such as {numbers[0]}, some class names such as "
                f"{short(repr(others[0]))}; use one of both"
            )
        return [self._by_name[label] for label in self._numbers]

    def finish(self) -> tuple[tuple[str, ...], np.ndarray]:
        """Return the class names in order, and for each number the index (n,) of its name.

        Known names keep their order; others are sorted, numbers by value.

        Raises:
            UserError: two names differ only in case, or labels mix indices and names of known classes.
        """
        if self._known is not None:
            indices = np.array(self._known_indices(), np.int32)
            if self.is_fixed:
                return self._known, indices
            used, positions = np.unique(indices, return_inverse=True)
            return tuple(self._known[index] for index in used), positions.astype(np.int32)
        whole = all(WHOLE.fullmatch(label) for label in self._numbers)
        ordered = sorted(self._numbers, key=_whole if whole else lambda label: natural_key(label.encode()))
        _check_case(ordered, self.where)
        places = {label: position for position, label in enumerate(ordered)}
        return tuple(ordered), np.array([places[label] for label in self._numbers], np.int32)


def _whole(label: str) -> int:
    """Return the value of a label that matches WHOLE, such as `3` or `3.0`."""
    return int(label.partition(".")[0])


def _check_case(names: Sequence[str], where: str) -> None:
    """Raise a UserError for `Cat` and `cat`; single letters, such as `A` and `a`, are different classes."""
    seen: dict[str, str] = {}
    for name in names:
        composed = unicodedata.normalize("NFC", name)
        other = seen.setdefault(composed.casefold(), name)
        if other != name and (len(composed) > 1 or unicodedata.normalize("NFC", other) == composed):
            raise UserError(
                f"{where}: the classes {short(repr(other))} and {short(repr(name))} differ only in case or Unicode "
                "encoding; rename or merge them"
            )


def label_of_text(text: str, place: str) -> str:
    """Return the label in a table cell: an integer in canonical form, or a name.

    Raises:
        UserError: the cell is empty, or a number that is not an integer.
    """
    text = text.strip()
    if text.lower() in MISSING:
        raise UserError(f"{place}: the label is missing (the cell has {text!r}); add it, or remove the row")
    if WHOLE.fullmatch(text):
        return str(_whole(text))
    if NUMBER.fullmatch(text):
        raise UserError(
            f"{place}: the label {short(text)} is not an integer; if this is not the label, name the label column by "
            "--label-column"
        )
    return text


def label_array(labels: np.ndarray, place: str) -> np.ndarray:
    """Return the labels in an array as (N,) integers or strings; (N, 1) and one-hot (N, K) labels are converted.

    Raises:
        UserError: labels are not integers or strings, or a picture has several.
    """
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim == 2 and labels.dtype.kind in "biuf":
        ones = labels == 1
        if not (ones.sum(1) == 1).all() or ((labels != 0) & ~ones).any():
            raise UserError(
                f"{place}: a row of its labels {labels.shape} is not one-hot; each picture must have exactly one label"
            )
        return ones.argmax(1)
    if labels.ndim != 1:
        raise UserError(f"{place}: expected labels of shape N, N x 1 or (one-hot) N x K, got {labels.shape}")
    if labels.dtype.kind == "f":
        wrong = np.flatnonzero(~(np.isfinite(labels) & (labels == np.rint(labels)) & (np.abs(labels) < 2**53)))
        if wrong.size:
            raise UserError(f"{place}: the label {labels[wrong[0]]} at index {wrong[0]} is not an integer")
        return labels.astype(np.int64)
    if labels.dtype.kind == "S":
        return np.array([label.decode("utf-8", "backslashreplace") for label in labels.tolist()])
    if labels.dtype.kind not in "biuU":
        raise UserError(f"{place}: expected labels as integers or strings, got {labels.dtype}")
    return labels.astype(np.uint8) if labels.dtype.kind == "b" else labels


def chosen_classes(names: Sequence[str], wanted: Sequence[str] | None) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the wanted class names in the given order, and the new label of each class (n,), -1 for all others.

    Raises:
        UserError: a wanted name is unknown or repeated.
    """
    if wanted is None:
        return tuple(names), np.arange(len(names), dtype=np.int32)
    new_labels = np.full(len(names), -1, np.int32)
    for label, name in enumerate(wanted):
        if name not in names:
            raise UserError(f"--classes: {unknown('class', name, names[:50])}")
        if wanted.index(name) != label:
            raise UserError(f"--classes names {name!r} twice")
        new_labels[names.index(name)] = label
    return tuple(wanted), new_labels


def draw(labels: np.ndarray, total: int, key: tuple[object, ...], least: int = 0, spare: int = 0) -> np.ndarray:
    """Sample about `total` pictures, stratified by class, and return their mask, (N,) bool.

    Args:
        labels: (N,) non-negative integers.
        key: the key of the random numbers; equal keys give equal samples.
        least: smallest number of sampled pictures per class.
        spare: smallest number of pictures per class that are not sampled.
    """
    counts = np.bincount(labels)
    drawn = _apportioned(counts, total, np.minimum(counts, least), np.maximum(counts - spare, 0))
    by_class = np.argsort(labels, kind="stable")
    starts = np.cumsum(counts) - counts
    chosen = np.zeros(len(labels), bool)
    for label in np.flatnonzero(drawn):
        places = Permutation(int(counts[label]), *key, label)(np.arange(drawn[label]))
        chosen[by_class[starts[label] + places]] = True
    return chosen


def _apportioned(counts: np.ndarray, total: int, least: np.ndarray, most: np.ndarray) -> np.ndarray:
    """Return the number of pictures per class, by the largest-remainder method, within the limits of each class."""
    shares = counts * total / max(counts.sum(), 1)
    drawn = np.floor(shares).astype(np.int64)
    order = np.argsort(drawn - shares, kind="stable")
    drawn[order[: total - int(drawn.sum())]] += 1
    drawn = np.clip(drawn, least, most)
    while drawn.sum() > total and (drawn > least).any():
        drawn[np.where(drawn > least, drawn, 0).argmax()] -= 1
    return drawn
