"""Find the files of a dataset in a folder, under any of their common names, and unpack gzip files.

The first bytes tell gzip from raw. The folder is only read, except that NAME.gz is unpacked to NAME next to it, once,
if the folder is writable.
"""

import gzip
import hashlib
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dist_mnist.data.idx import IdxError, is_gzip, read_header, unpack
from dist_mnist.utils.errors import UserError, os_error_as
from dist_mnist.utils.files import locked

# train-images-idx3-ubyte, t10k-labels.idx1-ubyte.gz, TEST-IMAGES-IDX4-FLOAT, emnist-digits-train-images-idx3-ubyte ...
FILE_NAME = re.compile(
    r"(?:.+[-_.])?(train|training|t10k|test|val|valid|validation)[-_.](images|labels)[-_.]idx[1-4]?(?:[-_]\w+)?(?:\.gz)?",
    re.IGNORECASE,
)
PARTS = {"training": "train", "t10k": "test", "valid": "val", "validation": "val"}
EACH = "processes that need the same file at the same time each create it"
SUBFOLDERS = (".", "raw", "MNIST/raw", "FashionMNIST/raw", "KMNIST/raw")
MAX_LABELS = 1 << 20  # bytes of a label file hashed to identify it
TRAIN, TEST, VAL = (tuple(f"{part} {what}" for what in ("images", "labels")) for part in ("train", "test", "val"))


@dataclass(frozen=True)
class SplitFiles:
    """The raw idx files of one split, and notes for the user on how they were chosen."""

    images: Path
    labels: Path
    notes: tuple[str, ...] = ()


