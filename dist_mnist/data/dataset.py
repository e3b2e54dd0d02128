"""The memory-mapped dataset: images and labels stay in their files until a batch asks for some of them."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from dist_mnist.data.idx import Source, open_idx
from dist_mnist.data.labels import flat_labels
from dist_mnist.data.permutation import Permutation
from dist_mnist.data.sources.files import SplitFiles
from dist_mnist.utils.errors import UserError

STATISTICS_SAMPLES = 10_000
GROUND_SAMPLES = 256
ROWS_KEPT = 1 << 20  # rows of a part that are looked up; those of a larger one are computed when they are asked for


Order = Callable[[np.ndarray], np.ndarray]  # from positions (B,) int64 to rows of a file; a bijection


class SampleRows(NamedTuple):
    """Sample ids, and the rows of the files where they stand; (B,) int64 both."""

    ids: np.ndarray
    rows: np.ndarray


class Samples(NamedTuple):
    """Some samples of a dataset, in the files' own dtypes but the machine's byte order."""

    images: np.ndarray  # (B, H, W, C)
    labels: np.ndarray  # (B,) int64
    ids: np.ndarray  # (B,) int64, as asked for


class IdxDataset:
    """Images and labels of one split, or a part of it, mapped from idx files.

    `dataset[i]` is one (image, label) pair, as torch's datasets give it; `dataset.__getitems__(ids)` fetches a whole
    batch with one gather, which a torch DataLoader uses by itself (with `loader.collate` as its `collate_fn`).

    Args:
        images: (N, H, W) or (N, H, W, C), usually a memory map; (N, C, H, W) with `channels_first`.
        labels: (N,), any integer dtype, not negative.
        rows: the part of the files that this dataset is, as an order of the rows such as a keyed permutation (None for
            the files' order) and the range of its positions; None for all rows in the files' order.
        channels_first: whether the channels come before the height. A batch has them last all the same.

    Example:
        >>> from dist_mnist import open_data
        >>> dataset = open_data("data/mnist").train
        >>> image, label = dataset[0]
        >>> image.shape, image.dtype
        ((28, 28, 1), dtype('uint8'))
        >>> dataset.__getitems__([5, 3]).images.shape
        (2, 28, 28, 1)
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        rows: tuple[Order | None, range] | None = None,
        channels_first: bool = False,
    ):
        self._sources = Source(images), Source(labels)
        # Plain arrays over the same maps: numpy's memmap class costs microseconds at every use.
        images, self.labels = np.asarray(images), np.asarray(labels)
        if channels_first and images.shape[1] == 1:
            images, channels_first = images[:, 0], False
        self.channels_first = channels_first
        self.stored = images if images.ndim == 4 else images[..., np.newaxis]  # in the file's order of axes
        self.images = self.stored.transpose(0, 2, 3, 1) if channels_first else self.stored  # (N, H, W, C)
        self._permutation: Order | None = None
        self._range = range(len(images))
        if rows is not None:
            self._permutation, self._range = rows

    @classmethod
    def open(cls, files: SplitFiles, channels_first: bool = False) -> "IdxDataset":
        """Map the two files of a split; labels may be one-hot, too.

        Raises:
            UserError: they are not idx files of images and of as many labels, or there is nothing in them.
        """
        images, labels = open_idx(files.images), flat_labels(open_idx(files.labels), files.labels)
        if images.ndim not in (3, 4):
            raise UserError(f"{files.images}: images have 3 or 4 dimensions (NxHxW or NxHxWxC), not {images.ndim}")
        if len(images) != len(labels):
            raise UserError(
                f"{files.images} has {len(images)} images but {files.labels} has {len(labels)} labels: they do not "
                "belong together"
            )
        if images.size == 0:
            raise UserError(f"{files.images}: there are no pixels in it (shape {images.shape})")
        return cls(images, labels, channels_first=channels_first and images.ndim == 4)

    def __len__(self) -> int:
        return len(self._range)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """One image (H, W, C) in the file's dtype, and its label."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is outside a dataset of {len(self)}")
        samples = self.__getitems__([index % len(self)])
        return samples.images[0], int(samples.labels[0])

    def __getitems__(self, ids: Sequence[int] | np.ndarray) -> Samples:
        """The samples of the given ids (each in range(len)), gathered at once."""
        ids, rows = self.rows_of(np.asarray(ids, np.int64))
        return Samples(self.images_at(rows), self.labels_at(rows), ids)

    def check_files(self) -> None:
        """To be called before pages of the files are read; an IdxError if one has become shorter than it was."""
        for source in self._sources:
            source.check()

    def images_at(self, rows: np.ndarray) -> np.ndarray:
        """The images that stand in those rows of the file, (B, H, W, C) in the machine's byte order."""
        self.check_files()
        images = native(self.stored.take(rows, 0, mode="clip"))  # rows are in range: this saves a second copy
        return _channels_last(images) if self.channels_first else images

    def labels_at(self, rows: np.ndarray) -> np.ndarray:
        """Their labels, (B,) int64."""
        self.check_files()
        return self.labels[rows].astype(np.int64)

    @property
    def sample_labels(self) -> np.ndarray:
        """The labels of all samples in the order of their ids, (N,) int64; `labels` are those of the whole file."""
        return self.labels_at(self.rows_of(np.arange(len(self))).rows)

    def rows_of(self, ids: np.ndarray) -> SampleRows:
        """Where the samples of ids (B,) int64 stand in the files."""
        if self._permutation is None:
            return SampleRows(ids, ids + self._range.start)
        if len(self) <= ROWS_KEPT:
            return SampleRows(ids, self._rows[ids])
        return SampleRows(ids, self._permutation(ids + self._range.start))

    @cached_property
    def _rows(self) -> np.ndarray:
        assert self._permutation is not None
        return self._permutation(np.arange(self._range.start, self._range.stop))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        _, height, width, channels = self.images.shape
        return channels, height, width

    def with_labels(self, labels: np.ndarray) -> "IdxDataset":
        """The same samples with other labels (N,) for the rows of the file."""
        return IdxDataset(self.stored, labels, (self._permutation, self._range), self.channels_first)

    def split(
        self, fraction: float, seed: int | None, option: str = "--validation-fraction"
    ) -> tuple["IdxDataset", "IdxDataset"]:
        """Two parts, such as for training and validation, the latter with `fraction` of the samples, drawn by a seed or
        else the last.

        Raises:
            UserError: one of the parts would be empty though the fraction, an `option`, is not 0.
        """
        total = len(self)
        kept = total - int(fraction * total + 1e-6)  # 0.29 * 100 is a little less than 29
        if fraction == 0:
            return self, self._part(self._permutation, total, total)
        if not 0 < kept < total:
            raise UserError(
                f"{option} {fraction} of {total} images leaves less than one image on one side; give "
                "another, or 0 for none"
            )
        permutation = self._order(seed)
        return self._part(permutation, 0, kept), self._part(permutation, kept, total)

    def fold(self, fold: int, folds: int, seed: int | None) -> tuple["IdxDataset", "IdxDataset"]:
        """Two parts: all but one fold of a k-fold cross-validation, and that fold (0 to `folds` - 1).

        Over all folds each sample is in the second part once. Folds are drawn by a seed, or else are successive blocks.

        Raises:
            UserError: a fold would be empty.
        """
        total = len(self)
        if total < folds:
            raise UserError(f"--validation-fold cuts {total} images into {folds} folds: give at most {total}")
        start, stop = total * fold // folds, total * (fold + 1) // folds
        order = _rotated(self._order(seed), self._range, stop)  # so that the fold comes last
        kept = total - (stop - start)
        return self._part(order, 0, kept), self._part(order, kept, total)

    def first(self, count: int) -> "IdxDataset":
        """The first samples, or all if they are no more than `count`."""
        return self._part(self._permutation, 0, min(count, len(self)))

    def _order(self, seed: int | None) -> Order | None:
        """The order in which this set is cut into parts; a part's rows are in random order already."""
        if self._permutation is None and seed is not None:
            return Permutation(len(self), "split", seed)
        return self._permutation

    def _part(self, permutation: Order | None, start: int, stop: int) -> "IdxDataset":
        return IdxDataset(self.stored, self.labels, (permutation, self._range[start:stop]), self.channels_first)

    def pixel_scaling(self, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """What to subtract from each channel's pixels and divide them by, (C,) each.

        Args:
            kind: "raw" for nothing, "unit" to bring the dtype's range to 0..1, "standard" for mean 0 and deviation 1.
        """
        channels = self.image_shape[0]
        if kind == "standard":
            return self.pixel_statistics()
        is_integer = self.images.dtype.kind in "iu"
        largest = np.iinfo(self.images.dtype).max if kind == "unit" and is_integer else 1
        return np.zeros(channels), np.full(channels, float(largest))

    def pixel_statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of each channel (C,), float64, over a fixed sample of at most 10 000 images.

        The sample is pseudo-random: one at equal distances would mislead where a set interleaves its sources, as MNIST.
        """
        sample = Permutation(len(self), "statistics")(np.arange(min(len(self), STATISTICS_SAMPLES)))
        total, squares, pixels = 0.0, 0.0, 0
        for ids in np.array_split(sample, -(-len(sample) // 500)):
            values = self.__getitems__(ids).images.astype(np.float64).reshape(-1, self.image_shape[0])
            total, squares, pixels = total + values.sum(0), squares + (values**2).sum(0), pixels + len(values)
        mean = total / pixels
        deviation = np.sqrt(np.maximum(squares / pixels - mean**2, 0))
        return np.asarray(mean), np.where(deviation > 0, deviation, 1.0)

    @property
    def has_light_ground(self) -> bool:
        """Whether gray images of uint8 are dark on light: by the pixels at the edges of at most 256 of them."""
        if self.image_shape[0] != 1 or self.images.dtype != np.uint8:
            return False
        sample = Permutation(len(self), "statistics")(np.arange(min(len(self), GROUND_SAMPLES)))
        images = self.__getitems__(sample).images
        edges = (images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1])
        return bool(np.median(np.concatenate(edges, axis=1)) > 127.5)


def _rotated(order: Order | None, positions: range, shift: int) -> Order:
    """The order that begins `shift` positions later, and ends with those that it has passed over."""

    def rows(at: np.ndarray) -> np.ndarray:
        at = positions.start + (at - positions.start + shift) % len(positions)
        return at if order is None else order(at)

    return rows


def _channels_last(images: np.ndarray) -> np.ndarray:
    """Images (B, C, H, W) as (B, H, W, C) in memory, channel by channel, which takes a quarter of the time."""
    batch, channels, height, width = images.shape
    last = np.empty((batch, height, width, channels), images.dtype)
    for channel in range(channels):
        last[..., channel] = images[:, channel]
    return last


def native(images: np.ndarray) -> np.ndarray:
    """The same in the machine's byte order; no copy where they are in it."""
    return images if images.dtype.isnative else images.astype(images.dtype.newbyteorder("="))
