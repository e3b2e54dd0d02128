"""Preemption: a signal becomes a stop request, on which ranks agree (see `distributed.agreement`) to leave in order."""

import ctypes
import os
import signal
import sys
import time

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PR_SET_PDEATHSIG = 1


def set_attribute(option: int, value: int) -> None:
    """Set an attribute of this process by Linux' prctl."""
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


class StopSignal:
    """Whether this process got a stop request, by which signal, and since when; one object a process, made in main."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self._waits = "TORCHELASTIC_RUN_ID" in os.environ  # torchrun would take an end for a failure
        self._wakeup = -1
        self._noticed_at: float | None = None

    @classmethod
    def listening(cls) -> "StopSignal":
        """From here on SIGTERM, SIGINT and SIGUSR1 are stop requests, and so is the death of the torchrun above us."""
        stop = cls()
        stop._wakeup, write_end = os.pipe()
        os.set_blocking(stop._wakeup, False)
        os.set_blocking(write_end, False)
        for number in SIGNALS:
            signal.signal(number, stop._on_signal)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        if sys.platform == "linux" and stop._waits:
            set_attribute(PR_SET_PDEATHSIG, signal.SIGTERM)
        return stop

    def wait_for_a_step(self) -> None:
        """From here on a stop request waits for the next step; before, it ends the process, with nothing to save."""
        self._waits = True

    def noticed_at(self) -> float | None:
        """When (time.monotonic) the stop request came; known also while the main thread is deep in a collective."""
        if self._noticed_at is None and self._wakeup >= 0:
            try:
                numbers = os.read(self._wakeup, 64)
            except BlockingIOError:
                numbers = b""
            if set(numbers) & set(SIGNALS):
                self._noticed_at = time.monotonic()
        return self._noticed_at

    def wait_for_own(self, seconds: float) -> None:
        """Wait until this process itself got a stop request, if only another rank did so far, but no longer than that.

        When a node joins, each torchrun asks its own ranks to stop, to start them again. One whose ranks had left
        before, because the others agreed to, would take the run for finished.
        """
        until = time.monotonic() + seconds
        while self.noticed_at() is None and time.monotonic() < until:
            time.sleep(0.02)

    def _on_signal(self, number: int, _: object) -> None:
        if not self._waits:
            raise SystemExit(128 + number)
        self.signal = self.signal or signal.Signals(number).name
