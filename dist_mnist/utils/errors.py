"""What is said of a user's mistakes and of what deserves a look."""

import difflib
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

# Exit codes of ranks that have told why themselves.
MISTAKE = 2  # of the user
STALLED = 3

WARNED = "DIST_MNIST_WARNED"  # variable for child processes: the marks of `warn_once` under which they need not warn
_warned: set[str] = set()
CREDENTIALS = re.compile(r"(\w://)[^\s/?#]*@")  # of a URL


class UserError(ValueError):
    """A mistake in the input, in one sentence: what was expected, what was found, where, and what to do.

    Entry points print the sentence without a traceback and leave with exit code `MISTAKE`.
    """

    def __init__(self, sentence: str):
        super().__init__(printable(sentence.rstrip()).replace("\n", "\\n"))  # a line: names may be of several


def printable(text: str) -> str:
    """`text` with escapes for what a terminal would obey or cannot print: names and values may come from anybody.

    Users and passwords in URLs, which libraries repeat in their errors, are left out: logs are shown to others.
    """
    text = CREDENTIALS.sub(r"\1...@", as_utf8(text))
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def as_utf8(text: str) -> str:
    """`text` with escapes for what UTF-8 does not have: bytes of file names (such as `\\xe9`), halves of characters."""
    return re.sub("[\ud800-\udfff]", _escaped, text)


def _escaped(half: re.Match[str]) -> str:
    code = ord(half[0])
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code < 0xDD00 else f"\\u{code:04x}"  # of a byte (PEP 383), or not


def short(value: object, length: int = 60) -> str:
    """A value in a sentence: its beginning, if it is long."""
    text = str(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."


def unknown(what: str, found: str, valid: Iterable[str], where: str = "") -> str:
    """The sentence for a name that is not one of the `valid`: with the nearest, and all of them or `where` they are."""
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
    """Not the user's mistake, and maybe otherwise at the next start: exit code 1, by which launchers start again."""


class Shortage(Restartable):
    """Something of the machine's did not suffice."""


class NotFinite(UserError):
    """Weights or a gradient are NaN or infinite, on all ranks alike."""


NO_GPU = "--device cuda: there is no usable GPU on this machine; leave the option out to train on the CPU"


def warn(text: str) -> None:
    """Say on standard error what a user should look at, though the program goes on."""
    tell(f"warning: {printable(text)}")


def tell(line: str, to: TextIO | None = None) -> None:
    """Print a line on standard error, or `to` another stream, if it takes that; a log on a full disk ends nothing."""
    with suppress(OSError):
        print(line, file=to or sys.stderr, flush=True)


def warn_once(mark: str, text: str) -> None:
    """`warn`, unless this process or the one that started it has done so under the same `mark`, a line.

    Of a node's ranks only the first warns.
    """
    if mark in _warned or mark in os.environ.get(WARNED, "").split("\n"):
        return
    _warned.add(mark)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        warn(text)


def spare_children_warnings() -> None:
    """Let processes that this one starts know what has been warned of."""
    if _warned:
        os.environ[WARNED] = "\n".join(sorted(_warned))


@contextmanager
def os_error_as(what: str, advice: str = "") -> Iterator[None]:
    """Turn the system's refusal (an OSError) into a UserError, for a `with` block: `what` failed, why, and `advice`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what} ({error.strerror or error}){'; ' if advice else ''}{advice}") from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it is Python's out-of-memory error, or one of torch's, which are RuntimeErrors."""
    if not isinstance(error, RuntimeError):
        return isinstance(error, MemoryError)
    first = (str(error).splitlines() or [""])[0]
    return "allocate memory" in first or "out of memory" in first


@contextmanager
def named_out_of_memory() -> Iterator[None]:
    """Turn an out-of-memory (OOM) error into a sentence, for a `with` block."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        what = (str(error).splitlines() or [""])[0]
        raise Shortage(
            f"out of memory ({short(what, 200)}): see what else takes it, or start another run, in "
            "another --run-dir, with a smaller --batch-size or network"
        ) from None
