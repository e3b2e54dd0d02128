"""What every source is once it has been opened: classes, and parts whose pictures are read in pieces of work."""

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
    """By which a change of a file shows."""

    path: Path
    num_bytes: int
    modified_ns: int

    @classmethod
    def of(cls, path: Path) -> "FileState":
        """The state of a file now."""
        with os_error_as(f"{path}: cannot be read"):
            status = path.stat()
        return cls(path, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class Part:
    """One split of a source: the number of each picture's class, (N,) int32, and how to read some of the pictures.

    `work(keep, size)` gives the pictures of `keep` (N,) bool in order, in pieces of at most `size`.
    """

    labels: np.ndarray
    work: Callable[[np.ndarray, int], Iterator[Work]]


@dataclass(frozen=True)
class Source:
    """What is to be imported: its kind in a few words, the names of its classes by number, its parts, and remarks."""

    kind: str
    classes: tuple[str, ...]
    parts: Mapping[Split, Part]
    notes: tuple[str, ...] = ()
    is_fixed: bool = False  # whether its classes.json says what the classes are, also those that no picture has
    white: float | None = None  # the value that became 255; None: the pictures differ
    files: tuple[FileState, ...] = ()  # that are read twice, as they were before: for the labels, then for the pixels

    def check_unchanged(self) -> None:
        """Raise a UserError if a file has changed: its labels and pixels might not belong together."""
        for state in self.files:
            if FileState.of(state.path) != state:
                raise UserError(f"{state.path} has changed while it was read; start again when it is finished")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a user says of how a source is to be read."""

    size: tuple[int, int] | None = None  # height, width
    layout: Layout | None = None
    label_column: str | None = None
    pixel_max: float | None = None  # the value that is white


def split_of(name: str) -> Split | None:
    """The split that a file's, a folder's or an array's name tells, such as `x_train` or `test-00000-of-00001`."""
    found = IN_NAME.search(name)
    return SPLIT_WORDS[found[1].lower()] if found else None


def finished(
    kind: str,
    table: LabelTable,
    parts: Mapping[Split, Sequence[Part]],
    notes: Sequence[str] = (),
    white: float | None = None,
) -> Source:
    """A source of parts whose labels are numbers of `table`; the parts of a split follow one another."""
    names, order = table.finish()
    joined = {
        split: join([Part(order[part.labels], part.work) for part in some]) for split, some in parts.items() if some
    }
    if not any(len(part.labels) for part in joined.values()):
        raise UserError(f"{table.where}: there are no pictures in it")
    return Source(kind, names, joined, tuple(notes), table.is_fixed, white)


def join(parts: Sequence[Part]) -> Part:
    """Parts that follow one another as one."""
    if len(parts) == 1:
        return parts[0]
    ends = np.cumsum([len(part.labels) for part in parts])

    def work(keep: np.ndarray, size: int) -> Iterator[Work]:
        for part, kept in zip(parts, np.split(keep, ends[:-1]), strict=True):
            yield from part.work(kept, size)

    return Part(np.concatenate([part.labels for part in parts]), work)


def batched(items: Iterable[T], size: int) -> Iterator[tuple[T, ...]]:
    """Items in tuples of at most `size`, as itertools.batched of Python 3.12 gives them."""
    rest = iter(items)
    while batch := tuple(islice(rest, size)):
        yield batch