def find_files(folder: Path, stage: bool = False, need_test: bool = True) -> dict[str, SplitFiles]:
    """Return the raw files of the splits `train` and `test` in `folder`, or in torchvision's sub-folder `MNIST/raw`.

    Gzip files are unpacked first; with `stage`, files are copied to this node's local disk. Both happen once, even if
    several processes ask at the same time. Files with `val` in their names are the test split if there is no other.
    Without `need_test`, the test files may be missing, and the result then has no `test`.

    Raises:
        UserError: the folder or a file is missing, or two files could be the same part of the dataset.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: the folder of idx files does not exist; give another --data-dir")
    found = next((found for sub in SUBFOLDERS if (found := _candidates(folder / sub))), {})
    files, notes = _with_test(found)
    missing = [kind for kind in (*TRAIN, *TEST) if kind not in files]
    if missing and (need_test or missing != [*TEST]):
        train_only = " (or hold out some training images by --test-fraction 0.1)" if missing == [*TEST] else ""
        raise UserError(
            f"{folder}: no file found for {', '.join(missing)}; expected names such as train-images-idx3-ubyte and "
            f"t10k-labels-idx1-ubyte, raw or .gz, in the folder itself or in MNIST/raw{train_only}"
            f"{_broken_links(folder)}"
        )
    splits = {"train": _split([files[kind] for kind in TRAIN], stage, ())}
    return splits | ({} if missing else {"test": _split([files[kind] for kind in TEST], stage, notes)})


def _split(kinds: Sequence[Sequence[Path]], stage: bool, notes: tuple[str, ...]) -> SplitFiles:
    (images, of_images), (labels, of_labels) = map(_raw, kinds)
    if stage:
        images, labels = _staged(images), _staged(labels)
    return SplitFiles(images, labels, (*notes, *of_images, *of_labels))


def _broken_links(folder: Path) -> str:
    links = [path for sub in SUBFOLDERS for path in (folder / sub).glob("*") if FILE_NAME.fullmatch(path.name)]
    broken = [
        f"{path.name} is a link to {path.readlink()}" for path in links if path.is_symlink() and not path.exists()
    ]
    return f" ({'; '.join(broken)}, which does not exist)" if broken else ""


def has_files(folder: Path, need_test: bool = True) -> bool:
    """Whether `find_files` would find a complete dataset in `folder`."""
    needed = {*TRAIN, *TEST} if need_test else {*TRAIN}
    return any(needed <= set(_with_test(_candidates(folder / sub))[0]) for sub in SUBFOLDERS)


def digest_of_test_labels(folder: Path) -> str | None:
    """Return the SHA-256 of the unpacked test label file in `folder`; None if there is no readable one."""
    found = (_with_test(_candidates(folder / sub))[0].get("test labels") for sub in SUBFOLDERS)
    if not (paths := next(filter(None, found), None)):
        return None
    path, _ = _chosen(paths)
    try:
        with gzip.open(path) if is_gzip(path) else open(path, "rb") as file:
            return hashlib.sha256(file.read(MAX_LABELS)).hexdigest()
    except (OSError, EOFError, zlib.error):
        return None


def one_form_each(paths: Sequence[Path]) -> tuple[list[Path], tuple[str, ...]]:
    """Return one file for each idx file: of its raw and packed form, the one that `find_files` would read.

    Nothing is unpacked. The second value has notes for the user on these choices.
    """
    by_name: dict[Path, list[Path]] = {}
    for path in sorted(paths, key=lambda path: (path.suffix.lower() == ".gz", path.name)):
        by_name.setdefault(path.with_name(path.name.lower().removesuffix(".gz")), []).append(path)
    found = [(forms[0], *_chosen(forms)) for forms in by_name.values()]
    notes = (_instead(raw, defect, path) for raw, path, defect in found if defect)
    return [path for _, path, _ in found], tuple(notes)


def _candidates(folder: Path) -> dict[str, list[Path]]:
    """Return the files in `folder` by kind, such as "train images": each file's forms, names without `.gz` first.

    Raises:
        UserError: two different files could be of the same kind.
    """
    found: dict[str, list[Path]] = {}
    if not folder.is_dir():
        return found
    for path in sorted(folder.iterdir(), key=lambda path: (path.suffix.lower() == ".gz", path.name)):
        hidden = path.name.startswith(".")  # unfinished files, and macOS's metadata files `._FILE`
        if hidden or not (match := FILE_NAME.fullmatch(path.name)) or not path.is_file():
            continue
        part, what = match[1].lower(), match[2].lower()
        kind = f"{PARTS.get(part, part)} {what}"
        forms = found.setdefault(kind, [])
        if forms and _unpacked_name(path) != _unpacked_name(forms[0]):
            raise UserError(
                f"{folder}: both {forms[0].name} and {path.name} could be the {kind}; keep one dataset per folder"
            )
        forms.append(path)
    return found


def _unpacked_name(path: Path) -> str:
    return re.sub(r"[._]", "-", path.name.lower().removesuffix(".gz"))


def _with_test(found: Mapping[str, list[Path]]) -> tuple[dict[str, list[Path]], tuple[str, ...]]:
    """Return the training and test files by kind, and notes on files called `val`."""
    files = {kind: paths for kind, paths in found.items() if kind not in VAL}
    if not found.keys() & {*VAL}:
        return files, ()
    names = ", ".join(found[kind][0].name for kind in VAL if kind in found)
    if files.keys() & {*TEST}:
        return files, (f"{names}: not read, because there are test files, and validation uses training images",)
    return files | {test: found[val] for test, val in zip(TEST, VAL, strict=True) if val in found}, (
        f"{names}: read as the test files, because there are no others",
    )


def _raw(forms: Sequence[Path]) -> tuple[Path, tuple[str, ...]]:
    """Return the raw form of an idx file, unpacked if necessary, and notes for the user."""
    path, defect = _chosen(forms)
    if not is_gzip(path):
        return path, ()
    if not defect:
        return _unpacked(path), ()
    try:
        raw = _unpacked(path, beside=False)
    except IdxError:
        return forms[0], ()  # both are damaged; opening the raw file reports its defect
    return raw, (_instead(forms[0], defect, path),)


def _instead(raw: Path, defect: str, packed: Path) -> str:
    return f"{raw} {defect}: reading the intact {packed.name} instead"


def _chosen(forms: Sequence[Path]) -> tuple[Path, str | None]:
    """Return which form of a file to read, raw or packed, and the defect of the raw form if it is passed over."""
    packed = [path for path in forms if is_gzip(path)]
    raw = [path for path in forms if path not in packed]
    if not packed or not raw:
        return forms[0], None
    defect = _defect(raw[0], packed[0])
    return (packed[0] if defect else raw[0]), defect


def _defect(raw: Path, packed: Path) -> str | None:
    """Return how a raw file visibly differs from the archive next to it, without unpacking; None if it does not."""
    try:
        expected = read_header(packed)
    except IdxError:
        return None  # the archive itself is damaged
    try:
        header = read_header(raw)
    except IdxError:
        return "is not an idx file"
    size = raw.stat().st_size
    if size != header.file_size:
        defect = "truncated" if size < header.file_size else "too long"
        return f"is {defect} ({size} bytes, expected {header.file_size})"
    if header != expected:
        return f"is stale ({header.dtype.name} {header.shape}, expected {expected.dtype.name} {expected.shape})"
    return None


def _unpacked(path: Path, beside: bool = True) -> Path:
    """Unpack an archive NAME.gz to NAME next to it, or into the cache if the name or a read-only folder forbids it."""
    target = path.with_suffix("")
    if not (beside and path.suffix.lower() == ".gz" and _writable(path.parent)) or target.is_dir():
        target = cache_folder() / _cache_name(path)
    advice = "free some space there, or set DIST_MNIST_CACHE to a writable folder"
    with os_error_as(f"{path} cannot be unpacked to {target}", advice):
        target.parent.mkdir(parents=True, exist_ok=True)
        _make_once(target, partial(unpack, path))
    return target


def _staged(path: Path) -> Path:
    """Copy a file to this node's local disk: to $TMPDIR, which clusters set, else to /tmp."""
    folder = Path(tempfile.gettempdir())
    advice = "free some space there, set TMPDIR to another folder, or omit --stage-data"
    with os_error_as(f"{path} cannot be copied to {folder}", advice):
        target = _own_folder() / _cache_name(path)
        _make_once(target, partial(_copy, path))
    return target


