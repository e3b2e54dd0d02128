"""Detect the kind of a source by its files, and open it."""

import os
import re
import stat
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from dist_mnist.data.convert.choices import Split
from dist_mnist.data.convert.pictures import SUFFIXES
from dist_mnist.data.convert.readers.source import FileState, Reading, Source, split_of
from dist_mnist.data.idx import IdxError, read_header
from dist_mnist.utils.errors import UserError, os_error_as, short

ENDINGS = {
    ".csv": "CSV", ".csv.gz": "CSV", ".tsv": "CSV", ".tsv.gz": "CSV",
    ".npz": "npz", ".npy": "npy", ".parquet": "parquet",
}  # fmt: skip
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".7z", ".rar")
KINDS = (
    "folders of pictures (one for each class, or train/ and test/ folders of these), CSV, npz, npy, parquet, idx and "
    "CIFAR's binary version"
)
PICKLED = (
    "a pickle, which could run code and is never loaded; use CIFAR's binary version (cifar-10-binary.tar.gz, "
    "cifar-100-binary.tar.gz), or arrays saved by np.savez_compressed"
)
SHARD = re.compile(r"(.+)-([0-9]{1,7})-of-([0-9]{1,7})\.parquet")
MOST_LOOKED_AT = 10_000  # names checked in the search for a picture


def open_source(paths: Sequence[Path], reading: Reading, scratch: Path) -> Source:
    """Open one folder, or several files of one kind.

    Args:
        scratch: folder for unpacked files; it must exist until the pictures have been read.

    Raises:
        UserError: a path does not exist, or has nothing that can be imported.
    """
    for path in paths:
        with os_error_as(f"{path}: cannot be read"):
            mode = path.stat().st_mode
        if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
            raise UserError(f"{path} is neither a folder nor a file; a source is one of: {KINDS}")
    where = ", ".join(map(str, paths))
    folders = [path for path in paths if path.is_dir()]
    if folders and len(paths) > 1:
        raise UserError(f"{where}: give one folder, or files of one kind")
    if folders:
        return _open_folder(folders[0], reading, scratch)
    kinds = {kind_of(path) for path in paths}
    if len(kinds) > 1:
        raise UserError(f"{where}: the files are of different kinds; give files of one kind")
    [kind] = kinds
    if kind is None:
        raise UserError(_refusal(paths[0]))
    return _open_files(kind, paths, reading, scratch)


def kind_of(path: Path) -> str | None:
    """Return the kind of a file, by its suffix or (idx) its first bytes; None if it cannot be imported."""
    name = path.name.lower()
    if name.endswith(SUFFIXES):
        return None
    found = next((kind for ending, kind in ENDINGS.items() if name.endswith(ending)), None)
    return found or ("idx" if _is_idx(path) else None)


def _is_idx(path: Path) -> bool:
    try:
        read_header(path)
    except IdxError:
        return False
    return True


def _refusal(path: Path) -> str:
    from dist_mnist.data.convert.readers.arrays import is_pickle

    if is_pickle(path):
        return f"{path} is {PICKLED}"
    if path.name.lower().endswith(ARCHIVES):
        return f"{path}: unpack this archive first, and give the folder"
    if path.name.lower().endswith(SUFFIXES):
        return f"{path} is a single picture; give the folder that has a sub-folder of pictures for each class"
    return f"{path} cannot be imported; a source is one of: {KINDS}"


def _open_folder(folder: Path, reading: Reading, scratch: Path) -> Source:
    from dist_mnist.data.convert.readers import arrays, folders

    with os_error_as(f"{folder}: cannot be listed"):
        inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
        files = [path for path in inside if path.is_file()]
    if arrays.cifar_files(folder):
        return _watched(arrays.cifar_files(folder), lambda: arrays.open_cifar(folder, reading))
    by_kind: dict[str, list[Path]] = {}
    for path in files:
        if kind := kind_of(path):
            by_kind.setdefault(kind, []).append(path)
    if not by_kind and (inner := _only_folder(inside)):
        return _open_folder(inner, reading, scratch)
    if len(files) < len(inside) and ("CSV" in by_kind or not by_kind) and _has_pictures(inside):
        return folders.open_folder(folder, reading)
    if not by_kind:
        by_kind = {"parquet": _shards(folder)}
    if len(by_kind) > 1:
        found = ", ".join(f"{some[0].name} ({kind})" for kind, some in by_kind.items())
        raise UserError(f"{folder} has files of different kinds, {found}; give the files to import")
    [(kind, some)] = by_kind.items()
    if kind == "parquet":
        _check_shards(some)
    if some:
        return _open_files(kind, some, reading, scratch, folder)
    if pickled := [path for path in files if arrays.is_pickle(path)]:
        raise UserError(f"{folder}: {pickled[0].name} is {PICKLED}")
    if len(files) < len(inside):
        return folders.open_folder(folder, reading)
    names = short(", ".join(path.name for path in inside), 100)
    raise UserError(f"{folder} contains {names or 'nothing'}; a source is one of: {KINDS}")


