"""The common interface of opened sources: classes, and splits whose pictures are read in work items."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from dist_mnist.data.convert.choices import Layout, Split
from dist_mnist.data.convert.pictures import Work
from dist_mnist.data.convert.readers.labels import LabelTable
from dist_mnist.utils.errors import UserError, os_error_as

T = TypeVar("T")


SPLIT_WORDS = {
    "train": Split.TRAIN, "training": Split.TRAIN, "trn": Split.TRAIN,
    "test": Split.TEST, "testing": Split.TEST, "tst": Split.TEST, "t10k": Split.TEST,
    "val": Split.VALIDATION, "valid": Split.VALIDATION, "validation": Split.VALIDATION, "dev": Split.VALIDATION,
}  # fmt: skip
IN_NAME = re.compile(rf"(?:^|[^a-z])[xy]?({'|'.join(SPLIT_WORDS)})(?![a-z])", re.IGNORECASE)


class FileState(NamedTuple):
    """Size and modification time of a file, to detect changes."""

    path: Path
    num_bytes: int
    modified_ns: int

    @classmethod
    def of(cls, path: Path) -> "FileState":
        """Return the current state of a file."""
        with os_error_as(f"{path}: cannot be read"):
            status = path.stat()
        return cls(path, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class Part:
    """One split of a source: the class number of each picture, (N,) int32, and a way to read selected pictures.

    `work(keep, size)` yields the pictures selected by `keep` (N,) bool in order, in work items of at most `size`.
    """

    labels: np.ndarray
    work: Callable[[np.ndarray, int], Iterator[Work]]


@dataclass(frozen=True)
class Source:
    """A source to import: a short name of its kind, its class names by number, its splits, and notes for the user."""

    kind: str
    classes: tuple[str, ...]
    parts: Mapping[Split, Part]
    notes: tuple[str, ...] = ()
    is_fixed: bool = False  # whether its classes.json defines the classes, including those without pictures
    white: float | None = None  # the value that became 255; None: it varies between pictures
    files: tuple[FileState, ...] = ()  # initial states of files that are read twice, for labels and for pixels

    def check_unchanged(self) -> None:
        """Raise a UserError if a file has changed, because labels and pixels might not match."""
        for state in self.files:
            if FileState.of(state.path) != state:
                raise UserError(f"{state.path} has changed while it was read; import it when it is complete")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Options for reading a source."""

    size: tuple[int, int] | None = None  # height, width
    layout: Layout | None = None
    label_column: str | None = None
    pixel_max: float | None = None  # the pixel value of white


def split_of(name: str) -> Split | None:
    """Return the split named by a file, folder or array name, such as `x_train` or `test-00000-of-00001`, or None."""
    found = IN_NAME.search(name)
    return SPLIT_WORDS[found[1].lower()] if found else None


def finished(
    kind: str,
    table: LabelTable,
    parts: Mapping[Split, Sequence[Part]],
    notes: Sequence[str] = (),
    white: float | None = None,
) -> Source:
    """Return the source of parts whose labels are numbers in `table`; the parts of a split are concatenated."""
    names, order = table.finish()
    joined = {
        split: join([Part(order[part.labels], part.work) for part in some]) for split, some in parts.items() if some
    }
    if not any(len(part.labels) for part in joined.values()):
        raise UserError(f"{table.where}: no pictures found")
    return Source(kind, names, joined, tuple(notes), table.is_fixed, white)


def join(parts: Sequence[Part]) -> Part:
    """Concatenate parts."""
    if len(parts) == 1:
        return parts[0]
    ends = np.cumsum([len(part.labels) for part in parts])

    def work(keep: np.ndarray, size: int) -> Iterator[Work]:
        for part, kept in zip(parts, np.split(keep, ends[:-1]), strict=True):
            yield from part.work(kept, size)

    return Part(np.concatenate([part.labels for part in parts]), work)


def batched(items: Iterable[T], size: int) -> Iterator[tuple[T, ...]]:
    """Yield items in tuples of at most `size`, as itertools.batched of Python 3.12 does."""
    rest = iter(items)
    while batch := tuple(islice(rest, size)):
        yield batch
