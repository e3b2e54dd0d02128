"""How long a process has been running, and what it spent its time on; durations as people write them."""

import math
import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from functools import cache
from pathlib import Path

NUMBER = r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)"  # also as Python writes small and large ones
DURATION = re.compile(f"(?:{NUMBER}h)?(?:{NUMBER}m)?(?:{NUMBER}s)?", re.ASCII)


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


def parse_duration(text: str) -> float | None:
    """The seconds of `90`, `90s`, `30m` or `1h30m`; None if it is nothing of that form, or more than a float holds."""
    if found := DURATION.fullmatch(text if re.search("[hms]", text) else f"{text}s"):
        hours, minutes, seconds = (float(number or 0) for number in found.groups())
        total = 3600 * hours + 60 * minutes + seconds
        return total if math.isfinite(total) else None
    return None


def duration(seconds: float) -> str:
    """Seconds as `parse_duration` reads them: `1h30m`, `45s`."""
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    parts = ((hours, "h"), (minutes, "m"), (rest, "s"))
    return "".join(f"{number:g}{unit}" for number, unit in parts if number) or "0s"