def _only_folder(inside: Sequence[Path]) -> Path | None:
    """Return the only entry of a folder if it is a folder, as in unpacked archives, but not of a class or a split."""
    if len(inside) != 1 or not inside[0].is_dir() or split_of(inside[0].name):
        return None
    with os_error_as(f"{inside[0]}: cannot be listed"):
        names = [path.name for path in inside[0].iterdir()]
    return None if not names or any(name.lower().endswith(SUFFIXES) for name in names) else inside[0]


def _shards(folder: Path) -> list[Path]:
    """Return the parquet files in sub-folders, as in data/train-00000-of-00001.parquet, except hidden ones."""
    found = sorted(path for path in folder.rglob("*.parquet") if path.is_file())
    return [path for path in found if not any(name.startswith(".") for name in path.relative_to(folder).parts)]


def _check_shards(paths: Sequence[Path]) -> None:
    """Raise a UserError if a shard is missing, by the count in names such as train-00000-of-00004.parquet."""
    found: dict[tuple[Path, str, str], set[int]] = {}
    for path in paths:
        if match := SHARD.fullmatch(path.name):
            found.setdefault((path.parent, match[1], match[3]), set()).add(int(match[2]))
    for (folder, name, total), numbers in found.items():
        if missing := sorted(set(range(int(total))) - numbers)[:1]:
            file = f"{name}-{missing[0]:0{len(total)}}-of-{total}.parquet"
            raise UserError(f"{folder}: {file} is missing; add it, or give the files to import")


def _has_pictures(inside: Sequence[Path]) -> bool:
    """Whether one of the first files below these folders is a picture."""
    looked_at = 0
    for folder in inside:
        for _, _, names in os.walk(folder):
            if any(name.lower().endswith(SUFFIXES) for name in names):
                return True
            looked_at += len(names)
            if looked_at > MOST_LOOKED_AT:
                return False
    return False


def _open_files(
    kind: str, files: Sequence[Path], reading: Reading, scratch: Path, folder: Path | None = None
) -> Source:
    from dist_mnist.data.convert.readers import arrays, csv_table, parquet

    openers: dict[str, Callable[[], Source]] = {
        "CSV": lambda: csv_table.open_csv(_by_split(files, folder), reading),
        "parquet": lambda: parquet.open_parquet(_by_split(files, folder), reading),
        "npz": lambda: arrays.open_npz(files, reading, scratch),
        "npy": lambda: arrays.open_npy(files, reading),
        "idx": lambda: arrays.open_idx_files(files, reading, scratch),
    }
    return _watched(files, openers[kind])


def _watched(files: Sequence[Path], open_files: Callable[[], Source]) -> Source:
    """Open a source that can detect whether its files have changed since."""
    states = tuple(map(FileState.of, files))
    return replace(open_files(), files=states)


def _by_split(files: Sequence[Path], folder: Path | None) -> list[tuple[Split, Path]]:
    """Return the files with the splits named in their paths below `folder`; all are training files if none is named.

    If only some names have a split, the other files (a sample submission, for example) are skipped.
    """
    found = [(split_of(path.name) or _split_of_folder(path, folder), path) for path in files]
    named = [(split, path) for split, path in found if split is not None]
    return named or [(Split.TRAIN, path) for path in files]


def _split_of_folder(path: Path, folder: Path | None) -> Split | None:
    return None if folder in (None, path.parent) else split_of(path.parent.name)
