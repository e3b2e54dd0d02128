"""Error handling of entry points: a UserError becomes one line on standard error and an exit code."""

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
AFTER_PEERS_S = 1.0  # time for torchrun to notice the exit of another rank

# Errors of a path or its permissions, not of the disk.
OF_PATHS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR)


@contextmanager
def user_errors(stop: StopSignal | None = None) -> Iterator[None]:
    """Turn a UserError into one line on standard error and exit code 2, or 1 if a restart may help.

    Local rank 0 reports for all ranks of a node: the others wait for torchrun to end them, and report only if it does
    not, because then the error is theirs alone.
    """
    _open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper) and (sys.stdout.errors == "strict" or sys.stdout.encoding != "utf-8"):
        # Class names may have letters that a terminal lacks; bytes of paths must reach other programs unchanged.
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
    """Replace closed standard streams (`>&-`) by the null device, so that no other file gets their descriptors."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            handle = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(handle, True)
            setattr(sys, name, open(handle, mode))  # noqa: SIM115 (open for the life of the process)


@contextmanager
def unwound_by_signals() -> Iterator[None]:
    """Context manager: a stop request (SIGINT, SIGTERM, SIGHUP) leaves the block by SystemExit, so that it cleans up.

    The exit code is 128 plus the signal number. Later stop requests are ignored during the cleanup.
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
    """Turn an OSError about a path, wherever it was raised, into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in OF_PATHS or error.filename is None:
            raise
        raise UserError(
            f"{short(error.filename, 200)}: {error.strerror}; give another path, or make this one accessible"
        ) from None


def _wait_for_the_end(stop: StopSignal | None) -> None:
    speak_up_at = time.monotonic() + SPEAK_UP_AFTER_S
    while time.monotonic() < speak_up_at:
        if stop and stop.signal:
            raise SystemExit(MISTAKE)
        time.sleep(0.1)


def _spare_restarts() -> None:
    """Tell torchrun to exit instead of restarting the ranks, which would fail with the same error."""
    if whole_number("TORCHELASTIC_RESTART_COUNT", 0) < whole_number("TORCHELASTIC_MAX_RESTARTS", 0):
        os.kill(os.getppid(), signal.SIGHUP)


@contextmanager
def lost_ranks(stop: StopSignal) -> Iterator[None]:
    """Delay this rank's exit after the loss of a peer, so that torchrun reports the lost rank first.

    torchrun then stops this rank, whose own traceback would only distract.
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
        sys.exit(f"rank {rank} exits because other ranks are gone: {why}")
