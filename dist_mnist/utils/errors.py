"""Exceptions and exit codes for user errors, and warnings."""

import difflib
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

# Exit codes of ranks that have already printed the reason.
MISTAKE = 2  # user error
STALLED = 3

WARNED = "DIST_MNIST_WARNED"  # environment variable for child processes: marks of `warn_once` that were already used
_warned: set[str] = set()
CREDENTIALS = re.compile(r"(\w://)[^\s/?#]*@")  # of a URL


class UserError(ValueError):
    """A user error, in one line: what was expected, what was found, where, and what to do.

    Entry points print the message without a traceback and exit with code `MISTAKE`.
    """

    def __init__(self, sentence: str):
        super().__init__(printable(sentence.rstrip()).replace("\n", "\\n"))  # file names may contain newlines


def printable(text: str) -> str:
    """Escape control characters and what a terminal cannot print: names and values may come from anybody.

    User names and passwords in URLs, which libraries repeat in their errors, are removed: logs are shown to others.
    """
    text = CREDENTIALS.sub(r"\1...@", as_utf8(text))
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def as_utf8(text: str) -> str:
    """Escape what UTF-8 cannot encode: undecoded bytes of file names (such as `\\xe9`) and lone surrogates."""
    return re.sub("[\ud800-\udfff]", _escaped, text)


def _escaped(half: re.Match[str]) -> str:
    code = ord(half[0])
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code < 0xDD00 else f"\\u{code:04x}"  # an undecoded byte (PEP 383)?


def short(value: object, length: int = 60) -> str:
    """Return a value as text for a message, truncated to `length` characters."""
    text = str(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."


def unknown(what: str, found: str, valid: Iterable[str], where: str = "") -> str:
    """Return the message for a name not in `valid`: the closest match, and all names or `where` to find them."""
    names = [str(name) for name in valid]
    by_lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(found.lower(), by_lower, 1)
    suggestion = f", did you mean {by_lower[near[0]]!r}?" if near else ""
    return f"unknown {what} {short(repr(found))}{suggestion} ({where or 'there are: ' + ', '.join(names)})"


def whole_number(variable: str, otherwise: int) -> int:
    """The number that an environment variable has, which a launcher sets; `otherwise` where it is not set, or empty.

    Raises:
        UserError: it is no whole number.
    """
    text = os.environ.get(variable, "").strip()
    if not ((text.isascii() and text.isdecimal()) or not text):
        raise UserError(f"the environment variable {variable} is a launcher's whole number, not {short(repr(text))}")
    return int(text or otherwise)


class Restartable(UserError):
    """Not a user error, and a restart may succeed: exit code 1, on which launchers restart."""


class Shortage(Restartable):
    """The machine ran out of a resource, such as memory."""


class NotFinite(UserError):
    """Weights or a gradient are NaN or infinite; raised on all ranks."""


NO_GPU = "--device cuda: this machine has no usable GPU; omit the option to train on the CPU"


def warn(text: str) -> None:
    """Print a warning on standard error."""
    tell(f"warning: {printable(text)}")


def tell(line: str, to: TextIO | None = None) -> None:
    """Print a line on standard error, or on `to`; drop it if that fails (full disk, closed pipe)."""
    with suppress(OSError):
        print(line, file=to or sys.stderr, flush=True)


def warn_once(mark: str, text: str) -> None:
    """`warn`, unless this process or its parent has already warned under the same `mark` (one line).

    Only local rank 0 of each node warns.
    """
    if mark in _warned or mark in os.environ.get(WARNED, "").split("\n"):
        return
    _warned.add(mark)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        warn(text)


def spare_children_warnings() -> None:
    """Tell child processes, by an environment variable, which warnings were already printed."""
    if _warned:
        os.environ[WARNED] = "\n".join(sorted(_warned))


@contextmanager
def os_error_as(what: str, advice: str = "") -> Iterator[None]:
    """Turn an OSError within a `with` block into a UserError: `what` failed, the system's reason, and `advice`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what} ({error.strerror or error}){'; ' if advice else ''}{advice}") from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is an out-of-memory error of Python's (MemoryError) or of torch's (RuntimeErrors)."""
    if not isinstance(error, RuntimeError):
        return isinstance(error, MemoryError)
    first = (str(error).splitlines() or [""])[0]
    return "allocate memory" in first or "out of memory" in first


@contextmanager
def named_out_of_memory() -> Iterator[None]:
    """Turn an out-of-memory (OOM) error within a `with` block into a `Shortage`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        what = (str(error).splitlines() or [""])[0]
        raise Shortage(
            f"out of memory ({short(what, 200)}): check which other processes use it, or start a new run with a "
            "smaller --batch-size or network and another --run-dir"
        ) from None
