"""The interface of a tracker (MLflow, W&B), and the facts about a run that it gets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from msgspec.structs import asdict

from dist_mnist.reporting.listener import Outcome
from dist_mnist.run.records import RunConfig, RunResult
from dist_mnist.utils.errors import as_utf8


class Point(NamedTuple):
    """Metrics after a step; `kind` is train, validation or test, `unix_time_s` is None if unknown."""

    kind: str
    step: int
    unix_time_s: float | None
    figures: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """The facts about a run that a tracker gets when it opens the run; `key` is the run's unique id."""

    path: Path
    key: str
    config: RunConfig

    @property
    def tags(self) -> dict[str, str]:
        """Facts that are not settings: machine, versions, data."""
        facts = {"data": self.config.data.folder, "data_fingerprint": self.config.data.fingerprint}
        machine = asdict(self.config.machine) if self.config.machine else {}
        facts |= {name: str(value) for name, value in machine.items()}
        facts |= {f"version_{name}": version for name, version in self.config.versions.items()}
        return facts | ({"code_sha256": self.config.code_sha256} if self.config.code_sha256 else {})

    @property
    def settings(self) -> dict[str, object]:
        """The settings as JSON values, without unset ones."""
        return {name: value for name, value in self.config.settings.items() if value not in (None, "", [])}

    @property
    def name(self) -> str:
        """The name of the run directory."""
        return as_utf8(self.path.resolve().name)


class Tracker(Protocol):
    """A service that stores runs. Its methods are called from one thread; after one raises, `open` is called first."""

    name: str

    def open(self, run: TrackedRun) -> Mapping[str, int]:
        """Find the run by its key, or create it; return its last step of each kind of point."""
        ...

    def send(self, points: Sequence[Point]) -> None:
        """Add all of the points, or none."""
        ...

    def send_result(self, point: Point, result: RunResult, files: Sequence[Path]) -> None:
        """Add files and the confusion matrix, then the test point, which tells `open` that they are there."""
        ...

    def close(self, outcome: Outcome) -> None:
        """Record how the run ended."""
        ...
