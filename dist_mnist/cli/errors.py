"""A user's mistake as one line on standard error and an exit code."""

import errno
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from dist_mnist.elastic.preemption import StopSignal
from dist_mnist.utils.errors import (
    MISTAKE,
    Restartable,
    UserError,
    named_out_of_memory,
    short,
    tell,
    warn,
    whole_number,
)

SPEAK_UP_AFTER_S = 5.0
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
EXIT_S = 30.0  # for threads and exit handlers, such as a tracker's, after the last line of the program
AFTER_PEERS_S = 1.0  # in which torchrun sees another rank's end

# What is wrong with a path itself, or with the right to it, and not with the disk.
OF_PATHS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR)


@contextmanager
def user_errors(stop: StopSignal | None = None) -> Iterator[None]:
    """Turn a UserError into one line on standard error and exit code 2, or 1 where a restart may help.

    Of a machine's ranks the first speaks for all: the others wait until torchrun ends them, and speak up only if it
    does not, because the mistake is theirs alone.
    """
    _open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper) and (sys.stdout.errors == "strict" or sys.stdout.encoding != "utf-8"):
        # Names of classes have letters that not every terminal has; paths, bytes that other programs need unchanged.
        sys.stdout.reconfigure(errors="surrogateescape" if sys.stdout.encoding == "utf-8" else "backslashreplace")
    try:
        with _named_paths(), named_out_of_memory():
            yield
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            _wait_for_the_end(stop)
        tell(f"error: {error}")
        if isinstance(error, Restartable):
            raise SystemExit(1) from None
        _spare_restarts()
        raise SystemExit(MISTAKE) from None


def _open_closed_streams() -> None:
    """Let what goes to a closed standard stream (`>&-`) go nowhere, and no other file take its number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            handle = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(handle, True)
            setattr(sys, name, open(handle, mode))  # noqa: SIM115 (as long as the process)


@contextmanager
def unwound_by_signals() -> Iterator[None]:
    """For a `with` block: a request to end (SIGINT, SIGTERM, SIGHUP) leaves it by an exception, which cleans up.

    The exit code is 128 plus the signal's number. Later requests are ignored: the first is being served.
    """
    numbers = [number for number in ENDING if signal.getsignal(number) != signal.SIG_IGN]

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def ending_in_time() -> Iterator[None]:
    """After a `with` block the process ends within `EXIT_S`, whatever a listener has left that would wait longer."""
    code = 1
    try:
        yield
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    finally:
        threading.Thread(target=_end_later, args=(code,), daemon=True).start()


def _end_later(code: int) -> None:
    time.sleep(EXIT_S)
    waited_for = [one.name for one in threading.enumerate() if not one.daemon and one is not threading.main_thread()]
    warn(f"{', '.join(waited_for) or 'an exit handler'} did not end within {EXIT_S:g} s; this process ends without")
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(code)


@contextmanager
def _named_paths() -> Iterator[None]:
    """Turn the system's refusal of a path, wherever it was met, into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in OF_PATHS or error.filename is None:
            raise
        raise UserError(
            f"{short(error.filename, 200)}: {error.strerror}; give another path, or make this one usable"
        ) from None


def _wait_for_the_end(stop: StopSignal | None) -> None:
    speak_up_at = time.monotonic() + SPEAK_UP_AFTER_S
    while time.monotonic() < speak_up_at:
        if stop and stop.signal:
            raise SystemExit(MISTAKE)
        time.sleep(0.1)


def _spare_restarts() -> None:
    """Tell torchrun to end where it would start the ranks again: they would meet the same mistake."""
    if whole_number("TORCHELASTIC_RESTART_COUNT", 0) < whole_number("TORCHELASTIC_MAX_RESTARTS", 0):
        os.kill(os.getppid(), signal.SIGHUP)


@contextmanager
def lost_ranks(stop: StopSignal) -> Iterator[None]:
    """Let torchrun see the end of a lost rank before that of this one, which only noticed it.

    torchrun then tells this one to end, whose own story is of no use.
    """
    try:
        yield
    except RuntimeError as error:
        told_before, until = stop.signal, time.monotonic() + AFTER_PEERS_S
        while (told_before or not stop.signal) and time.monotonic() < until:
            time.sleep(0.02)
        if not stop.signal:
            raise
        rank, why = os.environ.get("RANK", 0), str(error).splitlines()[0][:200]
        sys.exit(f"rank {rank} ends, because others are gone: {why}")
