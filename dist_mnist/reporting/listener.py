"""What rank 0 tells of a run while it is made: `Listener`, and the records that its methods get."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dist_mnist.run.records import CheckpointInfo, Ended, MetricsRecord, RunConfig, RunResult

if TYPE_CHECKING:
    from dist_mnist.evaluation.checkpoints.result import Tested
    from dist_mnist.evaluation.evaluate import Evaluation
    from dist_mnist.model.classifier import Classifier

Outcome = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True, kw_only=True)
class RunStart:
    """A start of a run, the first or a later one; all is checked, and no step taken yet."""

    run_dir: Path
    config: RunConfig  # what config.json holds: settings as resolved, the data, versions, the machine
    parameters: int
    step: int  # optimizer steps done before this start
    total_steps: int
    notes: Sequence[str]  # lines about the network for the person who watches
    ended: Ended | None = None  # why the run had ended before its length, if it had: then it is only evaluated again


@dataclass(frozen=True, kw_only=True)
class Validation:
    """A validation during training, over all ranks."""

    record: MetricsRecord  # its line of metrics.jsonl: step, loss in nats, accuracy as a fraction
    evaluation: "Evaluation"  # with the confusion matrix
    model: "Classifier"  # as it trains, with its gradients; to be looked at only


@dataclass(frozen=True, kw_only=True)
class SavedCheckpoint:
    """A checkpoint that is on the disk, durably; pruning may delete the file later."""

    path: Path
    info: CheckpointInfo


@dataclass(frozen=True, kw_only=True)
class RunEnd:
    """How this start of a run ended: finished and tested, stopped by a request after saving, or failed."""

    outcome: Outcome
    step: int  # optimizer steps done
    tested: "Tested | None" = None  # of a finished run: its best model on the test set
    error: BaseException | None = None  # of a failed one

    @property
    def result(self) -> RunResult | None:
        """What result.json holds, of a finished run."""
        return self.tested.result if self.tested else None


class Listener:
    """Hears of a run while it is made. Override the methods that are of interest; the others do nothing.

    `--log-to FILE.py:CLASS` makes one, without arguments; `train(..., listeners=[...])` takes those that you made. They
    exist on rank 0 alone, where the training thread calls them between two steps, in the order of the methods below.
    All ranks wait meanwhile: what takes long belongs into a thread. An exception never ends training. It becomes a
    warning, one for each method; after one of `on_start` the listener hears no more.

    A run that was killed resumes from its newest checkpoint and repeats the steps since, so that a listener hears of
    these again: with the same bits, but for what was measured of time and memory.

    Example:
        >>> from dist_mnist import Listener, train
        >>> class Lowest(Listener):
        ...     loss = float("inf")
        ...
        ...     def on_log(self, record):
        ...         self.loss = min(self.loss, record.loss)
        ...
        ...     def on_end(self, end):
        ...         self.outcome = end.outcome
        >>> lowest = Lowest()
        >>> run = train("mlp", data_dir="data/mnist", epochs=3, log_every=3, tensorboard=False, listeners=[lowest])
        ... # doctest: +ELLIPSIS
        data      data/mnist: 540 for training, 60 for validation, 200 for testing; 10 classes
        ...
        >>> lowest.outcome, lowest.loss < 2.3
        ('finished', True)
    """

    def on_start(self, start: RunStart) -> None:
        """The run starts, or resumes after `start.step` steps; `start.config.settings` has its settings by name."""

    def on_step(self, step: int) -> None:
        """So many steps are done; called after each, so that what this does has to be cheap."""

    def on_log(self, record: MetricsRecord) -> None:
        """Every `--log-every` steps: `record.loss` (nats), `record.accuracy` (0 to 1), `record.images_per_s` and more.

        A line of metrics.jsonl: over all ranks, since the last one, after `record.step` steps.
        """

    def on_validation(self, validation: Validation) -> None:
        """The validation split was evaluated: `validation.record.accuracy`, and `validation.evaluation.confusion`."""

    def on_checkpoint(self, checkpoint: SavedCheckpoint) -> None:
        """A checkpoint has reached the disk, as `checkpoint.path`, of the state after `checkpoint.info.step` steps.

        Called after the step in which that happened, or at the end.
        """

    def on_end(self, end: RunEnd) -> None:
        """The run ends: `end.outcome` is "finished", "stopped" or "failed".

        Of a finished one `end.result` is the test result (`end.result.accuracy`), and result.json is written.
        """
