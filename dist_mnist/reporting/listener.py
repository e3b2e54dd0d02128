"""`Listener`, which rank 0 calls during a run, and the records that its methods get."""

from collections.abc import Sequence
from dataclasses import dataclass, field
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
    """A start of a run, the first or a later one: after all checks, before the first step."""

    run_dir: Path
    config: RunConfig  # config.json: resolved settings, data, versions, machine
    parameters: int
    step: int  # optimizer steps done before this start
    total_steps: int
    notes: Sequence[str]  # lines about the network, for the user
    ended: Ended | None = None  # why the run ended before its full length: it is then only evaluated again


@dataclass(frozen=True, kw_only=True)
class Validation:
    """A validation during training, over all ranks."""

    record: MetricsRecord  # its line of metrics.jsonl: step, loss in nats, accuracy as a fraction
    evaluation: "Evaluation"  # has the confusion matrix
    model: "Classifier" = field(repr=False)  # the model in training, with its gradients; read only


@dataclass(frozen=True, kw_only=True)
class SavedCheckpoint:
    """A checkpoint that is durably on disk; pruning may delete its file later."""

    path: Path
    info: CheckpointInfo


@dataclass(frozen=True, kw_only=True)
class RunEnd:
    """How this start of a run ended: finished and tested, stopped after saving (a stop request), or failed."""

    outcome: Outcome
    step: int  # optimizer steps done
    tested: "Tested | None" = None  # of a finished run: its best model, and its test result
    error: BaseException | None = None  # of a failed run

    @property
    def result(self) -> RunResult | None:
        """The content of result.json, for a finished run."""
        return self.tested.result if self.tested else None


class Listener:
    """Receives the events of a run. Override the methods you need; the others do nothing.

    `--log-to FILE.py:CLASS` creates one, without arguments; `train(..., listeners=[...])` accepts instances. Listeners
    exist only on rank 0, where the training thread calls them between two steps, in the order of the methods below.
    All ranks wait meanwhile, so do slow work in a thread. An exception never ends training: it becomes a warning, one
    for each method. A listener whose `on_start` raises is removed.

    A run that was killed resumes from its newest checkpoint and repeats the steps since then. A listener gets these
    events again, with the same bits except for measurements of time and memory.

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
        """Called when the run starts, or resumes after `start.step` steps; `start.config.settings` are its settings."""

    def on_step(self, step: int) -> None:
        """Called after each step, so it must be cheap; `step` is the number of steps done."""

    def on_log(self, record: MetricsRecord) -> None:
        """Called every `--log-every` steps: `record.loss` (nats), `record.accuracy` (0 to 1), ...

        The record is a line of metrics.jsonl: over all ranks, since the last one, after `record.step` steps.
        """

    def on_validation(self, validation: Validation) -> None:
        """Called after each validation: `validation.record.accuracy`, `validation.evaluation.confusion`, ..."""

    def on_checkpoint(self, checkpoint: SavedCheckpoint) -> None:
        """Called when a checkpoint is on disk as `checkpoint.path`, with the state after `checkpoint.info.step` steps.

        That is after the step in which it got there, or at the end.
        """

    def on_end(self, end: RunEnd) -> None:
        """Called when the run ends: `end.outcome` is "finished", "stopped" or "failed".

        For a finished run result.json has been written, and `end.result` is the test result (`end.result.accuracy`).
        """
