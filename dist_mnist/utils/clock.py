"""Process uptime, time per phase, and durations as people write them."""

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
    """Return when this process started, on the clock of time.monotonic, to 10 ms; an exec does not reset it.

    A fork inherits the value that its parent has cached.
    """
    now = time.monotonic()
    if sys.platform == "linux":  # psutil adds the boot time, which it knows to a whole second only
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        return now - time.clock_gettime(time.CLOCK_BOOTTIME) + int(fields[19]) / os.sysconf("SC_CLK_TCK")
    import psutil

    return now - time.time() + psutil.Process().create_time()


class PhaseClock:
    """Sum the seconds of each phase since the process started; a phase lasts until the next is entered."""

    def __init__(self, phase: str):
        self._phase, self._since = phase, process_began_s()
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def enter(self, phase: str, now: float) -> None:
        """Begin a phase, or the same one again, at `now` (time.monotonic)."""
        self._seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now

    def seconds(self) -> Mapping[str, float]:
        """Return the seconds of each phase so far."""
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
    """Format seconds as `parse_duration` reads them: `1h30m`, `45s`."""
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    parts = ((hours, "h"), (minutes, "m"), (rest, "s"))
    return "".join(f"{number:g}{unit}" for number, unit in parts if number) or "0s"
