"""Memory of processes started by a benchmark, read from /proc."""

from pathlib import Path


def children(pid: int) -> list[int]:
    """Return the child processes of `pid`."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def anonymous_memory(pid: int) -> int:
    """Return RssAnon of a process in bytes; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)
