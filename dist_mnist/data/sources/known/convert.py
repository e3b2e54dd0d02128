"""From published archives to a folder of idx files: streamed, and put in place once all are written."""

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

WORK = ".download"  # sub-folder of what is not finished; holding the folder's lock, one may remove it
Advance = Callable[[int], object]  # is told how many images more are converted


def make_folder(
    dataset: KnownDataset, folder: Path, download: Callable[[KnownFile, Path], object], advance: Advance
) -> None:
    """Put the idx files, class names and manifest of `dataset` into `folder`; only for the holder of its lock.

    An archive that lies in `folder`, or in the folder above, is used if its checksum is right, and left there; others
    are downloaded, and removed once they are converted.

    Raises:
        UserError: a file cannot be downloaded, or the folder has files of that name that are not of `dataset`.
    """
    assert dataset.conversion is not None
    _check_unused(dataset, folder)
    work = folder / WORK
    work.mkdir(exist_ok=True)
    _remove_unfinished(work, dataset.files)
    try:
        archives = {file.name: _located(file, folder) or _downloaded(file, work, download) for file in dataset.files}
    except BaseException:
        with suppress(OSError):  # an archive is there
            work.rmdir()
        raise
    names = [CLASS_NAMES]
    try:
        write_class_names(work, dataset.class_names)
        for prefix, parts in dataset.conversion.splits.items():
            names += _convert_split(dataset, prefix, parts, archives, work, advance)
        write_manifest(work, dataset.name, names)
    except BaseException:
        _remove_unfinished(work, dataset.files)  # the archives are worth keeping
        raise
    for name in (MANIFEST, *names):  # the manifest first: what stands beside it is known to be ours
        (work / name).replace(folder / name)
    sync_folder(folder)
    shutil.rmtree(work)


def _check_unused(dataset: KnownDataset, folder: Path) -> None:
    """Raise a UserError if the folder has files of the names that are written, and `data get` did not write them."""
    assert dataset.conversion is not None
    kinds = ("images-idx3", "images-idx4", "labels-idx1")
    names = [CLASS_NAMES, *(f"{prefix}-{kind}-ubyte" for prefix in dataset.conversion.splits for kind in kinds)]
    if any((folder / file.name).exists() for file in dataset.files) and has_files(folder):
        raise UserError(
            f"{folder} holds the published files of {dataset.name}, beside which there is no place for those that are "
            f"made of them: move them to {folder.absolute().parent}, from where they are used"
        )
    there = [full for name in names for full in (name, f"{name}.gz") if (folder / full).exists()]
    manifest = read_manifest(folder)
    if manifest is None and (there or has_files(folder)):
        raise UserError(
            f"{folder} holds {there[0] if there else 'a dataset'}, which `dist-mnist data get` did not write and "
            f"leaves as it is: give another folder for {dataset.name}"
        )
    if manifest and manifest.dataset != dataset.name:
        raise UserError(f"{folder} holds {manifest.dataset}: give another folder for {dataset.name}")


def _remove_unfinished(work: Path, archives: Sequence[KnownFile]) -> None:
    for path in work.iterdir():
        if path.name not in {file.name for file in archives}:
            path.unlink()


def _located(file: KnownFile, folder: Path) -> Path | None:
    """Where the published file lies already."""
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
    """Write images and labels of one split into `work`; gives the files' names, that of the labels last."""
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
    """The images of a part, (n, H, W) or (n, H, W, C) uint8 each."""
    with open_array(part.images, archives[part.images.file]) as images:
        position = 0
        for chunk in images.chunks:
            rows = chunk[_overlap(part, position, len(chunk))]
            position += len(chunk)
            advance(len(rows))
            yield rows.swapaxes(1, 2) if transposed else rows


def _overlap(part: Part, position: int, length: int) -> slice:
    """Which rows of a chunk are a part's, where the chunk begins at `position`."""
    stop = length if part.stop is None else part.stop - position
    return slice(max(0, part.start - position), max(0, min(length, stop)))


def _labels(part: Part, archives: dict[str, Path], dataset: KnownDataset) -> np.ndarray:
    """The labels of a part, (N,) uint8, from 0; of several columns the first has the class."""
    assert dataset.conversion is not None
    with open_array(part.labels, archives[part.labels.file]) as stream:
        columns = np.concatenate([chunk.reshape(len(chunk), -1)[:, 0] for chunk in stream.chunks])
    labels = columns[part.start : part.stop].astype(np.int64) - dataset.conversion.first_label
    if wrong := np.flatnonzero((labels < 0) | (labels >= dataset.num_classes)).tolist():
        raise UserError(f"{part.labels.file}: the label {columns[part.start + wrong[0]]} is none of {dataset.name}'s")
    return labels.astype(np.uint8)
