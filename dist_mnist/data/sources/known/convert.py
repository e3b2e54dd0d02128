"""Convert published archives to a folder of idx files: streamed, and moved into place when all are written."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from dist_mnist.data.idx import write_idx, write_idx_chunks
from dist_mnist.data.sources.classes import FILE_NAME as CLASS_NAMES
from dist_mnist.data.sources.classes import write_class_names
from dist_mnist.data.sources.files import has_files
from dist_mnist.data.sources.known.arrays import open_array
from dist_mnist.data.sources.known.manifest import FILE_NAME as MANIFEST
from dist_mnist.data.sources.known.manifest import read_manifest, write_manifest
from dist_mnist.data.sources.known.records import KnownDataset, KnownFile, Part
from dist_mnist.data.sources.known.verify import differs
from dist_mnist.utils.errors import UserError, warn
from dist_mnist.utils.files import sync_folder

WORK = ".download"  # sub-folder of unfinished files; the holder of the folder's lock may remove it
Advance = Callable[[int], object]  # called with the number of images converted since the last call


def make_folder(
    dataset: KnownDataset, folder: Path, download: Callable[[KnownFile, Path], object], advance: Advance
) -> None:
    """Write the idx files, class names and manifest of `dataset` to `folder`. The caller must hold its lock.

    An archive in `folder` or its parent is used, if its checksum is correct, and kept. Others are downloaded, and
    removed after the conversion.

    Raises:
        UserError: a file cannot be downloaded, or the folder has files of these names from another source.
    """
    assert dataset.conversion is not None
    _check_unused(dataset, folder)
    work = folder / WORK
    work.mkdir(exist_ok=True)
    _remove_unfinished(work, dataset.files)
    try:
        archives = {file.name: _located(file, folder) or _downloaded(file, work, download) for file in dataset.files}
    except BaseException:
        with suppress(OSError):  # not empty: it has an archive
            work.rmdir()
        raise
    names = [CLASS_NAMES]
    try:
        write_class_names(work, dataset.class_names)
        for prefix, parts in dataset.conversion.splits.items():
            names += _convert_split(dataset, prefix, parts, archives, work, advance)
        write_manifest(work, dataset.name, names)
    except BaseException:
        _remove_unfinished(work, dataset.files)  # but keep the archives
        raise
    for name in (MANIFEST, *names):  # the manifest first: it marks the other files as ours
        (work / name).replace(folder / name)
    sync_folder(folder)
    shutil.rmtree(work)


def _check_unused(dataset: KnownDataset, folder: Path) -> None:
    """Raise a UserError if the folder has files of the same names that `data get` did not write."""
    assert dataset.conversion is not None
    kinds = ("images-idx3", "images-idx4", "labels-idx1")
    names = [CLASS_NAMES, *(f"{prefix}-{kind}-ubyte" for prefix in dataset.conversion.splits for kind in kinds)]
    if any((folder / file.name).exists() for file in dataset.files) and has_files(folder):
        raise UserError(
            f"{folder} has the published files of {dataset.name}, so the converted files cannot be stored there: move "
            f"them to {folder.absolute().parent}, where they will be found"
        )
    there = [full for name in names for full in (name, f"{name}.gz") if (folder / full).exists()]
    manifest = read_manifest(folder)
    if manifest is None and (there or has_files(folder)):
        raise UserError(
            f"{folder} has {there[0] if there else 'a dataset'}, which `dist-mnist data get` did not write and does "
            f"not replace: give another folder for {dataset.name}"
        )
    if manifest and manifest.dataset != dataset.name:
        raise UserError(f"{folder} has {manifest.dataset}: give another folder for {dataset.name}")


def _remove_unfinished(work: Path, archives: Sequence[KnownFile]) -> None:
    for path in work.iterdir():
        if path.name not in {file.name for file in archives}:
            path.unlink()


def _located(file: KnownFile, folder: Path) -> Path | None:
    """Return the path of an existing copy of the published file, or None."""
    for path in (folder / WORK / file.name, folder / file.name, folder.absolute().parent / file.name):
        if path.is_file():
            if (why := differs(path, file)) is None:
                return path
            warn(f"{path} is not used: {why}")
    return None


def _downloaded(file: KnownFile, work: Path, download: Callable[[KnownFile, Path], object]) -> Path:
    download(file, work)
    return work / file.name


def _convert_split(
    dataset: KnownDataset, prefix: str, parts: Sequence[Part], archives: dict[str, Path], work: Path, advance: Advance
) -> list[str]:
    """Write images and labels of one split to `work`, and return the file names, the labels last."""
    conversion = dataset.conversion
    assert conversion is not None
    labels = np.concatenate([_labels(part, archives, dataset) for part in parts])
    with open_array(parts[0].images, archives[parts[0].images.file]) as first:
        shape = (len(labels), *first.shape[1:])
    if conversion.transposed:
        shape = (shape[0], *shape[2:0:-1], *shape[3:])
    images = (chunk for part in parts for chunk in _images(part, archives, conversion.transposed, advance))
    names = [f"{prefix}-images-idx{len(shape)}-ubyte", f"{prefix}-labels-idx1-ubyte"]
    write_idx_chunks(work / names[0], np.uint8, shape, images)
    write_idx(work / names[1], labels)
    return names


def _images(part: Part, archives: dict[str, Path], transposed: bool, advance: Advance) -> Iterator[np.ndarray]:
    """Yield the images of a part in uint8 chunks, (n, H, W) or (n, H, W, C)."""
    with open_array(part.images, archives[part.images.file]) as images:
        position = 0
        for chunk in images.chunks:
            rows = chunk[_overlap(part, position, len(chunk))]
            position += len(chunk)
            advance(len(rows))
            yield rows.swapaxes(1, 2) if transposed else rows


def _overlap(part: Part, position: int, length: int) -> slice:
    """Return which rows of a chunk that starts at `position` belong to a part."""
    stop = length if part.stop is None else part.stop - position
    return slice(max(0, part.start - position), max(0, min(length, stop)))


def _labels(part: Part, archives: dict[str, Path], dataset: KnownDataset) -> np.ndarray:
    """Return the labels of a part, (N,) uint8, from 0; with several columns, the first is the class."""
    assert dataset.conversion is not None
    with open_array(part.labels, archives[part.labels.file]) as stream:
        columns = np.concatenate([chunk.reshape(len(chunk), -1)[:, 0] for chunk in stream.chunks])
    labels = columns[part.start : part.stop].astype(np.int64) - dataset.conversion.first_label
    if wrong := np.flatnonzero((labels < 0) | (labels >= dataset.num_classes)).tolist():
        raise UserError(f"{part.labels.file}: {dataset.name} has no label {columns[part.start + wrong[0]]}")
    return labels.astype(np.uint8)
