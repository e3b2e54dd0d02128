"""Folders of picture files: a sub-folder for each class, or `train` and `test` folders of those."""

import heapq
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

import numpy as np

from dist_mnist.data.convert.choices import Split
from dist_mnist.data.convert.labels import LabelTable, natural_key
from dist_mnist.data.convert.pictures import SUFFIXES, Unusable, Work, picture_pixels
from dist_mnist.data.convert.readers.source import SPLIT_WORDS, Part, Source, batched, finished, split_of
from dist_mnist.utils.errors import UserError, os_error_as

NOT_DATA = ("__macosx", "thumbs.db", "desktop.ini")  # what systems leave in folders, beside hidden files
MAX_DEPTH = 64  # of folders below a class's
PATH = re.compile(rb"[^\0]+")
FORM = "expected is a sub-folder for each class, such as cat/ and dog/, or train/ and test/ folders of those"


@dataclass(frozen=True)
class Files:
    """Picture files to read, by their paths as the system has them."""

    paths: tuple[bytes, ...]

    def read(self) -> Iterator[np.ndarray | Unusable]:
        """The pixels of each."""
        return map(_read, self.paths)

    def name(self, index: int) -> str:
        """Its path."""
        return os.fsdecode(self.paths[index])


def _read(path: bytes) -> np.ndarray | Unusable:
    name = os.fsdecode(path)
    try:
        if not os.path.isfile(path):
            return Unusable(f"{name}: this is no file" + (", but a broken link" if os.path.islink(path) else ""))
        with open(path, "rb") as file:
            return picture_pixels(file, name)
    except OSError as error:
        return Unusable(f"{name}: cannot be read ({error.strerror or error})")


def open_folder(folder: Path) -> Source:
    """The pictures below a folder, in the order of their names, whatever their class; numbers in names count by value.

    Raises:
        UserError: there are no classes or no pictures, or the folder leads back to itself.
    """
    table = LabelTable(str(folder))
    with os_error_as(f"{folder}: the pictures in it cannot be listed"):
        parts = {split: [_part(path, table)] for split, path in _split_folders(folder).items()}
    return finished("pictures in folders", table, parts)


def _split_folders(folder: Path) -> dict[Split, Path]:
    """The folder of each split: the folder itself where its sub-folders are classes, not splits."""
    names = [os.fsdecode(name) for name in _sub_folders(folder)]
    found: dict[Split, Path] = {}
    for name in names:
        split = split_of(name)
        if split in found and all(name.lower() in SPLIT_WORDS for name in names):
            raise UserError(f"{folder}: both {found[split].name} and {name} could be the {split} part; rename one")
        if split is None or split in found:
            return {Split.TRAIN: folder}
        found[split] = _unwrapped(folder / name)
    return found or {Split.TRAIN: folder}


def _unwrapped(folder: Path) -> Path:
    """The folder, or the one of the same name that is all there is in it, as some archives have it."""
    return folder / folder.name if _sub_folders(folder) == [os.fsencode(folder.name)] else folder


def _sub_folders(folder: Path) -> list[bytes]:
    with os.scandir(os.fsencode(folder)) as entries:
        names = [entry.name for entry in entries if not _is_ignored(entry.name) and entry.is_dir()]
    return sorted(names, key=natural_key)


def _is_ignored(name: bytes) -> bool:
    return name.startswith(b".") or os.fsdecode(name).lower() in NOT_DATA


def _part(folder: Path, table: LabelTable) -> Part:
    """All pictures of a split; of each class the paths are kept as one string of bytes, which is small."""
    names = _sub_folders(folder)
    loose = _loose_picture(folder)
    if not names or loose:
        what = f"{loose} lies in no class's folder" if loose else "there are no sub-folders in it"
        raise UserError(f"{folder}: {what}; {FORM}")
    root = os.fsencode(folder)
    numbers = [table.number(_class_name(name, folder), str(folder)) for name in names]
    lists = [_paths_below(os.path.join(root, name)) for name in names]
    order = np.fromiter(_merged(lists), np.int32)  # in it the folders of all pictures, by the pictures' names

    def work(keep: np.ndarray, size: int) -> Iterator[Work]:
        paths = [PATH.finditer(one) for one in lists]
        all_paths = (os.path.join(root, names[number], next(paths[number])[0]) for number in order)
        return map(Files, batched(compress(all_paths, keep), size))

    return Part(np.array(numbers, np.int32)[order], work)


def _class_name(name: bytes, folder: Path) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise UserError(f"{folder}: the name of the sub-folder {name!r} is not UTF-8; rename it") from None


def _loose_picture(folder: Path) -> str | None:
    """The name of a picture that lies in the folder itself, if there is one."""
    with os.scandir(folder) as entries:
        return next((e.name for e in entries if e.name.lower().endswith(SUFFIXES) and not e.name.startswith(".")), None)


def _paths_below(folder: bytes) -> bytes:
    """The paths of all files below a folder, relative to it, in their natural order, each ended by a zero byte."""
    found = sorted(_files(folder, b"", ()), key=natural_key)
    return b"".join(path + b"\0" for path in found)


def _files(folder: bytes, below: bytes, above: Sequence[tuple[int, int]]) -> Iterator[bytes]:
    status = os.stat(os.path.join(folder, below))
    identity = (status.st_dev, status.st_ino)
    if len(above) == MAX_DEPTH:
        raise UserError(f"{os.fsdecode(folder)}: folders in it lie more than {MAX_DEPTH} deep")
    if identity in above:
        raise UserError(f"{os.fsdecode(os.path.join(folder, below))} leads back to a folder above it; remove the link")
    with os.scandir(os.path.join(folder, below)) as entries:
        for entry in entries:
            path = os.path.join(below, entry.name)
            if _is_ignored(entry.name):
                continue
            if entry.is_dir():
                yield from _files(folder, path, (*above, identity))
            else:
                yield path


def _merged(lists: Sequence[bytes]) -> Iterator[int]:
    """For each path of all lists, in the natural order of the paths, the index of the list that it is in."""
    return (number for _, number in heapq.merge(*(_keys(number, paths) for number, paths in enumerate(lists))))


def _keys(number: int, paths: bytes) -> Iterator[tuple[bytes, int]]:
    return ((natural_key(found[0]), number) for found in PATH.finditer(paths))
