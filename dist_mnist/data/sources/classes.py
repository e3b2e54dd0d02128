"""Class names of a dataset: `classes.json`, a JSON list of strings by label, and folders named after classes."""

import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from dist_mnist.utils.errors import UserError, os_error_as, short
from dist_mnist.utils.files import atomic_write
from dist_mnist.utils.schema import parse

FILE_NAME = "classes.json"
MAX_NAMES = 1 << 16
MAX_BYTES = 1 << 22
MAX_FOLDER = 255  # bytes in a folder name
UNFIT = frozenset('%/\\:*?"<>|')  # characters that some file system refuses in names, and % itself, which quotes them
NOT_DATA = ("__macosx", "thumbs.db", "desktop.ini")  # files and folders of operating systems; never a class
JOINERS = "\u200c\u200d"  # invisible, but needed in Persian and Indic words and some emoji


def read_class_names(folder: Path) -> tuple[str, ...] | None:
    """Read the class names in `folder`'s classes.json, by label; None if the file does not exist.

    Raises:
        UserError: it cannot be read, exceeds 4 MiB, or is not a list of at most 65 536 unique, printable names.
    """
    path = folder / FILE_NAME
    if not path.exists() and not path.is_symlink():
        return None
    advice = 'expected a list of names by label, such as ["cat", "dog"]; correct or remove the file'
    with os_error_as(f"{path}: cannot be read", advice):
        if not path.is_file():
            what = f"a link to {path.readlink()}, which is not a file" if path.is_symlink() else "not a file"
            raise UserError(f"{path} is {what}: {advice}")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise UserError(f"{path} exceeds {MAX_BYTES >> 20} MiB, the limit for class names: {advice}")
    try:
        names = parse(content, list[str])
    except ValueError as error:  # also if it is not UTF-8
        raise UserError(f"{path} is not a JSON list of strings ({short(error, 200)}): {advice}") from None
    check_names(path, names)
    return tuple(names)


def write_class_names(folder: Path, names: Sequence[str]) -> None:
    """Write `names`, by label, to `folder`'s classes.json, atomically.

    Raises:
        UserError: there are too many names, or a name is empty, not printable or repeated.
        OSError: the folder cannot be written.
    """
    path = folder / FILE_NAME
    check_names(path, names)
    content = json.dumps(list(names), ensure_ascii=False, indent=1).encode()
    if len(content) > MAX_BYTES:
        raise UserError(f"{path} would exceed {MAX_BYTES >> 20} MiB: give shorter names")
    with atomic_write(path) as file:
        file.write(content)


def class_folders(names: Sequence[str]) -> tuple[str, ...]:
    """Return a folder name for each class: its name, with characters quoted that a file system may refuse.

    Quoting is that of URLs, `%` and two hexadecimal digits per byte, so that unquoting restores the name. It applies to
    slashes and the like, dots at either end, and all letters of a name that differs from another only in case.

    Raises:
        UserError: a name is too long.
    """
    taken: set[str] = set()
    folders: list[str] = []
    for name in names:
        folded = unicodedata.normalize("NFC", name).casefold()
        folder = _folder(name, folded in taken)
        taken.add(folded)
        if len(folder.encode()) > MAX_FOLDER:
            raise UserError(
                f"the name of class {len(folders)}, {short(name)!r}, is too long for a folder name; shorten it in "
                "classes.json"
            )
        folders.append(folder)
    return tuple(folders)


def _folder(name: str, is_taken: bool) -> str:
    ends = (0, len(name) - 1)
    unfit = UNFIT | {"."} if name.lower() in NOT_DATA else UNFIT
    return "".join(
        _quoted(c) if c in unfit or (i in ends and c in ". _") or (is_taken and c.isalpha()) else c
        for i, c in enumerate(name)
    )


def _quoted(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode())


def is_printable(name: str) -> bool:
    """Whether `name` has no control or invisible characters, except joiners."""
    return all(character.isprintable() or character in JOINERS for character in name)


def check_names(path: Path | str, names: Sequence[str]) -> None:
    """Raise a UserError that starts with `path` unless `names` are valid class names."""
    if not 1 <= len(names) <= MAX_NAMES:
        raise UserError(f"{path}: expected 1 to {MAX_NAMES} class names, got {len(names)}")
    labels: dict[str, int] = {}
    for label, name in enumerate(names):
        shown = short(repr(name))
        if not name.strip():
            raise UserError(f"{path}: the name of class {label} is empty; give each class a name")
        if not is_printable(name):
            raise UserError(f"{path}: the name of class {label}, {shown}, has unprintable characters")
        if labels.setdefault(name, label) != label:
            raise UserError(f"{path}: classes {labels[name]} and {label} are both named {shown}; names must be unique")
