"""Arrays of pictures and labels: npz archives, npy files, idx files of any name, and CIFAR's binary version."""

import lzma
import math
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_mnist.data.convert.choices import Layout, Split
from dist_mnist.data.convert.pictures import Unusable, Work
from dist_mnist.data.convert.readers.labels import LabelTable, label_array
from dist_mnist.data.convert.readers.pixels import BYTES, Arrangement, arrangement_of, choose_white, to_uint8
from dist_mnist.data.convert.readers.source import FileState, Part, Reading, Source, finished, split_of
from dist_mnist.data.idx import Source as MappedFile
from dist_mnist.data.idx import is_gzip, map_array, open_idx, unpack
from dist_mnist.data.sources.classes import read_class_names
from dist_mnist.data.sources.files import one_form_each
from dist_mnist.data.sources.known.arrays import PICKLED, read_npy_header
from dist_mnist.utils.errors import UserError, os_error_as, short

IMAGE_WORDS = {"x", "image", "images", "img", "imgs", "data", "pixels", "features", "samples", "pictures"}
LABEL_WORDS = {"y", "label", "labels", "lbl", "lbls", "target", "targets", "class", "classes"}
UNNAMED = re.compile(r"arr_\d+")
SCANNED_BYTES = 1 << 22
DAMAGES = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError)
MANY_BYTES = 1 << 30
MOST_PACKED = 200  # compression ratio that no dataset reaches, but a zip bomb does
CIFAR_NAME = re.compile(r"(data_batch_\d+|test_batch|train|test)\.bin")
CIFAR_PIXELS = ("pixels", np.uint8, (3, 32, 32))


@dataclass(frozen=True)
class NamedArray:
    """An array mapped from a file, and its names."""

    where: str  # for messages
    name: str  # which tells its split and role
    array: np.ndarray


@dataclass(frozen=True)
class Block:
    """Pictures of an array; `rows` are their indices."""

    where: str
    values: np.ndarray
    arrangement: Arrangement
    white: float
    rows: np.ndarray

    def read(self) -> Iterator[np.ndarray | Unusable]:
        """Yield the pixels of each picture."""
        return iter(self.arrangement.arranged(to_uint8(self.values, self.white, self.where)))

    def name(self, index: int) -> str:
        """Return the file and index of a picture."""
        return f"{self.where}, index {self.rows[index]}"


def open_npz(files: Sequence[Path], reading: Reading, scratch: Path) -> Source:
    """Open the arrays in npz archives, unpacked to `scratch` and mapped, so that they may have any size.

    Class names come from a classes.json next to the first file, if it exists, as for npy and idx files.

    Raises:
        UserError: an archive is damaged, has Python objects, or does not fit on the disk; or it has no pictures.
    """
    arrays = [found for number, path in enumerate(files) for found in _unzipped(path, scratch / str(number))]
    return _source("npz", arrays, files, reading)


def open_npy(files: Sequence[Path], reading: Reading) -> Source:
    """Open the arrays in npy files, mapped.

    Raises:
        UserError: a file is damaged or has Python objects, or the arrays are not pictures.
    """
    arrays = [NamedArray(str(path), path.stem, open_array(path, str(path))) for path in files]
    return _source("npy", arrays, files, reading)


def open_idx_files(files: Sequence[Path], reading: Reading, scratch: Path) -> Source:
    """Open the arrays in idx files of any name, raw or gzip; of a file in both forms, the one that training would read.

    Raises:
        UserError: a file is damaged, or the arrays are not pictures.
    """
    arrays = []
    files, notes = one_form_each(files)
    for number, path in enumerate(files):
        raw = path
        if is_gzip(path):  # regardless of its name
            raw = scratch / str(number)
            unpack(path, raw)
        arrays.append(NamedArray(str(path), path.name, open_idx(raw)))
    return _source("idx", arrays, files, reading, notes)


