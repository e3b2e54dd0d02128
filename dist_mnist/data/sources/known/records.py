"""The description of a published dataset: its files, its mirrors, and the conversion to idx files."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, kw_only=True)
class KnownFile:
    """One published file.

    Args:
        name: its name on the mirrors and in a folder.
        num_bytes: its size; None if unpublished.
        checksum: `sha256:`, or `md5:` if no other is published, followed by the hexadecimal digest.
    """

    name: str
    num_bytes: int | None
    checksum: str


class Location(NamedTuple):
    """The location of a published array: a file, and the member if the file is an archive (zip or npz)."""

    file: str
    member: str = ""


class Part(NamedTuple):
    """Published images and their labels; the rows from `start` to `stop` are used."""

    images: Location
    labels: Location
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """The conversion of published files to idx files like MNIST's, which replace them.

    Args:
        splits: the successive parts of each split, by the prefix of its idx files (train, t10k).
        transposed: whether published images have rows and columns swapped; the idx files do not.
        first_label: the smallest published label; labels in the idx files start at 0.
    """

    splits: Mapping[str, tuple[Part, ...]]
    transposed: bool = False
    first_label: int = 0


@dataclass(frozen=True, kw_only=True)
class KnownDataset:
    """One dataset.

    Args:
        class_names: class names by label.
        mirrors: base URLs (ending in `/`) of the files, best first.
        test_labels_sha256: SHA-256 of the unpacked test labels, which identifies a folder's dataset; None if unknown.
        conversion: how to convert the files; None if they are already MNIST's four files.
        note: remark for users of the idx files, if any.
    """

    name: str
    class_names: tuple[str, ...]
    mirrors: tuple[str, ...]
    files: tuple[KnownFile, ...]
    test_labels_sha256: str | None = None
    conversion: Conversion | None = None
    note: str = ""

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)