def _copy(source: Path, target: Path) -> None:
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.copyfile(source, unfinished)
    unfinished.replace(target)


def _make_once(target: Path, make: Callable[[Path], object]) -> None:
    """Let `make` write `target` unless it exists; of several processes on a node, only the first one does.

    The lock lies in the node's temporary folder, because data folders must not be changed.
    """
    if target.exists():
        return
    identity = hashlib.sha256(os.fsencode(target.parent.resolve() / target.name)).hexdigest()[:32]
    with locked(_own_folder() / f"{identity}.lock", EACH):
        if not target.exists():
            make(target)


def _own_folder() -> Path:
    """Return this user's folder within the temporary folder of this node.

    Raises:
        UserError: it belongs to another user.
        OSError: it cannot be created.
    """
    folder = Path(tempfile.gettempdir()) / f"dist-mnist-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise UserError(f"{folder} belongs to another user: set TMPDIR to your own folder")
    return folder


def _writable(folder: Path) -> bool:
    """Whether the folder is writable by its permissions too, which do not stop root."""
    return os.access(folder, os.W_OK) and bool(folder.stat().st_mode & 0o222)


def cache_folder() -> Path:
    """Return the folder for unpacked copies of read-only files: $DIST_MNIST_CACHE, else the user's cache folder.

    Without a home folder, as in containers, it lies in this node's temporary folder.
    """
    if named := os.environ.get("DIST_MNIST_CACHE"):
        return Path(named)
    if of_user := os.environ.get("XDG_CACHE_HOME"):
        return Path(of_user) / "dist_mnist"
    try:
        return Path.home() / ".cache" / "dist_mnist"
    except RuntimeError:  # neither HOME nor an entry for this user id
        return _own_folder() / "cache"


def _cache_name(path: Path) -> str:
    """Return a name that depends on the file's path, size and modification time, so that no stale copy is read."""
    stat = path.stat()
    identity = f"{path.resolve()}/{stat.st_size}/{stat.st_mtime_ns}"
    return f"{hashlib.sha256(os.fsencode(identity)).hexdigest()[:16]}-{path.stem}"
