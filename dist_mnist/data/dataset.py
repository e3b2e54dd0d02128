"""The memory-mapped dataset: images and labels stay in their files until a batch needs them."""

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
GROUND_SAMPLES = 256  # images from which the brightness of the background is judged
ROWS_KEPT = 1 << 20  # parts of at most this many samples keep a table of rows; larger ones compute rows on demand

Order = Callable[[np.ndarray], np.ndarray]  # a bijection from positions (B,) int64 to rows of a file


class SampleRows(NamedTuple):
    """Sample ids and their rows in the files; both (B,) int64."""

    ids: np.ndarray
    rows: np.ndarray


class Samples(NamedTuple):
    """Samples of a dataset, in the dtypes of the files and the machine's byte order."""

    images: np.ndarray  # (B, H, W, C)
    labels: np.ndarray  # (B,) int64
    ids: np.ndarray  # (B,) int64, as requested


class IdxDataset:
    """Images and labels of one split, or a part of it, mapped from idx files.

    `dataset[i]` is one (image, label) pair, as in torch's datasets. `dataset.__getitems__(ids)` fetches a whole batch
    with one gather; torch's DataLoader calls it automatically (pass `loader.collate` as its `collate_fn`).

    Args:
        images: (N, H, W) or (N, H, W, C), usually a memory map; (N, C, H, W) with `channels_first`.
        labels: (N,), any integer dtype, not negative.
        rows: the subset of the files, as an order of the rows, such as a keyed permutation (None: file order), and a
            range of positions in it; None: all rows in file order.
        channels_first: whether the files store channels before height. Batches always have channels last.

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
        # Plain arrays over the same maps: numpy's memmap class costs microseconds per access.
        images, self.labels = np.asarray(images), np.asarray(labels)
        if channels_first and images.shape[1] == 1:
            images, channels_first = images[:, 0], False
        self.channels_first = channels_first
        self.stored = images if images.ndim == 4 else images[..., np.newaxis]  # in the file's axis order
        self.images = self.stored.transpose(0, 2, 3, 1) if channels_first else self.stored  # (N, H, W, C)
        self._permutation: Order | None = None
        self._range = range(len(images))
        if rows is not None:
            self._permutation, self._range = rows

    @classmethod
    def open(cls, files: SplitFiles, channels_first: bool = False) -> "IdxDataset":
        """Map the two files of a split. Labels may be one-hot.

        Raises:
            UserError: a file is not valid idx, the numbers of images and labels differ, or there are no pixels.
        """
        images, labels = open_idx(files.images), flat_labels(open_idx(files.labels), files.labels)
        if images.ndim not in (3, 4):
            raise UserError(f"{files.images}: expected 3 or 4 dimensions (NxHxW or NxHxWxC), got {images.ndim}")
        if len(images) != len(labels):
            raise UserError(
                f"{files.images} has {len(images)} images but {files.labels} has {len(labels)} labels: the files do "
                "not belong together"
            )
        if images.size == 0:
            raise UserError(f"{files.images}: the file has no pixels (shape {images.shape})")
        return cls(images, labels, channels_first=channels_first and images.ndim == 4)

    def __len__(self) -> int:
        return len(self._range)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """Return one image (H, W, C) in the file's dtype, and its label."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for a dataset of {len(self)} samples")
        samples = self.__getitems__([index % len(self)])
        return samples.images[0], int(samples.labels[0])

    def __getitems__(self, ids: Sequence[int] | np.ndarray) -> Samples:
        """Return the samples with the given ids (each in range(len)), by one gather."""
        ids, rows = self.rows_of(np.asarray(ids, np.int64))
        return Samples(self.images_at(rows), self.labels_at(rows), ids)

    def check_files(self) -> None:
        """Raise an IdxError if a file has shrunk since it was mapped. Call this before reading mapped pages."""
        for source in self._sources:
            source.check()

    def images_at(self, rows: np.ndarray) -> np.ndarray:
        """Return the images in the given rows of the file, (B, H, W, C), in the machine's byte order."""
        self.check_files()
        images = native(self.stored.take(rows, 0, mode="clip"))  # rows are in range; "clip" saves a second copy
        return _channels_last(images) if self.channels_first else images

    def labels_at(self, rows: np.ndarray) -> np.ndarray:
        """Return the labels in the given rows of the file, (B,) int64."""
        self.check_files()
        return self.labels[rows].astype(np.int64)

    @property
    def sample_labels(self) -> np.ndarray:
        """The labels of all samples in id order, (N,) int64; `labels` covers the whole file instead."""
        return self.labels_at(self.rows_of(np.arange(len(self))).rows)

    def rows_of(self, ids: np.ndarray) -> SampleRows:
        """Return the rows in the files of the samples with ids (B,) int64."""
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
        """Channels, height and width of an image."""
        _, height, width, channels = self.images.shape
        return channels, height, width

    def with_labels(self, labels: np.ndarray) -> "IdxDataset":
        """Return the same samples with other labels (N,), one per row of the file."""
        return IdxDataset(self.stored, labels, (self._permutation, self._range), self.channels_first)

    def split(
        self, fraction: float, seed: int | None, option: str = "--validation-fraction"
    ) -> tuple["IdxDataset", "IdxDataset"]:
        """Split into two parts, such as training and validation. The second has `fraction` of the samples, chosen at
        random by `seed`, or the last ones if `seed` is None.

        Raises:
            UserError: a part would be empty although the fraction, the value of `option`, is not 0.
        """
        total = len(self)
        kept = total - int(fraction * total + 1e-6)  # 0.29 * 100 is a little less than 29
        if fraction == 0:
            return self, self._part(self._permutation, total, total)
        if not 0 < kept < total:
            raise UserError(
                f"{option} {fraction} of {total} images leaves one of the two splits empty; give another fraction, or "
                "0 for no split"
            )
        permutation = self._order(seed)
        return self._part(permutation, 0, kept), self._part(permutation, kept, total)

    def fold(self, fold: int, folds: int, seed: int | None) -> tuple["IdxDataset", "IdxDataset"]:
        """Split into all but one fold of a k-fold cross-validation, and that fold (0 to `folds` - 1).

        Each sample is in exactly one fold. Folds are random by `seed`, or successive blocks if `seed` is None.

        Raises:
            UserError: a fold would be empty.
        """
        total = len(self)
        if total < folds:
            raise UserError(f"--validation-fold cannot divide {total} images into {folds} folds: give at most {total}")
        start, stop = total * fold // folds, total * (fold + 1) // folds
        order = _rotated(self._order(seed), self._range, stop)  # so that the fold comes last
        kept = total - (stop - start)
        return self._part(order, 0, kept), self._part(order, kept, total)

    def first(self, count: int) -> "IdxDataset":
        """Return the first `count` samples, or all if there are fewer."""
        return self._part(self._permutation, 0, min(count, len(self)))

    def _order(self, seed: int | None) -> Order | None:
        """Return the order in which to split this dataset; a part is already in random order."""
        if self._permutation is None and seed is not None:
            return Permutation(len(self), "split", seed)
        return self._permutation

    def _part(self, permutation: Order | None, start: int, stop: int) -> "IdxDataset":
        return IdxDataset(self.stored, self.labels, (permutation, self._range[start:stop]), self.channels_first)

    def pixel_scaling(self, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the offset and scale of each channel, (C,) each, for (pixels - offset) / scale.

        Args:
            kind: "raw": none; "unit": the dtype's range becomes 0..1; "standard": mean 0 and standard deviation 1.
        """
        channels = self.image_shape[0]
        if kind == "standard":
            return self.pixel_statistics()
        is_integer = self.images.dtype.kind in "iu"
        largest = np.iinfo(self.images.dtype).max if kind == "unit" and is_integer else 1
        return np.zeros(channels), np.full(channels, float(largest))

    def pixel_statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation of each channel, (C,) float64, over a fixed sample of up to 10 000 images.

        The sample is pseudo-random: regular spacing is biased if a dataset interleaves its sources, as MNIST does.
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
        """Whether gray uint8 images are dark on light, judged by the edge pixels of up to 256 images."""
        if self.image_shape[0] != 1 or self.images.dtype != np.uint8:
            return False
        sample = Permutation(len(self), "statistics")(np.arange(min(len(self), GROUND_SAMPLES)))
        images = self.__getitems__(sample).images
        edges = (images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1])
        return bool(np.median(np.concatenate(edges, axis=1)) > 127.5)


def _rotated(order: Order | None, positions: range, shift: int) -> Order:
    """Return the order rotated by `shift` positions: it starts `shift` positions later and wraps around."""

    def rows(at: np.ndarray) -> np.ndarray:
        at = positions.start + (at - positions.start + shift) % len(positions)
        return at if order is None else order(at)

    return rows


def _channels_last(images: np.ndarray) -> np.ndarray:
    """Copy images (B, C, H, W) to (B, H, W, C), channel by channel, which is four times as fast as a transpose."""
    batch, channels, height, width = images.shape
    last = np.empty((batch, height, width, channels), images.dtype)
    for channel in range(channels):
        last[..., channel] = images[:, channel]
    return last


def native(images: np.ndarray) -> np.ndarray:
    """Return images in the machine's byte order, without a copy if they already are."""
    return images if images.dtype.isnative else images.astype(images.dtype.newbyteorder("="))
