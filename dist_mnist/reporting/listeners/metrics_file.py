"""metrics.jsonl: one line for each log interval and each validation, without duplicates."""

import math
from pathlib import Path
from typing import IO

from dist_mnist.reporting.listener import Listener, RunEnd, RunStart, Validation
from dist_mnist.run.records import MetricsRecord
from dist_mnist.utils.files import atomic_write, to_json
from dist_mnist.utils.schema import parse


class MetricsFile(Listener):
    """Appends to the file; on resume, first removes the lines after the checkpoint, whose steps are repeated."""

    def __init__(self, path: Path):
        self.path = path
        self.file: IO[str] | None = None

    def __str__(self) -> str:
        return f"{self.path.name} cannot be written"

    def on_start(self, start: RunStart) -> None:
        """Remove lines after the checkpoint, and open the file."""
        if self.path.exists():
            content = self.path.read_bytes().splitlines(keepends=True)
            with atomic_write(self.path) as file:
                file.writelines(line for line in content if _step_of(line) <= start.step)
        self.file = open(self.path, "a", buffering=1)  # noqa: SIM115 (see on_end)

    def on_log(self, record: MetricsRecord) -> None:
        """Append the record."""
        assert self.file
        self.file.write(to_json(record) + "\n")

    def on_validation(self, validation: Validation) -> None:
        """Append the record."""
        self.on_log(validation.record)

    def on_end(self, end: RunEnd) -> None:
        """Flush and close the file."""
        assert self.file
        self.file.close()


def _step_of(line: bytes) -> float:
    """Return the step of a line; infinity for a truncated line (its writer was killed) or an invalid one."""
    try:
        return parse(line, MetricsRecord).step if line.endswith(b"\n") else math.inf
    except ValueError:
        return math.inf
