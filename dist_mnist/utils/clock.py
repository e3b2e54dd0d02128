"""How long a process has been running, and what it spent its time on."""

import os
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from functools import cache
from pathlib import Path


@cache
def process_began_s() -> float:
    """When this process was started (time.monotonic), to a hundredth; the program that it was before an exec counts.

    A fork of a process that has asked for this began with that one.
    """
    now = time.monotonic()
    if sys.platform == "linux":  # where psutil knows the time of boot, which it adds, to a whole second only
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        return now - time.clock_gettime(time.CLOCK_BOOTTIME) + int(fields[19]) / os.sysconf("SC_CLK_TCK")
    import psutil

    return now - time.time() + psutil.Process().create_time()


class PhaseClock:
    """Adds up the seconds of each phase since this process was started; one lasts until the next is entered."""

    def __init__(self, phase: str):
        self._phase, self._since = phase, process_began_s()
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def enter(self, phase: str, now: float) -> None:
        """Another phase, or the same again, begins `now` (time.monotonic)."""
        self._seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now

    def seconds(self) -> Mapping[str, float]:
        """The seconds of each phase so far."""
        self.enter(self._phase, time.monotonic())
        return dict(self._seconds)