def open_cifar(folder: Path, reading: Reading) -> Source:
    """Open CIFAR-10's or CIFAR-100's binary version: records of labels (a byte each) and 3 x 32 x 32 bytes.

    Raises:
        UserError: the size of a file is wrong.
    """
    files = cifar_files(folder)
    of_100 = any(path.name == "train.bin" for path in files)
    if reading.label_column not in (None, "fine", "coarse") or (reading.label_column and not of_100):
        raise UserError(
            f"{folder}: --label-column expects fine or coarse, for CIFAR-100 only, got {reading.label_column!r}"
        )
    labels = (reading.label_column or "fine") if of_100 else "label"
    names = ("coarse", "fine") if of_100 else ("label",)
    record = np.dtype([*((name, np.uint8) for name in names), CIFAR_PIXELS])
    known = _lines_of(folder / (f"{labels}_label_names.txt" if of_100 else "batches.meta.txt"))
    table = LabelTable(str(folder), known)
    parts: dict[Split, list[Part]] = {split: [] for split in Split}
    for path in files:
        size = FileState.of(path).num_bytes
        if size == 0 or size % record.itemsize:
            raise UserError(
                f"{path}: its size of {size} bytes is not a multiple of {record.itemsize}, the size of a record; "
                "download it again"
            )
        records = map_array(path, record, (size // record.itemsize,), 0)
        numbers = table.numbers(np.asarray(records[labels]), str(path))
        part = _part(NamedArray(str(path), path.name, records["pixels"]), numbers, _CIFAR, reading.pixel_max or BYTES)
        parts[Split.TEST if path.name.startswith("test") else Split.TRAIN].append(part)
    return finished(f"CIFAR-{100 if of_100 else 10}, binary version", table, parts)


_CIFAR = Arrangement((3, 32, 32), Layout.CHW)


def cifar_files(folder: Path) -> list[Path]:
    """Return the files of CIFAR's binary version in a folder."""
    return sorted(path for path in folder.glob("*.bin") if CIFAR_NAME.fullmatch(path.name))


def _lines_of(path: Path) -> list[str] | None:
    if not path.is_file():
        return None
    with os_error_as(f"{path}: cannot be read"), open(path, "rb") as file:
        lines = file.read(1 << 20).decode("utf-8", "replace").split("\n")
    return [line.strip() for line in lines if line.strip()] or None


def open_array(path: Path, where: str) -> np.ndarray:
    """Map an npy file, after checking its size against its header.

    Raises:
        UserError: it is damaged, or has Python objects.
    """
    with os_error_as(f"{where}: cannot be read"), open(path, "rb") as file:
        header = read_npy_header(file, where)
        offset, size = file.tell(), os.fstat(file.fileno()).st_size
    if offset + header.num_bytes != size:
        declared = f"its header declares {header.dtype} {short(header.shape)}, but the file has {size} bytes"
        raise UserError(f"{where}: the array is damaged ({declared}); get the file again")
    if size == offset:
        return np.empty(header.shape, header.dtype)  # mmap rejects a length of zero
    return map_array(path, header.dtype, header.shape, offset, "F" if header.is_fortran else "C")


def _unzipped(path: Path, folder: Path) -> list[NamedArray]:
    """Unpack the arrays of an npz archive to files in `folder`, after checking their sizes."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if member.filename.endswith(".npy")]
            if not members:
                raise UserError(f"{path}: the archive has no arrays")
            _check_sizes(path, members, folder.parent)
            folder.mkdir(parents=True)
            found = []
            for number, member in enumerate(members):
                key = member.filename.removesuffix(".npy")
                where, target = f"{path}[{key}]", folder / f"{number}.npy"
                with archive.open(member) as source, target.open("wb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
                name = path.stem if UNNAMED.fullmatch(key) else f"{path.stem}/{key}"
                found.append(NamedArray(where, name, open_array(target, where)))
            return found
    except (*DAMAGES, NotImplementedError, RuntimeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not an npz archive, or is damaged ({short(error)}); get it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be unpacked ({error.strerror or error})") from None


def _check_sizes(path: Path, members: Sequence[zipfile.ZipInfo], folder: Path) -> None:
    """Raise a UserError if the sizes declared by an archive suggest a zip bomb, or do not fit on the disk."""
    for member in members:
        if member.file_size > MANY_BYTES and member.file_size > MOST_PACKED * max(member.compress_size, 1):
            raise UserError(
                f"{path}: {short(member.filename)} would unpack from {member.compress_size:,} to "
                f"{member.file_size:,} bytes; this is a zip bomb, not a dataset"
            )
    total, free = sum(member.file_size for member in members), shutil.disk_usage(folder).free
    if total > free:
        raise UserError(f"{path}: unpacking needs {total:,} bytes, but {folder.parent} has {free:,} free")


def _source(
    kind: str, arrays: Sequence[NamedArray], files: Sequence[Path], reading: Reading, notes: Sequence[str] = ()
) -> Source:
    """Return the source of the pairs of images and labels among arrays, matched by name, else by shape."""
    where = str(files[0].parent) if kind == "idx" else ", ".join(map(str, files))
    pairs = _pairs(arrays, files, where, reading.label_column)
    table = LabelTable(where, read_class_names(files[0].parent), is_fixed=True)
    numbers, arrangements = {}, set()
    for split, (images, labels) in pairs.items():
        found = label_array(labels.array, labels.where)
        if not images.array.ndim:
            raise UserError(f"{images.where}: expected pictures, got a single number")
        if len(found) != len(images.array):
            raise UserError(
                f"{labels.where} has {len(found)} labels but {images.where} has {len(images.array)} images: they do "
                f"not belong together{_last_axis(images.array, len(found))}"
            )
        numbers[split] = table.numbers(found, labels.where)
        if images.array.dtype.kind not in "buif":
            raise UserError(f"{images.where}: expected numeric pixels, got {images.array.dtype}")
        arrangement, of_shape = arrangement_of(images.array.shape[1:], images.where, reading)
        arrangements.add(arrangement)
    if len(arrangements) > 1:
        shapes = ", ".join(f"{images.where}: {images.array.shape}" for images, _ in pairs.values())
        raise UserError(f"{where}: the images of the splits have different shapes ({shapes})")
    white, of_white = reading.pixel_max, list[str]()
    if white is None:
        white, of_white = choose_white([(images.where, _blocks(images.array)) for images, _ in pairs.values()], where)
    parts = {
        split: [_part(images, numbers[split], arrangement, white)] for split, (images, _) in pairs.items()
    }  # fmt: skip
    return finished(kind, table, parts, (*notes, *of_shape, *of_white), white)


def _last_axis(images: np.ndarray, count: int) -> str:
    """Return advice for images whose sample axis is the last one, as in SVHN's Matlab files."""
    if images.ndim < 3 or images.shape[-1] != count:
        return ""
    return f"; the sample axis of the images {images.shape} is the last one: save np.moveaxis(images, -1, 0)"


def _blocks(images: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the pixels of an array until their scale is clear: for bytes, until one is above 1."""
    rows = max(1, SCANNED_BYTES // max(images.dtype.itemsize * math.prod(images.shape[1:]), 1))
    file = MappedFile(images)
    for start in range(0, len(images), rows):
        file.check()
        yield (block := np.asarray(images[start : start + rows]))
        if images.dtype == np.uint8 and block.max(initial=0) > 1:
            return


def _part(images: NamedArray, labels: np.ndarray, arrangement: Arrangement, white: float) -> Part:
    def work(keep: np.ndarray, size: int) -> Iterator[Work]:
        rows = np.flatnonzero(keep)
        file = MappedFile(images.array)
        for start in range(0, len(rows), size):
            file.check()
            some = rows[start : start + size]
            yield Block(images.where, np.asarray(images.array[some]), arrangement, white, some)

    return Part(labels, work)


def _pairs(
    arrays: Sequence[NamedArray], files: Sequence[Path], where: str, label_column: str | None
) -> dict[Split, tuple[NamedArray, NamedArray]]:
    """Return images and labels of each split.

    Raises:
        UserError: an array is missing, or two could have the same role; the message lists the arrays.
    """
    listing = short(", ".join(f"{found.where.rpartition('/')[2]} {found.array.shape}" for found in arrays), 300)
    found: dict[tuple[Split, str], NamedArray] = {}
    named = any(split_of(one.name) for one in arrays)
    for one in arrays:
        split, role = split_of(one.name), _role(one)
        if role is None or (named and split is None):
            continue
        if role == "labels" and label_column is not None and label_column not in one.name:
            continue
        other = found.setdefault((split or Split.TRAIN, role), one)
        if other is not one:
            remedy = "choose one by --label-column" if role == "labels" else "give the files to import, or rename one"
            raise UserError(
                f"{where}: both {other.where} and {one.where} could be the {split or Split.TRAIN} {role}; {remedy}"
            )
    pairs: dict[Split, tuple[NamedArray, NamedArray]] = {}
    for split in Split:
        images, labels = found.get((split, "images")), found.get((split, "labels"))
        if images is not None and labels is not None:
            pairs[split] = images, labels
        elif images is not None or labels is not None:
            raise UserError(
                f"{where}: {split} {'images' if images else 'labels'} lack "
                f"{'labels' if images else 'images'}; the arrays are {listing}{_partner(files)}"
            )
    if not pairs:
        raise UserError(
            f"{where}: expected arrays such as x_train, y_train, x_test and y_test, or train_images and train_labels, "
            f"got {listing}"
        )
    return pairs


def _partner(files: Sequence[Path]) -> str:
    """Return advice to also give the file that seems to belong to a single given one."""
    one = files[0]
    swapped = {"images": "labels", "labels": "images", "x": "y", "y": "x", "idx3": "idx1", "idx1": "idx3"}
    name = re.sub(r"images|labels|idx[13]|(?<![a-z])[xy](?![a-z])", lambda found: swapped[found[0]], one.stem)
    beside = [path for path in one.parent.glob(f"{name}*") if path.stem == name != one.stem]
    if len(files) > 1 or not beside:
        return ""
    return f"; also give {beside[0].name} next to it, or give the folder"


def _role(found: NamedArray) -> str | None:
    words = {word.strip("_") for word in re.split(r"[^a-z]+", found.name.lower())}
    joined = {word[:1] for word in words if word[:1] in ("x", "y") and split_of(word[1:] or "-")}  # xtrain, ytest
    if (words | joined) & LABEL_WORDS:
        return "labels"
    if (words | joined) & IMAGE_WORDS or found.array.ndim in (3, 4):
        return "images"
    return "labels" if found.array.ndim == 1 or found.array.shape[1:] == (1,) else None


def is_pickle(path: Path) -> bool:
    """Whether a file is from CIFAR's pickled version, or another pickle, by its name and first byte."""
    named: Any = path.suffix in (".pkl", ".pickle") or re.fullmatch(r"data_batch_\d|test_batch|train|test", path.name)
    try:
        with path.open("rb") as file:
            return bool(named) and file.read(1) == PICKLED
    except OSError:
        return False
