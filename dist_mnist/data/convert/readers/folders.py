"""Folders of picture files: a sub-folder for each class, or `train` and `test` folders of these."""

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

import numpy as np

from dist_mnist.data.convert.choices import Split
from dist_mnist.data.convert.pictures import SUFFIXES, Unusable, Work, picture_pixels
from dist_mnist.data.convert.readers.labels import LabelTable, natural_key
from dist_mnist.data.convert.readers.source import SPLIT_WORDS, Part, Reading, Source, batched, finished, split_of
from dist_mnist.data.sources.classes import NOT_DATA, class_folders, read_class_names
from dist_mnist.utils.errors import UserError, os_error_as, short

TEXTS = (b".txt", b".md", b".json", b".csv", b".xml")  # files that often accompany pictures
MAX_DEPTH = 64  # nested folders in a class folder
MAX_BYTES = 1 << 30  # in a picture file
FORM = "expected a sub-folder for each class, such as cat/ and dog/, or train/ and test/ folders of these"


@dataclass(frozen=True)
class Files:
    """Picture files to read, by their paths as bytes."""

    paths: tuple[bytes, ...]
    white: float | None

    def read(self) -> Iterator[np.ndarray | Unusable]:
        """Yield the pixels of each file."""
        return (_read(path, self.white) for path in self.paths)

    def name(self, index: int) -> str:
        """Return the path of a file."""
        return os.fsdecode(self.paths[index])


def _read(path: bytes, white: float | None) -> np.ndarray | Unusable:
    name = os.fsdecode(path)
    try:
        return picture_pixels(_content(path), name, white)
    except OSError as error:
        what = ", a broken link" if os.path.islink(path) and not os.path.exists(path) else ""
        return Unusable(f"{name}: cannot be read ({error.strerror or error}{what})")


