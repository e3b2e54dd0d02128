"""What a service that keeps runs is to `follower`, and what it is told of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from msgspec.structs import asdict

from dist_mnist.reporting.listener import Outcome
from dist_mnist.run.records import RunConfig, RunResult
from dist_mnist.utils.errors import as_utf8


class Point(NamedTuple):
    """Figures after a step; `kind` is train, validation or test, `unix_time_s` None where it is not known."""

    kind: str
    step: int
    unix_time_s: float | None
    figures: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """What a tracker is told of a run when it is opened. `key` is its id here, which no other run has."""

    path: Path
    key: str
    config: RunConfig

    @property
    def tags(self) -> dict[str, str]:
        """What is no setting: the machine, versions, the data."""
        facts = {"data": self.config.data.folder, "data_fingerprint": self.config.data.fingerprint}
        machine = asdict(self.config.machine) if self.config.machine else {}
        facts |= {name: str(value) for name, value in machine.items()}
        facts |= {f"version_{name}": version for name, version in self.config.versions.items()}
        return facts | ({"code_sha256": self.config.code_sha256} if self.config.code_sha256 else {})

    @property
    def settings(self) -> dict[str, object]:
        """The settings as JSON values, but for those that are not set."""
        return {name: value for name, value in self.config.settings.items() if value not in (None, "", [])}

    @property
    def name(self) -> str:
        """That of the run directory."""
        return as_utf8(self.path.resolve().name)


class Tracker(Protocol):
    """A service that keeps runs. Calls come from one thread, and raise what keeps them from succeeding; after that,
    `open` comes first again.
    """

    name: str

    def open(self, run: TrackedRun) -> Mapping[str, int]:
        """Find the run by its key, or make it; gives the last step that it has of each kind of point."""
        ...

    def send(self, points: Sequence[Point]) -> None:
        """Add points, all or none."""
        ...

    def send_result(self, point: Point, result: RunResult, files: Sequence[Path]) -> None:
        """Add files and the confusion matrix; then the test's point, by which `open` knows that they are there."""
        ...

    def close(self, outcome: Outcome) -> None:
        """Say how the run ended."""
        ...
