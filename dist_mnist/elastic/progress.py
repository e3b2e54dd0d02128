"""The progress of a run, step and phase, in a small file that outlives the process however it ends."""

import mmap
import os
import struct
from contextlib import suppress
from io import FileIO
from pathlib import Path

RECORD = struct.Struct("<q24s")  # step and phase


class Progress:
    """Writes step and phase into a memory-mapped file, at the cost of a memory access. A path of None disables it.

    On a file system without memory maps, each write is a system call.
    """

    def __init__(self, path: Path | None):
        self._map: mmap.mmap | bytearray = bytearray(RECORD.size)
        self._file: FileIO | None = None
        if path is not None:
            path.write_bytes(bytes(RECORD.size))
            file = open(path, "r+b", buffering=0)  # noqa: SIM115 (it stays open without a map)
            try:
                self._map = mmap.mmap(file.fileno(), RECORD.size)
            except OSError:
                self._file = file
            else:
                file.close()

    def write(self, step: int, phase: str) -> None:
        """Record the step and phase that begin now."""
        RECORD.pack_into(self._map, 0, step, phase.encode())
        if self._file:
            with suppress(OSError):  # a run can do without
                os.pwrite(self._file.fileno(), self._map, 0)


def read_progress(path: Path) -> tuple[int, str] | None:
    """Return the step and phase written last; None if there is no such file."""
    try:
        step, phase = RECORD.unpack(path.read_bytes())
    except (OSError, struct.error):
        return None
    return step, phase.rstrip(b"\0").decode(errors="replace")