def _content(path: bytes) -> bytes:
    """Read a file, if possible by one system call: small reads would cost as much as decoding.

    Raises:
        OSError: it cannot be read, is too large, or is not a regular file, which might never end.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # opening a pipe would block
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("not a regular file")
        if status.st_size > MAX_BYTES:
            raise OSError(f"{status.st_size:,} bytes exceed the limit of {MAX_BYTES:,} for a picture")
        content = os.read(handle, status.st_size + 1)
        while len(content) < status.st_size and (more := os.read(handle, status.st_size - len(content))):
            content += more
        return content
    finally:
        os.close(handle)


def open_folder(folder: Path, reading: Reading) -> Source:
    """Open the pictures below a folder, in natural order of their names across classes.

    If the folder has a classes.json, sub-folders are named after its classes, directly or by `class_folders`.

    Raises:
        UserError: there are no classes or no pictures, a link forms a loop, or an option of `reading` does not apply.
    """
    for option, value in (("--label-column", reading.label_column), ("--layout", reading.layout)):
        if value is not None:
            raise UserError(f"{option} {value} does not apply to {folder}, which has folders of picture files")
    known = read_class_names(folder)
    table = LabelTable(str(folder), known, is_fixed=True)
    labels = None if known is None else {name: str(label) for names in (known, class_folders(known))
                                          for label, name in enumerate(names)}  # fmt: skip
    with os_error_as(f"{folder}: its pictures cannot be listed"):
        splits, left_out = _split_folders(folder)
        found = {split: _part(path, table, labels, reading.pixel_max) for split, path in splits.items()}
    used = ", ".join(f"{path.name}/" for path in splits.values())
    notes = [f"skipped the folder {short(repr(name))} next to {used}" for name in left_out]
    if num_texts := sum(texts for _, texts in found.values()):
        notes.append(f"skipped {num_texts} text files in class folders")
    parts = {split: [part] for split, (part, _) in found.items()}
    return finished("pictures in folders", table, parts, notes)


def _split_folders(folder: Path) -> tuple[dict[Split, Path], list[str]]:
    """Return the folder of each split, and the names of the other sub-folders, which are skipped.

    The folder itself is the training split if its sub-folders are classes: if not all are named like splits, and none
    are train and test folders that contain class folders.
    """
    names = [os.fsdecode(name) for name in _sub_folders(folder)]
    found: dict[Split, list[str]] = {}
    for name in names:
        if split := split_of(name):
            found.setdefault(split, []).append(name)
    named = [name for some in found.values() for name in some]
    words = [name for name in names if name.lower() in SPLIT_WORDS]
    has_parts = Split.TRAIN in found and len(found) > 1 and all(_has_classes(folder / name) for name in named)
    if not has_parts and (len(named) < len(names) or (len(found) < len(names) and len(words) < len(names))):
        return {Split.TRAIN: folder}, []
    splits = {split: _split_folder(folder, split, [n for n in some if n in words] or some)
              for split, some in found.items()}  # fmt: skip
    left_out = [name for name in names if folder / name not in splits.values()]
    return {split: _unwrapped(path) for split, path in splits.items()} or {Split.TRAIN: folder}, left_out


def _split_folder(folder: Path, split: Split, names: Sequence[str]) -> Path:
    if len(names) > 1:
        raise UserError(f"{folder}: both {names[0]} and {names[1]} could be the {split} split; rename one")
    return folder / names[0]


def _has_classes(folder: Path) -> bool:
    return bool(_sub_folders(folder)) and not _loose_picture(folder)


def _unwrapped(folder: Path) -> Path:
    """Return the folder, or its only sub-folder if that has the same name, as in some archives."""
    return folder / folder.name if _sub_folders(folder) == [os.fsencode(folder.name)] else folder


def _sub_folders(folder: Path) -> list[bytes]:
    with os.scandir(os.fsencode(folder)) as entries:
        names = [entry.name for entry in entries if not _is_ignored(entry.name) and entry.is_dir()]
    return sorted(names, key=natural_key)


def _is_ignored(name: bytes) -> bool:
    return name.startswith(b".") or os.fsdecode(name).lower() in NOT_DATA


def _part(folder: Path, table: LabelTable, labels: Mapping[str, str] | None, white: float | None) -> tuple[Part, int]:
    """Return all pictures of a split, and the number of text files. Paths are kept compactly, as one byte string.

    `labels` has the labels of folders named after known classes.
    """
    names = _sub_folders(folder)
    loose = _loose_picture(folder)
    if not names or loose:
        what = f"{loose} is not in a class folder" if loose else "the folder has no sub-folders"
        raise UserError(f"{folder}: {what}; {FORM}")
    root = os.fsencode(folder)
    numbers = [table.number(_label(name, folder, labels), str(folder)) for name in names]
    paths, order, num_texts = _in_order([os.path.join(root, name) for name in names])

    def work(keep: np.ndarray, size: int) -> Iterator[Work]:
        prefixes = [os.path.join(root, name, b"") for name in names]
        whole = (prefixes[number] + path for number, path in zip(order, _unpacked(paths), strict=True))
        return (Files(paths, white) for paths in batched(compress(whole, keep), size))

    return Part(np.array(numbers, np.int32)[order], work), num_texts


def _label(name: bytes, folder: Path, labels: Mapping[str, str] | None) -> str:
    try:
        text = name.decode()
    except UnicodeDecodeError:
        raise UserError(f"{folder}: the name of the sub-folder {name!r} is not UTF-8; rename it") from None
    if labels is None:
        return text
    if text not in labels:
        raise UserError(
            f"{folder}: the sub-folder {short(repr(text))} is not a class in classes.json; add its name there, or "
            "remove classes.json to sort classes by name"
        )
    return labels[text]


def _loose_picture(folder: Path) -> str | None:
    """Return the name of a picture directly in the folder, or None."""
    with os.scandir(folder) as entries:
        return next((e.name for e in entries if e.name.lower().endswith(SUFFIXES) and not e.name.startswith(".")), None)


def _in_order(folders: Sequence[bytes]) -> tuple[bytes, np.ndarray, int]:
    """Return the paths of all files below `folders` except text, in natural order, and the folder of each.

    The paths are relative to their folders, joined, each terminated by a zero byte. The folders are indices (N,). The
    third value is the number of text files.
    """
    keys, num_texts = [], 0
    for number, folder in enumerate(folders):
        for path in _files(folder, b"", 0, set()):
            if path.lower().endswith(TEXTS):
                num_texts += 1
            else:
                keys.append(natural_key(path) + number.to_bytes(2, "big"))
    keys.sort()
    paths = b"".join(key[key.index(b"\0") + 1 : -2] + b"\0" for key in keys)
    return paths, np.frombuffer(b"".join(key[-2:] for key in keys), ">u2"), num_texts


def _unpacked(paths: bytes) -> Iterator[bytes]:
    start = 0
    while start < len(paths):
        end = paths.index(b"\0", start)
        yield paths[start:end]
        start = end + 1


def _files(folder: bytes, below: bytes, depth: int, seen: set[tuple[int, int]]) -> Iterator[bytes]:
    """Yield the files of a class folder. Each folder in it may occur only once, as links can form loops."""
    status = os.stat(os.path.join(folder, below))
    identity = (status.st_dev, status.st_ino)
    if depth == MAX_DEPTH:
        raise UserError(f"{os.fsdecode(folder)}: folders are nested more than {MAX_DEPTH} levels deep")
    if identity in seen:
        where = os.fsdecode(os.path.join(folder, below))
        raise UserError(f"{where} leads to a folder that is already part of this class; remove the link")
    seen.add(identity)
    with os.scandir(os.path.join(folder, below)) as entries:
        for entry in entries:
            if _is_ignored(entry.name):
                continue
            path = os.path.join(below, entry.name) if below else entry.name
            if entry.is_dir():
                yield from _files(folder, path, depth + 1, seen)
            else:
                yield path
