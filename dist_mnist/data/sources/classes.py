"""The names of a dataset's classes: `classes.json`, a JSON list of strings by label; and folders named after them."""

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
MAX_FOLDER = 255  # bytes of a folder's name
UNFIT = frozenset('%/\\:*?"<>|')  # in a folder's name: not taken by some system, or the mark of what is replaced
NOT_DATA = ("__macosx", "thumbs.db", "desktop.ini")  # what systems leave in folders; never a class
JOINERS = "\u200c\u200d"  # invisible, but Persian and Indic words and some emoji are not written without them


def read_class_names(folder: Path) -> tuple[str, ...] | None:
    """The names in `folder`'s classes.json, by label; None where there is no such file.

    Raises:
        UserError: it cannot be read, has more than 4 MiB, or is not a list of at most 65 536 unique, printable names.
    """
    path = folder / FILE_NAME
    if not path.exists() and not path.is_symlink():
        return None
    advice = 'expected is a list of names by label, such as ["cat", "dog"]; correct it, or remove it'
    with os_error_as(f"{path}: cannot be read", advice):
        if not path.is_file():
            what = f"a link to {path.readlink()}, which is no file" if path.is_symlink() else "no file"
            raise UserError(f"{path} is {what}: {advice}")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise UserError(f"{path} has more than {MAX_BYTES >> 20} MiB, too much for names of classes: {advice}")
    try:
        names = parse(content, list[str])
    except ValueError as error:  # also where it is not UTF-8
        raise UserError(f"{path}: not a JSON list of strings ({short(error, 200)}): {advice}") from None
    check_names(path, names)
    return tuple(names)


def write_class_names(folder: Path, names: Sequence[str]) -> None:
    """Write `names`, by label, to `folder`'s classes.json, atomically.

    Raises:
        UserError: they are too many, or a name is empty, not printable or there twice.
        OSError: the folder cannot be written.
    """
    path = folder / FILE_NAME
    check_names(path, names)
    content = json.dumps(list(names), ensure_ascii=False, indent=1).encode()
    if len(content) > MAX_BYTES:
        raise UserError(f"{path} would have more than {MAX_BYTES >> 20} MiB: give shorter names")
    with atomic_write(path) as file:
        file.write(content)


def class_folders(names: Sequence[str]) -> tuple[str, ...]:
    """The folders that pictures of classes are put in: their names, changed where a file system may not take them.

    What it may not take is replaced by `%` and two hexadecimal digits for each byte, as in URLs, so that unquoting
    gives the name back: a slash, a dot at an end, and every letter of a name that is another's in capitals.

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
                f"the name of class {len(folders)}, {short(name)!r}, is too long for a folder's; shorten it in "
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
    """Whether a terminal or a page shows all of `name`, and obeys nothing in it."""
    return all(character.isprintable() or character in JOINERS for character in name)


def check_names(path: Path | str, names: Sequence[str]) -> None:
    """Raise a UserError, which begins with the `path`, unless these can be the names of a dataset's classes."""
    if not 1 <= len(names) <= MAX_NAMES:
        raise UserError(f"{path}: it has {len(names)} names; a dataset has 1 to {MAX_NAMES} classes")
    labels: dict[str, int] = {}
    for label, name in enumerate(names):
        shown = short(repr(name))
        if not name.strip():
            raise UserError(f"{path}: the name of class {label} is empty; give each class one")
        if not is_printable(name):
            raise UserError(f"{path}: the name of class {label}, {shown}, has characters that cannot be printed")
        if labels.setdefault(name, label) != label:
            raise UserError(f"{path}: classes {labels[name]} and {label} are both called {shown}; names are unique")
