"""The manifest of a converted dataset: `dataset.json`, which identifies it and has the checksums of its files."""

from pathlib import Path

import msgspec

from dist_mnist.utils.errors import os_error_as
from dist_mnist.utils.files import atomic_write, file_sha256, to_json
from dist_mnist.utils.schema import parse

FILE_NAME = "dataset.json"
MAX_BYTES = 1 << 20


class StoredFile(msgspec.Struct, frozen=True):
    """Size and checksum of a file when it was written."""

    num_bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True):
    """A known dataset and its files by name."""

    dataset: str
    files: dict[str, StoredFile]


def read_manifest(folder: Path) -> Manifest | None:
    """Read the manifest in `folder`; None if there is no valid one."""
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
    """Write the manifest of the files `names` in `folder`, reading them for their checksums."""
    paths = [folder / name for name in names]
    files = {path.name: StoredFile(path.stat().st_size, file_sha256(path)) for path in paths}
    with atomic_write(folder / FILE_NAME) as file:
        file.write(to_json(Manifest(dataset, files), indent=1).encode())
