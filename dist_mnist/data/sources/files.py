"""Find the four files of a dataset in a folder, and unpack those that are gzip files."""

import gzip
import hashlib
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from filelock import FileLock

from dist_mnist.data.idx import unpack
from dist_mnist.utils.errors import UserError, os_error_as

# train-images-idx3-ubyte, t10k-labels.idx1-ubyte.gz, test-images-idx4-float, emnist-digits-train-images-idx3-ubyte ...
FILE_NAME = re.compile(r"(?:.+-)?(train|t10k|test)-(images|labels)[-.]idx[1-4]-\w+(\.gz)?")
SUBFOLDERS = (".", "raw", "MNIST/raw", "FashionMNIST/raw", "KMNIST/raw")
MAX_LABELS = 1 << 20  # bytes of a label file that are hashed to identify it
KINDS = ("train images", "train labels", "test images", "test labels")


@dataclass(frozen=True)
class SplitFiles:
    """The raw idx files of one split: images (NxHxW or NxHxWxC) and labels (N)."""

    images: Path
    labels: Path


def find_files(folder: Path, stage: bool = False) -> dict[str, SplitFiles]:
    """The raw files of the splits `train` and `test` in `folder`, or in torchvision's sub-folder `MNIST/raw`.

    Gzip files are unpacked first; with `stage`, the files are copied to this node's own disk. Either is done once, also
    when several processes ask at the same time.

    Raises:
        UserError: there is no such folder, a file is missing, or there are two candidates for one.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder of idx files; give another --data-dir")
    packed = next((found for sub in SUBFOLDERS if (found := _candidates(folder / sub))), {})
    missing = [kind for kind in KINDS if kind not in packed]
    if missing:
        raise UserError(
            f"{folder}: no file found for {', '.join(missing)}; expected are names such as train-images-idx3-ubyte and "
            f"t10k-labels-idx1-ubyte, raw or .gz, in the folder itself or in MNIST/raw{_broken_links(folder)}"
        )
    raw = {kind: _staged(_raw(packed[kind])) if stage else _raw(packed[kind]) for kind in KINDS}
    return {split: SplitFiles(raw[f"{split} images"], raw[f"{split} labels"]) for split in ("train", "test")}


def _broken_links(folder: Path) -> str:
    links = [path for sub in SUBFOLDERS for path in (folder / sub).glob("*") if FILE_NAME.fullmatch(path.name)]
    broken = [
        f"{path.name} is a link to {path.readlink()}" for path in links if path.is_symlink() and not path.exists()
    ]
    return f" ({'; '.join(broken)}, which is not there)" if broken else ""


def has_files(folder: Path) -> bool:
    """Whether `find_files` would find a complete dataset in `folder`."""
    return any(set(KINDS) <= set(_candidates(folder / sub)) for sub in SUBFOLDERS)


def digest_of_test_labels(folder: Path) -> str | None:
    """The SHA-256 of the raw file of test labels in `folder`, packed or not; None where there is none to be read."""
    paths = [path for sub in SUBFOLDERS if (path := _candidates(folder / sub).get("test labels"))]
    if not paths:
        return None
    try:
        with gzip.open(paths[0]) if paths[0].suffix == ".gz" else open(paths[0], "rb") as file:
            return hashlib.sha256(file.read(MAX_LABELS)).hexdigest()
    except (OSError, EOFError, zlib.error):
        return None


def _candidates(folder: Path) -> dict[str, Path]:
    """The files in `folder` by kind; a raw file is preferred to its gzip form.

    Raises:
        UserError: two different files could be meant.
    """
    found: dict[str, Path] = {}
    if not folder.is_dir():
        return found
    for path in sorted(folder.iterdir(), key=lambda path: (path.suffix == ".gz", path.name)):
        if not (match := FILE_NAME.fullmatch(path.name)) or not path.is_file():
            continue
        kind = f"{'train' if match[1] == 'train' else 'test'} {match[2]}"
        if kind not in found:
            found[kind] = path
        elif _unpacked_name(path) != _unpacked_name(found[kind]):
            raise UserError(
                f"{folder}: both {found[kind].name} and {path.name} could be the {kind}; keep one dataset to a folder"
            )
    return found


def _unpacked_name(path: Path) -> str:
    return path.name.removesuffix(".gz").replace(".idx", "-idx")


def _raw(path: Path) -> Path:
    """The raw form of an idx file: itself, or unpacked beside itself or, in a read-only folder, into the cache."""
    if path.suffix != ".gz":
        return path
    target = path.with_suffix("") if _writable(path.parent) else cache_folder() / _cache_name(path)
    advice = "make room there, or set DIST_MNIST_CACHE to a folder that can be written"
    with os_error_as(f"{path} cannot be unpacked to {target}", advice):
        target.parent.mkdir(parents=True, exist_ok=True)
        _make_once(target, partial(unpack, path))
    return target


def _staged(path: Path) -> Path:
    """A copy of a file on this node's own disk, in $TMPDIR, which clusters set, or else in /tmp."""
    folder = Path(tempfile.gettempdir()) / f"dist-mnist-{os.getuid()}"
    target = folder / _cache_name(path)
    advice = "make room there, set TMPDIR to another folder, or leave --stage-data out"
    with os_error_as(f"{path} cannot be copied to {folder}", advice):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise UserError(f"{folder} belongs to another user: set TMPDIR to a folder of your own for --stage-data")
        _make_once(target, partial(_copy, path))
    return target


def _copy(source: Path, target: Path) -> None:
    unfinished = target.with_name(f".{target.name}.tmp")
    shutil.copyfile(source, unfinished)
    unfinished.replace(target)


def _make_once(target: Path, make: Callable[[Path], object]) -> None:
    """Let `make` write `target` unless it is there; of processes that ask at once only the first one does."""
    with FileLock(target.with_name(f".{target.name}.lock")):
        if not target.exists():
            make(target)


def _writable(folder: Path) -> bool:
    """Whether the folder's permissions let anybody write: root may write even where they do not."""
    return os.access(folder, os.W_OK) and bool(folder.stat().st_mode & 0o222)


def cache_folder() -> Path:
    """Where unpacked copies of files in read-only folders live: $DIST_MNIST_CACHE, else the user's cache folder."""
    home_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("DIST_MNIST_CACHE") or home_cache / "dist_mnist")


def _cache_name(path: Path) -> str:
    """A name that changes with the file's path, size and modification time, so that no outdated copy is read."""
    stat = path.stat()
    identity = f"{path.resolve()}/{stat.st_size}/{stat.st_mtime_ns}"
    return f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}-{path.stem}"
