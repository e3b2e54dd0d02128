"""Where a run's data comes from: a folder that is named, one that is found, or one that is downloaded or generated."""

import os
import sys
from pathlib import Path

from filelock import FileLock

from dist_mnist.data.catalog import known
from dist_mnist.data.fetch import fetch
from dist_mnist.data.locate import find_files, has_files
from dist_mnist.data.synthetic import write_digits
from dist_mnist.errors import UserError

DEFAULT_ROOT = Path("data")


def data_folder(dataset: str, data_dir: Path | None = None) -> Path:
    """The folder of idx files to use, in this order: `data_dir`, $DIST_MNIST_DATA, data/, and else a download.

    The latter two may hold the files themselves or in a sub-folder named like the data set. `synthetic` digits are
    generated instead of downloaded.

    Raises:
        UserError: the folder that is named does not hold a data set, or no mirror of the data set answers.
    """
    if data_dir is not None:
        find_files(data_dir)
        return data_dir
    named = os.environ.get("DIST_MNIST_DATA")
    root = Path(named) if named else DEFAULT_ROOT
    for folder in (root / dataset, root):
        if has_files(folder) and not (folder == root and dataset == "synthetic"):
            return folder
    if named and not root.is_dir():
        raise UserError(f"{root}: there is no such folder; correct DIST_MNIST_DATA, or give --data-dir")
    return get(dataset, root / dataset)


def get(dataset: str, folder: Path) -> Path:
    """Make `folder` hold a data set, by download or generation; what is there already is left as it is.

    Raises:
        UserError: the name is unknown, the folder cannot be written, or no mirror answers.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if dataset != "synthetic":
            return fetch(known(dataset), folder)
        with FileLock(folder / ".generate.lock"):
            if not has_files(folder):
                print(f"Generating handwritten-like digits in {folder} ...", file=sys.stderr)
                write_digits(folder)
        return folder
    except OSError as error:
        raise UserError(f"{folder}: data cannot be stored there ({error.strerror}); give another folder") from None
