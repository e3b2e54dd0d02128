"""What was put into a folder by a conversion: `dataset.json`, by which its files are checked and recognised."""

from pathlib import Path

import msgspec

from dist_mnist.utils.errors import os_error_as
from dist_mnist.utils.files import atomic_write, file_sha256, to_json
from dist_mnist.utils.schema import parse

FILE_NAME = "dataset.json"
MAX_BYTES = 1 << 20


class StoredFile(msgspec.Struct, frozen=True):
    """A file as it was written."""

    num_bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True):
    """A known data set, and its files by name."""

    dataset: str
    files: dict[str, StoredFile]


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest in `folder`; None where there is none, or a file of that name is something else."""
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    with os_error_as(f"{path}: cannot be read"), path.open("rb") as file:
        content = file.read(MAX_BYTES)
    try:
        return parse(content, Manifest)
    except ValueError:
        return None


def write_manifest(folder: Path, dataset: str, names: list[str]) -> None:
    """Write the manifest of the files `names` in `folder`, which are read for their checksums."""
    paths = [folder / name for name in names]
    files = {path.name: StoredFile(path.stat().st_size, file_sha256(path)) for path in paths}
    with atomic_write(folder / FILE_NAME) as file:
        file.write(to_json(Manifest(dataset, files), indent=1).encode())
