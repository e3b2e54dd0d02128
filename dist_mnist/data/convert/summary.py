"""What an import has made, for people and programs; duplicates and blanks, which are counted for `data info`, too."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

RECORD = np.dtype([("label", np.int32), ("hash", np.uint64), ("blank", np.bool_)])  # of an image
Progress = Callable[[int, int], object]  # is told how many images are done, and of how many


@dataclass(frozen=True)
class ClassCount:
    """The images of a class."""

    name: str
    train: int
    test: int


@dataclass(frozen=True)
class SizeCount:
    """How many pictures of the source had a size; channels: 1 for gray, 3 for colour."""

    height: int
    width: int
    channels: int
    pictures: int


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What was imported, and what deserves a look.

    Duplicates are images with the same pixels. Of the sizes the most frequent ones are listed, of unusable files the
    first.
    """

    folder: str
    source: str
    image_shape: tuple[int, int, int]  # height, width, channels
    training_images: int
    test_images: int
    classes: tuple[ClassCount, ...]
    source_sizes: tuple[SizeCount, ...]
    other_sizes: int
    duplicates_in_training: int  # images beyond the first of those that are the same
    duplicates_in_test: int
    test_images_in_training: int
    duplicates_of_other_classes: int  # images that are there with another label, too
    blank_images: int
    unusable_pictures: int
    unusable: tuple[str, ...]
    notes: tuple[str, ...]
    contact_sheet: str


@dataclass(frozen=True)
class Duplicates:
    """Counts of images that are the same, pixel for pixel."""

    in_training: int
    in_test: int
    between: int
    of_other_classes: int


def no_progress(done: int, total: int) -> None:
    """Progress that nobody wants to see."""


def records_of(images: np.ndarray, labels: np.ndarray | int) -> np.ndarray:
    """A RECORD of each image (n, ...), of any dtype: label, hash of the pixels, and whether all these are equal."""
    flat = np.ascontiguousarray(images).reshape(len(images), math.prod(images.shape[1:]))
    records = np.empty(len(flat), RECORD)
    digests = b"".join(hashlib.blake2b(image.data, digest_size=8).digest() for image in flat)
    records["label"], records["hash"] = labels, np.frombuffer(digests, "<u8")
    records["blank"] = (flat == flat[:, :1]).all(1)
    return records


def count_duplicates(train: np.ndarray, test: np.ndarray) -> Duplicates:
    """Duplicates by the hashes of the images' pixels; both are arrays of RECORD."""
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
