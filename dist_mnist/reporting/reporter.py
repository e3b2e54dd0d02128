"""Rank 0's voice: the console, TensorBoard and metrics.jsonl. Other ranks hold a null object."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from dist_mnist.config.settings import is_own_code, named_again
from dist_mnist.data.labels import listed
from dist_mnist.distributed.world import World, counted
from dist_mnist.evaluation.checkpoints import Tested
from dist_mnist.evaluation.evaluate import Evaluation
from dist_mnist.model.classifier import Classifier
from dist_mnist.reporting.text import class_label, result_line, seconds_line
from dist_mnist.run.network import Network
from dist_mnist.run.plan import Plan
from dist_mnist.run.records import Ended, MetricsRecord
from dist_mnist.utils.errors import as_utf8, warn
from dist_mnist.utils.files import atomic_write, shell_word, to_json
from dist_mnist.utils.null import null
from dist_mnist.utils.schema import parse

if TYPE_CHECKING:
    from dist_mnist.reporting.tensorboard import Board

WIDE = 120  # columns of a terminal in which everything has room
HISTOGRAMS = 20  # of each layer's weights in a run, at most


class Reporter:
    """Tells a person and the run directory how training goes.

    On a terminal it shows a progress bar; in a log file, a plain line for each log interval.
    """

    def __init__(self, plan: Plan, start_step: int, ended: Ended | None = None):
        self.plan, self.start_step, self.total_steps = plan, start_step, plan.total_steps
        self.trains_on = start_step < plan.total_steps and ended is None
        self.console = Console(soft_wrap=True, highlight=False)
        self.metrics = open(_cut_metrics(plan.run.metrics_path, start_step), "a", buffering=1)  # noqa: SIM115 (see close)
        self.failed: set[str] = set()
        self.board: Board | None = None
        if plan.config.tensorboard and not plan.run.result_path.exists():
            self._open_board()
        self.histograms_at = start_step
        self.progress: Progress | None = None

    @classmethod
    def on_main(cls, world: World, plan: Plan, start_step: int, ended: Ended | None = None) -> "Reporter":
        """A reporter on rank 0, and on other ranks one that says nothing; of a run that may have `ended` early."""
        return cls(plan, start_step, ended) if world.is_main else null(Reporter)

    def begin(self, world: World, network: Network) -> None:
        """What is about to happen."""
        plan, config, data = self.plan, self.plan.config, self.plan.data
        sizes = f"{len(data.train)} for training, {len(data.validation)} for validation, {len(data.test)} for testing"
        held_out = f" (held out, {data.test_fraction:.0%} of the training images)" if data.test_fraction else ""
        numbered = data.class_names == tuple(map(str, range(data.num_classes)))
        names = "" if numbered else f": {listed([class_label(name) for name in data.class_names])}"
        self.say(f"data      {plan.folder}: {sizes}{held_out}; {data.num_classes} classes{names}")
        for note in data.notes:
            warn(note)
        name = "" if config.model == "cnn" else f"{config.model}, "
        size = counted(network.model.num_parameters(), "parameter")
        self.say(f"network   {name}{size}, {config.precision}, recipe {config.recipe!r}")
        for note in network.notes:
            self.say(note)
        self.say(f"run       {plan.run.path}: {self.total_steps} steps of {config.batch_size} images on {world}")
        if self.start_step >= self.total_steps:
            self.say(f"finished  this run has made its {self.total_steps} steps; it is only evaluated again")
        elif not self.trains_on:
            self.say(f"finished  this run ended early, after step {self.start_step}; it is only evaluated again")
        elif self.start_step:
            self.say(f"resume    after step {self.start_step}")
        if self.console.is_terminal and self.trains_on:
            self._show_progress()

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        self.console.print(as_utf8(text), markup=False)

    def moved(self, steps_done: int) -> None:
        """Called after each step: a terminal shows how far the run is, also between its log lines."""
        if self.progress:
            self.progress.update(self.progress.task_ids[0], completed=steps_done)

    def train(self, record: MetricsRecord) -> None:
        """Metrics of the steps since the last log line."""
        self._record(record)
        if self.progress:
            self.progress.update(self.progress.task_ids[0], description=self._figures(record))
        else:
            self.say(f"{self._at(record.step)}  {self._figures(record)}")

    def validation(self, steps_done: int, elapsed_s: float, evaluation: Evaluation, model: Classifier) -> None:
        """The figures of a validation, and how the weights and gradients of `model` are spread now and then."""
        loss, accuracy = evaluation.loss, evaluation.accuracy
        self._record(
            MetricsRecord(kind="validation", step=steps_done, loss=loss, accuracy=accuracy, elapsed_s=elapsed_s)
        )
        self._draw("confusion", "validation", evaluation.confusion.tolist(), self.plan.data.class_names, steps_done)
        if steps_done >= min(self.histograms_at + self.total_steps / HISTOGRAMS, self.total_steps):
            self.histograms_at = steps_done
            self._draw("weights", model, steps_done)
        self.say(f"{self._at(steps_done)}  validation  loss {loss:.4f}  accuracy {accuracy:.2%}")

    def test(self, tested: Tested) -> None:
        """The final figures, and with TensorBoard what the model makes of each test image."""
        result, run = tested.result, shell_word(self.plan.run.path)
        self._end_progress()
        self._draw("curves", "test", result)
        self._draw("confusion", "test", result.confusion_matrix, result.names, result.step)
        self._draw("result", self.plan.config.to_json(), result)
        self.say(result_line(result))
        self.say(f"time      {seconds_line(result.seconds)}")
        model = self.plan.config.model
        code = f" --model {shell_word(named_again(model))}" if is_own_code(model) else ""
        commands = [f"dist-mnist report {run}{code}", f"dist-mnist predict IMAGE... --ckpt {run}{code}"]
        if self.plan.run.tensorboard_path.exists():
            commands.insert(0, f"tensorboard --logdir {run}")
        self.say(f"result    {self.plan.run.result_path}")
        for number, command in enumerate(commands):
            self.say(f"{'' if number else 'next':10}{command}")
        if tested.probabilities is not None:
            self._draw("predictions", tested.probabilities, tested.dataset, result.names, result.step)
            self._draw("network", tested.model, tested.dataset.image_shape)

    def stopped(self, steps_done: int) -> None:
        """The run ended by a stop request, and has saved."""
        self._end_progress()
        self.say(f"stopped   after step {steps_done}, and saved; the same command resumes from there")

    def close(self) -> None:
        """Write out what is buffered and leave the terminal as it was."""
        self._end_progress()
        self._draw("close")
        self._try(self.plan.run.metrics_path.name, self.metrics.close)

    def _at(self, step: int) -> str:
        return f"step {step:>{len(str(self.total_steps))}}/{self.total_steps}"

    def _figures(self, record: MetricsRecord) -> str:
        """The least needed last: a narrow terminal cuts the line."""
        per_step = record.elapsed_s / (record.step - self.start_step)
        minutes, seconds = divmod(int(per_step * (self.total_steps - record.step)), 60)
        return (
            f"epoch {record.epoch:.2f}  loss {record.loss:.4f}  accuracy {record.accuracy:.2%}  "
            f"left {minutes}:{seconds:02}  {record.images_per_s:,.0f} images/s  lr {record.learning_rate:.4g}"
        )

    def _record(self, record: MetricsRecord) -> None:
        self.plan.run.ownership.check()
        self._try(self.plan.run.metrics_path.name, self.metrics.write, to_json(record) + "\n")
        self._draw("curves", record.kind, record)

    def _open_board(self) -> None:
        run = self.plan.run
        if as_utf8(str(run.path)) != str(run.path):
            warn(f"{run.path}: there are no curves for TensorBoard, which reads no folder whose name is not UTF-8")
            return

        def open_board() -> None:
            from dist_mnist.reporting.tensorboard import Board

            self.board = Board(run.tensorboard_path, self.start_step)

        self._try("TensorBoard", open_board)

    def _draw(self, what: str, *arguments: Any) -> None:
        if self.board:
            self._try("TensorBoard", getattr(self.board, what), *arguments)

    def _try(self, what: str, write: Callable[..., Any], *arguments: Any) -> None:
        """Write what training can do without, whatever goes wrong; of each kind the first failure is told."""
        try:
            write(*arguments)
        except Exception as error:
            if what not in self.failed:
                self.failed.add(what)
                why = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
                warn(f"{self.plan.run.path}: {what} cannot be written ({why}); training goes on without")

    def _end_progress(self) -> None:
        if self.progress:
            self.progress.stop()

    def _show_progress(self) -> None:
        rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")
        columns = (MofNCompleteColumn(), TextColumn("{task.description}", table_column=rest))
        bar = (BarColumn(20),) if self.console.width >= WIDE else ()
        self.progress = Progress(*bar, *columns, console=self.console, expand=True)
        self.progress.add_task("", total=self.total_steps, completed=self.start_step)
        self.progress.start()


def _cut_metrics(path: Path, step: int) -> Path:
    """Drop the lines of steps after the checkpoint that a run resumes from: they will be written again."""
    if path.exists():
        lines = [line for line in path.read_bytes().splitlines(keepends=True) if _step_of(line) <= step]
        with atomic_write(path) as file:
            file.writelines(lines)
    return path


def _step_of(line: bytes) -> float:
    """The step of a line of metrics; infinity for one that was cut off when its writer was killed, or is none."""
    try:
        return parse(line, MetricsRecord).step if line.endswith(b"\n") else math.inf
    except ValueError:
        return math.inf
