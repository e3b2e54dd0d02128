"""Where a run has come to, in a few bytes of a file that outlive its process, however that ends."""

import mmap
import os
import struct
from contextlib import suppress
from io import FileIO
from pathlib import Path

RECORD = struct.Struct("<q24s")  # step and phase


class Progress:
    """Writes step and phase into a memory-mapped file, for the price of a memory access; nowhere without a path.

    Where the file system has no such maps, each is a system call.
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
        """Say what begins."""
        RECORD.pack_into(self._map, 0, step, phase.encode())
        if self._file:
            with suppress(OSError):  # a run does not depend on it
                os.pwrite(self._file.fileno(), self._map, 0)


def read_progress(path: Path) -> tuple[int, str] | None:
    """Step and phase as they were last written; None if there is no such file."""
    try:
        step, phase = RECORD.unpack(path.read_bytes())
    except (OSError, struct.error):
        return None
    return step, phase.rstrip(b"\0").decode(errors="replace")
