"""Where a run has come to, in a few bytes of a file that outlive its process, however that ends."""

import mmap
import struct
from pathlib import Path

RECORD = struct.Struct("<q24s")  # step and phase


class Progress:
    """Writes step and phase into a memory-mapped file, for the price of a memory access; nowhere without a path."""

    def __init__(self, path: Path | None):
        self._map: mmap.mmap | bytearray = bytearray(RECORD.size)
        if path is not None:
            path.write_bytes(bytes(RECORD.size))
            with open(path, "r+b") as file:
                self._map = mmap.mmap(file.fileno(), RECORD.size)

    def write(self, step: int, phase: str) -> None:
        """Say what begins."""
        RECORD.pack_into(self._map, 0, step, phase.encode())


def read_progress(path: Path) -> tuple[int, str] | None:
    """Step and phase as they were last written; None if there is no such file."""
    try:
        step, phase = RECORD.unpack(path.read_bytes())
    except (OSError, struct.error):
        return None
    return step, phase.rstrip(b"\0").decode(errors="replace")
