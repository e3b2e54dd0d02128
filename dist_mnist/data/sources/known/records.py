"""What is known of a published data set: its files, where they are, and how they become idx files."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, kw_only=True)
class KnownFile:
    """One file as published.

    Args:
        name: on the mirrors and in a folder.
        num_bytes: its size; None where none is published.
        checksum: `sha256:` or, where no other is published, `md5:`, and the hexadecimal digest.
    """

    name: str
    num_bytes: int | None
    checksum: str


class Location(NamedTuple):
    """Where a published array is: in a file, under a name within it if that is an archive (zip or npz)."""

    file: str
    member: str = ""


class Part(NamedTuple):
    """Published images and their labels, of which the rows from `start` up to `stop` are taken."""

    images: Location
    labels: Location
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """How published files become files such as MNIST's, which are what is kept of them.

    Args:
        splits: by the beginning of the idx files' names (train, t10k), the parts that follow one another in them.
        transposed: the published images have rows and columns exchanged; the idx files' stand upright.
        first_label: what the published labels begin with; the idx files' begin with 0.
    """

    splits: Mapping[str, tuple[Part, ...]]
    transposed: bool = False
    first_label: int = 0


@dataclass(frozen=True, kw_only=True)
class KnownDataset:
    """One data set.

    Args:
        class_names: by label.
        mirrors: base URLs (ending in `/`) that hold the files, best first.
        test_labels_sha256: of the unpacked file, which identifies a folder's content; None where it is not known.
        conversion: None for files that are kept as published, MNIST's four.
        note: what a user should know of the idx files, if anything.
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
