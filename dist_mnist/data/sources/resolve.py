"""The data folder of a run: given, found, downloaded or generated."""

import os
import sys
from pathlib import Path

from dist_mnist.data.sources.catalog import CATALOG, known
from dist_mnist.data.sources.download import fetch
from dist_mnist.data.sources.files import digest_of_test_labels, find_files, has_files
from dist_mnist.data.sources.known.manifest import read_manifest
from dist_mnist.data.sources.synthetic import write_digits
from dist_mnist.utils.errors import UserError, os_error_as
from dist_mnist.utils.files import locked

DEFAULT_ROOT = Path("data")


def data_folder(dataset: str | None, data_dir: Path | None = None, need_test: bool = True) -> Path:
    """Return the folder of idx files to use, in this order: `data_dir`, $DIST_MNIST_DATA, data/, else a download.

    $DIST_MNIST_DATA and data/ hold the files themselves, or sub-folders named after datasets. With `dataset` None, use
    the sub-folder of MNIST, or the dataset in the folder itself; otherwise only the requested dataset. `synthetic`
    digits are generated instead of downloaded. Without `need_test`, test files may be missing.

    Raises:
        UserError: the given folder has no dataset, or no mirror of the dataset answers.
    """
    if data_dir is not None:
        find_files(data_dir, need_test=need_test)
        return data_dir
    named = os.environ.get("DIST_MNIST_DATA")
    root = Path(named) if named else DEFAULT_ROOT
    wanted = dataset or "mnist"
    if has_files(root / wanted, need_test):
        return _checked(root / wanted, wanted)
    if has_files(root, need_test) and (dataset is None or identify(root) == dataset):
        return root
    if named and not root.is_dir():
        raise UserError(f"{root}: the folder does not exist; correct DIST_MNIST_DATA, or give --data-dir")
    return get(wanted, root / wanted)


def get(dataset: str, folder: Path, verify: bool = False) -> Path:
    """Download or generate a dataset in `folder`; existing files are not changed.

    With `verify`, existing files are read in full, and damaged ones are replaced.

    Raises:
        UserError: the name is unknown, the folder has another dataset or is not writable, or no mirror answers.
    """
    _checked(folder, dataset)
    with os_error_as(f"{folder}: cannot write data there", "give another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        if dataset != "synthetic":
            return fetch(known(dataset), folder, verify=verify)
        with locked(folder / ".generate.lock", "processes that need the same data at the same time each generate it"):
            if not has_files(folder):
                print(f"Generating synthetic digits in {folder} ...", file=sys.stderr)
                write_digits(folder)
    return folder


def _checked(folder: Path, dataset: str) -> Path:
    """Return the folder; raise a UserError if it has another known dataset."""
    found = identify(folder)
    if found not in (None, dataset):
        raise UserError(f"{folder} has {found}, not {dataset}: move it, or give another folder")
    return folder


def identify(folder: Path) -> str | None:
    """Return the known dataset in a folder, by its manifest or the SHA-256 of its test labels, else None."""
    manifest = read_manifest(folder)
    if manifest and manifest.dataset in CATALOG:
        return manifest.dataset
    digest = digest_of_test_labels(folder)
    return next((name for name, known in CATALOG.items() if digest and known.test_labels_sha256 == digest), None)
