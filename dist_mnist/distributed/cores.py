"""The number of cores that a process may use, by CPU affinity and by its container's CPU quota (cgroups)."""

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

ROOT = Path("/")
MAX_V2 = "cpu.max"  # quota and period in microseconds, or `max` for no quota
MAX_V1 = ("cpu.cfs_quota_us", "cpu.cfs_period_us")  # a quota of -1 means no quota


def num_cores(root: Path = ROOT) -> int:
    """Return the number of cores that this process may use; a quota of 2.5 gives 3. `root` holds /proc and /sys."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([bound, *map(math.ceil, _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """Yield the CPU quotas, in cores, of this process's control groups and their ancestors."""
    for group in _groups(root):
        with suppress(OSError, ValueError):  # the file does not exist, or has no quota
            files = [group / MAX_V2] if (group / MAX_V2).exists() else [group / name for name in MAX_V1]
            quota, period = (int(word) for file in files for word in file.read_text().split())
            if quota > 0 and period > 0:
                yield quota / period


def _groups(root: Path) -> Iterator[Path]:
    """Yield the folders of those groups; a container may list host paths, of which only the root then exists."""
    mount, lines = root / "sys/fs/cgroup", []
    with suppress(OSError):  # not on Linux
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):  # version 2 names none
            continue
        group = PurePosixPath(path.lstrip("/"))
        for part in (group, *group.parents):
            yield mount / ("cpu" if controllers else "") / part
