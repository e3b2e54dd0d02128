"""Weights & Biases: online, or with WANDB_MODE=offline into the run directory, for `wandb sync`.

The library writes every row to a local file before it sends it, and resends after an outage. It buffers rows in memory
for up to some seconds; they are lost if the process is killed, so the steps that it has are read from its files.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_mnist.reporting.figures import confusion_picture
from dist_mnist.reporting.listener import Outcome
from dist_mnist.reporting.listeners.tracker import Point, TrackedRun
from dist_mnist.run.records import RunResult
from dist_mnist.utils.errors import UserError

if TYPE_CHECKING:
    import wandb

PROJECT = "dist_mnist"
FINISH_S = 20.0  # to send rows that are pending at the end; `wandb sync` sends the rest
KINDS = ("train", "validation", "test")
# LevelDB's log format, used by the library's files: https://github.com/google/leveldb/blob/main/doc/log_format.md
BLOCK, HEADER, BEFORE = 1 << 15, 7, 7  # bytes; BEFORE: the library's own header, before the first record
FULL, LAST = 1, 4


class WandB:
    """One run in the project $WANDB_PROJECT."""

    name = "wandb"

    def __init__(self) -> None:
        import wandb

        self.wandb = wandb
        self._run: wandb.Run | None = None
        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False, verify=False):
            raise UserError("W&B has no API key: give one to `wandb login`, or set WANDB_MODE=offline")

    def open(self, run: TrackedRun) -> Mapping[str, int]:
        """Create or resume the run; its steps are those in its local files or, if later, online."""
        if self._run:
            self._run.finish()
        self._run = begun = self.wandb.init(
            project=self.wandb.setup().settings.project or PROJECT,
            id=run.key,
            name=run.name,
            dir=run.path,
            config={**run.settings, **run.tags},
            resume="allow",
            reinit="create_new",
            settings=self.wandb.Settings(console="off", finish_timeout=FINISH_S, silent=True),
        )
        begun.define_metric("*", step_metric="step")
        sent = defaultdict(int, _steps_in(run.path / "wandb", run.key))
        for kind in KINDS:
            sent[kind] = max(sent[kind], int(begun.summary.get(f"{kind}/step") or 0))
        return sent

    def send(self, points: Sequence[Point]) -> None:
        """Log a row for each point; keys are kind/name, such as train/loss."""
        for point in points:
            self.run.log(_row(point))

    def send_result(self, point: Point, result: RunResult, files: Sequence[Path]) -> None:
        """Log an artifact with the files (W&B deduplicates it by content), then the row with the confusion matrix."""
        artifact = self.wandb.Artifact(f"run-{self.run.id}", "run")
        for path in files:
            artifact.add_file(str(path))
        self.run.log_artifact(artifact)
        picture = confusion_picture(result.confusion_matrix, result.names)
        self.run.log(_row(point) | {"confusion_matrix": self.wandb.Image(picture)})

    def close(self, outcome: Outcome) -> None:
        """End the run, with exit code 0 if it finished, else 1."""
        self.run.finish(exit_code=int(outcome != "finished"))
        self._run = None

    @property
    def run(self) -> "wandb.Run":
        """The open run."""
        assert self._run
        return self._run


def _row(point: Point) -> dict[str, object]:
    row: dict[str, object] = {f"{point.kind}/{name}": value for name, value in point.figures.items()}
    time = {} if point.unix_time_s is None else {"_timestamp": point.unix_time_s}
    return row | time | {"step": point.step}


def _steps_in(folder: Path, key: str) -> dict[str, int]:
    """Return the last step of each kind in the library's local files of a run."""
    found: dict[str, int] = {}
    for path in folder.glob(f"*/run-{key}.wandb"):
        for record in _records(path.read_bytes()):
            for item in record.history.item:
                kind, _, name = (item.key or "/".join(item.nested_key)).partition("/")
                if name == "step":
                    found[kind] = max(found.get(kind, 0), int(item.value_json))
    return found


def _records(content: bytes) -> Iterator[Any]:
    """Yield the records of one of the library's files, up to where its writer may have been killed."""
    from wandb.proto.wandb_internal_pb2 import Record

    at, parts = BEFORE, b""
    while at + HEADER <= len(content):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK  # the rest of a block that has no room for a header
            continue
        length, form = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        parts += content[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if form in (FULL, LAST) and at <= len(content):
            yield Record.FromString(parts)
            parts = b""
