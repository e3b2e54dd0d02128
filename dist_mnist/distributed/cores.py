"""How many cores a process may use: by its affinity, and by the CPU quota of its container (control groups)."""

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

ROOT = Path("/")
MAX_V2 = "cpu.max"  # quota and period in microseconds, or `max` for no quota
MAX_V1 = ("cpu.cfs_quota_us", "cpu.cfs_period_us")  # the quota is -1 for none


def num_cores(root: Path = ROOT) -> int:
    """Cores that this process may use; of a container's quota of 2.5 cores, 3. `root` is where /proc and /sys are."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([bound, *map(math.ceil, _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """CPU quotas, in cores, of the control groups that this process is in, and of those around them."""
    for group in _groups(root):
        with suppress(OSError, ValueError):  # there is no such file, or no quota in it
            files = [group / MAX_V2] if (group / MAX_V2).exists() else [group / name for name in MAX_V1]
            quota, period = (int(word) for file in files for word in file.read_text().split())
            if quota > 0 and period > 0:
                yield quota / period


def _groups(root: Path) -> Iterator[Path]:
    """Folders of those groups; in a container, paths may be those on the host, and then only the outermost is there."""
    mount, lines = root / "sys/fs/cgroup", []
    with suppress(OSError):  # this is not Linux
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):  # version 2 names none
            continue
        group = PurePosixPath(path.lstrip("/"))
        for part in (group, *group.parents):
            yield mount / ("cpu" if controllers else "") / part
