"""Verification of a known dataset's files for `data get`: by length, checksum, and the archive next to a file."""

import gzip
import hashlib
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, NamedTuple, cast

from dist_mnist.data.idx import CHUNK, IdxError, open_idx, stream_idx, unpack
from dist_mnist.data.sources.files import digest_of_test_labels
from dist_mnist.data.sources.known.manifest import read_manifest
from dist_mnist.data.sources.known.records import KnownDataset, KnownFile
from dist_mnist.utils.errors import UserError, os_error_as, warn
from dist_mnist.utils.files import file_sha256

GZIP_MAGIC = b"\x1f\x8b"


class Damage(NamedTuple):
    """A damaged file, and what is wrong with it."""

    path: Path
    why: str


def differs(path: Path, file: KnownFile) -> str | None:
    """Return how the file at `path` differs from the published one; None if it does not."""
    size = path.stat().st_size
    if file.num_bytes not in (None, size):
        return f"it has {size} bytes, the published file {file.num_bytes}"
    algorithm, digest = file.checksum.split(":")
    with path.open("rb") as content:
        found = hashlib.file_digest(content, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()
    return None if found == digest else f"its {algorithm.upper()} differs from the published one"


def is_converted(dataset: KnownDataset, folder: Path) -> bool:
    """Whether `folder` has all converted files in their original lengths; their content is not read."""
    manifest = read_manifest(folder)
    files = manifest.files if manifest and manifest.dataset == dataset.name else {}
    return bool(files) and all(
        (folder / name).is_file() and (folder / name).stat().st_size == stored.num_bytes
        for name, stored in files.items()
    )


def damaged_files(dataset: KnownDataset, folder: Path, names_of: Callable[[KnownFile], Iterable[str]]) -> list[Damage]:
    """Return the damaged files of `dataset` in `folder`; all files are read in full.

    Args:
        names_of: the names that a published file may have there, unpacked or not.
    """
    with os_error_as(f"{folder}: cannot be verified"):
        if dataset.conversion is None:
            return [damage for file in dataset.files for damage in _damaged_forms(file, folder, names_of(file))]
        manifest = read_manifest(folder)
        stored = manifest.files.items() if manifest else ()
        checked = ((folder / name, file.num_bytes, file.sha256) for name, file in stored)
        return [Damage(path, why) for path, size, digest in checked if (why := _changed(path, size, digest))]


def mend(
    dataset: KnownDataset,
    folder: Path,
    names_of: Callable[[KnownFile], Iterable[str]],
    download: Callable[[KnownFile, Path], object],
) -> None:
    """Replace damaged files from the archive next to them or a mirror, and name each on stderr.

    Raises:
        UserError: the folder has another dataset, or no mirror provides a file, which is then left unchanged.
    """
    damages = damaged_files(dataset, folder, names_of)
    _check_is_this(dataset, folder, [damage.path for damage in damages])
    for file in dataset.files:
        paths = [folder / name for name in names_of(file)]
        damaged = {damage.path: damage.why for damage in damages if damage.path in paths}
        archives = (path for path in paths if path.suffix == ".gz" and path.is_file() and path not in damaged)
        archive = next(archives, None)
        for path, why in damaged.items():
            warn(f"{path}: {why}; {'unpacking' if archive else 'downloading'} it again")
        if damaged and archive is None:
            download(file, folder)
            archive = folder / file.name
        for path in damaged:
            if path != archive:
                path.unlink()
            if archive is not None and path.suffix != ".gz":
                unpack(archive, path)


def _check_is_this(dataset: KnownDataset, folder: Path, damaged: list[Path]) -> None:
    """Raise a UserError if the test labels are intact and of another dataset: then nothing may be replaced."""
    if not damaged or any("labels" in path.name and not path.name.startswith("train") for path in damaged):
        return
    if dataset.test_labels_sha256 not in (None, digest_of_test_labels(folder)):
        raise UserError(
            f"{damaged[0]} is damaged, but {folder} has a dataset other than {dataset.name}, so it was not replaced: "
            "give another folder"
        )


def _changed(path: Path, num_bytes: int, sha256: str) -> str | None:
    if not path.is_file():
        return "it is missing"
    size = path.stat().st_size
    if size != num_bytes:
        return f"it has {size} bytes, expected {num_bytes}"
    return None if file_sha256(path) == sha256 else "its content has changed since it was written"


def _damaged_forms(file: KnownFile, folder: Path, names: Iterable[str]) -> Iterable[Damage]:
    paths = [path for name in names if (path := folder / name).is_file()]
    archives = [path for path in paths if path.suffix == ".gz" and differs(path, file) is None]
    for path in paths:
        if path in archives:
            continue
        if why := _idx_damage(path):
            yield Damage(path, why)
        elif archives and path.suffix != ".gz" and _crc(path) != _crc_in(archives[0]):
            yield Damage(path, f"its content differs from {archives[0].name}")
        elif not archives and path.suffix == ".gz":
            warn(f"{path} is intact, but not the published file ({differs(path, file)}); it was not changed")


def _idx_damage(path: Path) -> str | None:
    """Return what is wrong with an idx file, packed or not, regardless of its name; None if it is intact."""
    try:
        with path.open("rb") as file:
            is_packed = file.read(2) == GZIP_MAGIC
        if not is_packed:
            open_idx(path)
            return None
        with gzip.open(path) as content:
            for _ in stream_idx(cast(IO[bytes], content), path)[1]:
                pass
    except IdxError as error:
        return str(error).removeprefix(f"{path}").removeprefix(":").strip().split(";")[0]
    return None


def _crc(path: Path) -> int:
    """Return the CRC-32 of a file's bytes."""
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


def _crc_in(archive: Path) -> int:
    """Return the CRC-32 of a single-member gzip file's content, as stored in its trailer."""
    with archive.open("rb") as file:
        file.seek(-8, 2)
        return int.from_bytes(file.read(4), "little")
