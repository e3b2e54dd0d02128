"""The summary of an import, and the counts of duplicate and blank images, also for `data info`."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

RECORD = np.dtype([("label", np.int32), ("hash", np.uint64), ("blank", np.bool_)])  # one per image
Progress = Callable[[int, int], object]  # called with the number of finished images and their total


@dataclass(frozen=True)
class ClassCount:
    """The numbers of images of a class."""

    name: str
    train: int
    test: int


@dataclass(frozen=True)
class SizeCount:
    """The number of source pictures of one size and number of channels (1: gray, 3: RGB)."""

    height: int
    width: int
    channels: int
    pictures: int


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What was imported, and what is worth checking.

    Duplicates are images with equal pixels. The most frequent sizes and the first unusable files are listed.
    """

    folder: str
    source: str
    image_shape: tuple[int, int, int]  # height, width, channels
    training_images: int
    test_images: int
    classes: tuple[ClassCount, ...]
    source_sizes: tuple[SizeCount, ...]
    other_sizes: int
    duplicates_in_training: int  # without the first of each set of equal images
    duplicates_in_test: int
    test_images_in_training: int
    duplicates_of_other_classes: int  # images that also occur with another label
    blank_images: int
    unusable_pictures: int
    unusable: tuple[str, ...]
    notes: tuple[str, ...]
    contact_sheet: str


@dataclass(frozen=True)
class Duplicates:
    """Counts of images that are equal, pixel for pixel."""

    in_training: int
    in_test: int
    between: int
    of_other_classes: int


def no_progress(done: int, total: int) -> None:
    """Do nothing: the no-op Progress."""


def records_of(images: np.ndarray, labels: np.ndarray | int) -> np.ndarray:
    """Return a RECORD of each image (n, ...) of any dtype: label, hash of the pixels, whether it is blank."""
    flat = np.ascontiguousarray(images).reshape(len(images), math.prod(images.shape[1:]))
    records = np.empty(len(flat), RECORD)
    digests = b"".join(hashlib.blake2b(image.data, digest_size=8).digest() for image in flat)
    records["label"], records["hash"] = labels, np.frombuffer(digests, "<u8")
    records["blank"] = (flat == flat[:, :1]).all(1)
    return records


def count_duplicates(train: np.ndarray, test: np.ndarray) -> Duplicates:
    """Count duplicates by the pixel hashes in two arrays of RECORD."""
    in_train, in_test = np.unique(train["hash"]), np.unique(test["hash"])
    everything = np.concatenate([train, test])
    order = np.lexsort((everything["label"], everything["hash"]))
    hashes, labels = everything["hash"][order], everything["label"][order]
    starts = np.flatnonzero(np.concatenate([[True], hashes[1:] != hashes[:-1]]))
    sizes = np.diff(np.append(starts, len(hashes)))
    contradictory = labels[starts] != labels[starts + sizes - 1]  # sorted: the first and last label of equal images
    return Duplicates(
        in_training=len(train) - len(in_train),
        in_test=len(test) - len(in_test),
        between=int(np.isin(test["hash"], in_train).sum()),
        of_other_classes=int(sizes[contradictory].sum()),
    )
