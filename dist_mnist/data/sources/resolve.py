"""The folder that a run's data comes from: one that is named or found, or a new one, downloaded or generated."""

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
    """The folder of idx files to use, in this order: `data_dir`, $DIST_MNIST_DATA, data/, and else a download.

    $DIST_MNIST_DATA and data/ may hold the files themselves, or sub-folders named like the datasets. With `dataset`
    None it is MNIST's sub-folder, or whatever dataset the folder itself holds; otherwise only the one that is asked
    for. `synthetic` digits are generated instead of downloaded. Without `need_test` there may be no test files.

    Raises:
        UserError: the folder that is named does not hold a dataset, or no mirror of the dataset answers.
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
        raise UserError(f"{root}: there is no such folder; correct DIST_MNIST_DATA, or give --data-dir")
    return get(wanted, root / wanted)


def get(dataset: str, folder: Path, verify: bool = False) -> Path:
    """Make `folder` hold a dataset, by download or generation; what is there already is left as it is.

    With `verify`, the files that are there are read to their ends, and those that are not whole are replaced.

    Raises:
        UserError: the name is unknown, the folder holds another dataset or cannot be written, or no mirror answers.
    """
    _checked(folder, dataset)
    with os_error_as(f"{folder}: data cannot be stored there", "give another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        if dataset != "synthetic":
            return fetch(known(dataset), folder, verify=verify)
        with locked(folder / ".generate.lock", "processes that need the same data at once each generate it"):
            if not has_files(folder):
                print(f"Generating handwritten-like digits in {folder} ...", file=sys.stderr)
                write_digits(folder)
    return folder


def _checked(folder: Path, dataset: str) -> Path:
    """The folder, after a check that it does not hold another known dataset."""
    found = identify(folder)
    if found not in (None, dataset):
        raise UserError(f"{folder} holds {found}, not {dataset}: move it, or name the folder that you mean")
    return folder


def identify(folder: Path) -> str | None:
    """The known dataset that a folder holds, by its manifest or its test labels' SHA-256; None: another one or none."""
    manifest = read_manifest(folder)
    if manifest and manifest.dataset in CATALOG:
        return manifest.dataset
    digest = digest_of_test_labels(folder)
    return next((name for name, known in CATALOG.items() if digest and known.test_labels_sha256 == digest), None)
