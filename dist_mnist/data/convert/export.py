"""Export idx files for other programs: picture files, an npz archive or CSV tables."""

import os
import zipfile
from collections.abc import Iterator, Sequence
from enum import StrEnum
from itertools import product
from pathlib import Path

import numpy as np

from dist_mnist.data.convert.summary import Progress, no_progress
from dist_mnist.data.dataset import IdxDataset, Samples
from dist_mnist.data.sources.classes import class_folders, write_class_names
from dist_mnist.data.splits import open_data
from dist_mnist.utils.errors import UserError, os_error_as
from dist_mnist.utils.files import atomic_folder, check_new_folder

CHUNK = 1 << 20  # bytes of images read at a time
LONG_AGO = (1980, 1, 1, 0, 0, 0)  # fixed date of archive members, so that equal data gives equal bytes

Split = tuple[str, IdxDataset]


class Format(StrEnum):
    """The format of an export."""

    PICTURES = "pictures"
    NPZ = "npz"
    CSV = "csv"


def export_dataset(folder: Path, kind: Format, output: Path, progress: Progress = no_progress) -> None:
    """Export a folder of idx files to the folder `output`, which appears atomically.

    - pictures: `train/<class>/<index>.png` and `test/...`; the index is the one in the idx file
    - npz: `dataset.npz` of x_train (N, H, W) or (N, H, W, C), y_train (N,), x_test and y_test, in the files' dtypes
    - csv: `train.csv` and `test.csv`, one row per image: label, then pixels row by row, channels innermost; the pixel
      columns of images that are not square or not gray are named 1x1 (row, column) or 1x1x1 (and channel) and so on

    Each export has `classes.json`, the class names by label. Without test files, there is no test split.

    Raises:
        UserError: see `open_data`; or `output` exists, is not writable, or the format cannot hold the images.
    """
    check_new_folder(output, "give another --output")
    data = open_data(folder, need_test=False)
    splits = [(name, dataset) for name, dataset in (("train", data.train), ("test", data.test)) if len(dataset)]
    if kind == Format.PICTURES:
        _check_pixels(data.train, folder)
    done, total = 0, sum(len(dataset) for _, dataset in splits)
    with (
        os_error_as(f"{output}: cannot be written", "free some space, or give another --output"),
        atomic_folder(output) as unfinished,
    ):
        write_class_names(unfinished, data.class_names)
        for count in _written(kind, unfinished, splits, data.class_names):
            done += count
            progress(done, total)
        os.sync()  # once, for up to millions of files


def _check_pixels(dataset: IdxDataset, folder: Path) -> None:
    channels = dataset.image_shape[0]
    if dataset.images.dtype != np.uint8:
        raise UserError(
            f"{folder}: {dataset.images.dtype.name} pixels do not fit into 8-bit pictures; export --to npz or csv"
        )
    if channels not in (1, 3):
        raise UserError(f"{folder}: pictures have 1 or 3 channels, got {channels}; export --to npz or csv")


def _written(kind: Format, folder: Path, splits: Sequence[Split], names: Sequence[str]) -> Iterator[int]:
    """Write all images to `folder`, and yield the number of images written since the last yield."""
    if kind == Format.NPZ:
        with zipfile.ZipFile(folder / "dataset.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, dataset in splits:
                yield from _write_arrays(archive, name, dataset)
        return
    for name, dataset in splits:
        if kind == Format.CSV:
            yield from _write_csv(folder / f"{name}.csv", dataset)
        else:
            folders = [os.fsdecode(one.encode()) for one in class_folders(names)]  # UTF-8 in any locale
            yield from _write_pictures(folder / name, dataset, folders)


def _chunks(dataset: IdxDataset) -> Iterator[Samples]:
    step = max(1, CHUNK // dataset.images[0].nbytes)
    for start in range(0, len(dataset), step):
        yield dataset.__getitems__(np.arange(start, min(start + step, len(dataset))))


def _write_pictures(folder: Path, dataset: IdxDataset, folders: Sequence[str]) -> Iterator[int]:
    from PIL import Image

    for label in np.unique(dataset.labels).tolist():
        (folder / folders[label]).mkdir(parents=True)
    digits = len(str(len(dataset) - 1))
    for samples in _chunks(dataset):
        for image, label, index in zip(samples.images, samples.labels.tolist(), samples.ids.tolist(), strict=True):
            picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
            picture.save(folder / folders[label] / f"{index:0{digits}}.png")
        yield len(samples.ids)


def _write_csv(path: Path, dataset: IdxDataset) -> Iterator[int]:
    channels, height, width = dataset.image_shape
    num_pixels = channels * height * width
    names = [f"pixel{i}" for i in range(num_pixels)]
    if channels > 1 or height != width:  # the number of pixels alone does not tell
        places = product(*(range(1, size + 1) for size in (height, width, channels)[: 2 + (channels > 1)]))
        names = ["x".join(map(str, place)) for place in places]
    with path.open("w", encoding="ascii") as file:
        file.write(",".join(["label", *names]) + "\n")
        for samples in _chunks(dataset):
            for label, pixels in zip(samples.labels.tolist(), samples.images.reshape(-1, num_pixels), strict=True):
                file.write(f"{label},{','.join(map(str, pixels.tolist()))}\n")
            yield len(samples.ids)


def _write_arrays(archive: zipfile.ZipFile, split: str, dataset: IdxDataset) -> Iterator[int]:
    """Write x_SPLIT and y_SPLIT as `numpy.savez_compressed` does, but in chunks."""
    channels, height, width = dataset.image_shape
    shape = (len(dataset), height, width) if channels == 1 else (len(dataset), height, width, channels)
    with archive.open(_member(f"x_{split}"), "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, _array_header(shape, dataset.images.dtype))
        for samples in _chunks(dataset):
            file.write(samples.images.tobytes())
            yield len(samples.ids)
    with archive.open(_member(f"y_{split}"), "w", force_zip64=True) as file:
        labels = np.asarray(dataset.labels)
        np.lib.format.write_array_header_1_0(file, _array_header(labels.shape, labels.dtype))
        file.write(labels.astype(labels.dtype.newbyteorder("=")).tobytes())


def _member(name: str) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(f"{name}.npy", LONG_AGO)
    member.compress_type = zipfile.ZIP_DEFLATED
    return member


def _array_header(shape: tuple[int, ...], dtype: np.dtype) -> dict[str, object]:
    descr = np.lib.format.dtype_to_descr(dtype.newbyteorder("="))
    return {"descr": descr, "fortran_order": False, "shape": shape}
