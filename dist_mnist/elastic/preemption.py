"""Preemption: a signal becomes a stop request; ranks agree (see `distributed.agreement`) and shut down gracefully."""

import ctypes
import os
import signal
import sys
import time

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PR_SET_PDEATHSIG = 1


def set_attribute(option: int, value: int) -> None:
    """Set an attribute of this process by Linux's prctl."""
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


class StopSignal:
    """The stop request of this process, if any: signal and time. One object per process, created in main."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self._waits = "TORCHELASTIC_RUN_ID" in os.environ  # torchrun would count an early exit as a failure
        self._wakeup = -1
        self._noticed_at: float | None = None

    @classmethod
    def listening(cls) -> "StopSignal":
        """Treat SIGTERM, SIGINT and SIGUSR1 as stop requests from now on, and so the death of the parent torchrun."""
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
        """Let stop requests wait for the next step from now on. Before, they end the process: there is no state yet."""
        self._waits = True

    def noticed_at(self) -> float | None:
        """Return when (time.monotonic) the stop request came. Works while the main thread waits in a collective."""
        if self._noticed_at is None and self._wakeup >= 0:
            try:
                numbers = os.read(self._wakeup, 64)
            except BlockingIOError:
                numbers = b""
            if set(numbers) & set(SIGNALS):
                self._noticed_at = time.monotonic()
        return self._noticed_at

    def wait_for_own(self, seconds: float) -> None:
        """Wait up to `seconds` for a stop request to this process, when so far only another rank has received one.

        When a node joins, each torchrun sends its own ranks a stop request, to restart them. If its ranks had already
        exited, by agreement with the others, that torchrun would consider the run finished.
        """
        until = time.monotonic() + seconds
        while self.noticed_at() is None and time.monotonic() < until:
            time.sleep(0.02)

    def _on_signal(self, number: int, _: object) -> None:
        if not self._waits:
            raise SystemExit(128 + number)
        self.signal = self.signal or signal.Signals(number).name
