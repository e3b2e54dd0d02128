"""Rank 0's voice: the console, TensorBoard and metrics.jsonl. Other ranks hold a `Silence`."""

import math
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from dist_mnist.data.dataset import IdxDataset
from dist_mnist.distributed.world import World
from dist_mnist.evaluation.evaluate import Evaluation
from dist_mnist.model.cnn import CNN
from dist_mnist.reporting.text import result_line
from dist_mnist.run.plan import Plan
from dist_mnist.run.records import RECORD
from dist_mnist.utils.errors import warn
from dist_mnist.utils.files import atomic_write, to_json
from dist_mnist.utils.schema import parse

T = TypeVar("T")
WIDE = 120  # columns of a terminal in which everything has room
HISTOGRAMS = 20  # of each layer's weights in a run, at most


class Silence:
    """Takes every call that an object of the given class takes (without one, any), and does nothing."""

    def __init__(self, kind: type | None = None):
        self.kind = kind

    def __getattr__(self, name: str) -> Any:
        if self.kind:
            getattr(self.kind, name)  # raises AttributeError for a method that the class does not have
        return lambda *args, **kwargs: None


def silent(kind: type[T]) -> T:
    """Something that stands for an object of the given class and does nothing."""
    return cast(T, Silence(kind))


class Report:
    """Tells a person and the run directory how training goes.

    On a terminal it shows a progress bar; in a log file, a plain line for each log interval.
    """

    def __init__(self, plan: Plan, start_step: int):
        self.plan, self.start_step, self.total_steps = plan, start_step, plan.total_steps
        self.console = Console(soft_wrap=True, highlight=False)
        self.metrics = open(_cut_metrics(plan.run.metrics_path, start_step), "a", buffering=1)  # noqa: SIM115 (see close)
        self.failed: set[str] = set()
        self.board: Any = Silence()
        if plan.config.tensorboard and not plan.run.result_path.exists():
            self._try("TensorBoard", self._open_board)
        self.histograms_at = start_step
        self.progress: Progress | None = None
        self.began = time.monotonic()

    def begin(self, world: World, num_parameters: int) -> None:
        """What is about to happen."""
        plan, config, data = self.plan, self.plan.config, self.plan.data
        sizes = f"{len(data.train)} for training, {len(data.validation)} for validation, {len(data.test)} for testing"
        self.say(f"data      {plan.folder}: {sizes}; {data.num_classes} classes")
        self.say(f"network   {num_parameters:,} parameters, {config.precision}, recipe {config.recipe!r}")
        self.say(f"run       {plan.run.path}: {self.total_steps} steps of {config.batch_size} images on {world}")
        if self.start_step >= self.total_steps:
            self.say(f"finished  this run has made its {self.total_steps} steps; it is only evaluated again")
        elif self.start_step:
            self.say(f"continue  after step {self.start_step}")
        self.began = time.monotonic()
        if self.console.is_terminal and self.start_step < self.total_steps:
            self._show_progress()

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        self.console.print(text, markup=False)

    def moved(self, steps_done: int) -> None:
        """Called after each step: a terminal shows how far the run is, also between its log lines."""
        if self.progress:
            self.progress.update(self.progress.task_ids[0], completed=steps_done)

    def train(self, metrics: dict[str, Any]) -> None:
        """Metrics of the steps since the last log line."""
        slow_rank = metrics.pop("slow_rank")
        if slow_rank and slow_rank.split(" takes")[0] not in self.failed:
            self.failed.add(slow_rank.split(" takes")[0])
            warn(f"{slow_rank}, by step {metrics['step']}: all wait for it")
        self._record("train", metrics)
        self._draw("curves", "train", metrics, metrics["step"])
        if self.progress:
            self.progress.update(self.progress.task_ids[0], description=self._figures(metrics))
        else:
            width = len(str(self.total_steps))
            self.say(f"step {metrics['step']:>{width}}/{self.total_steps}  {self._figures(metrics)}")

    def validation(self, steps_done: int, evaluation: Evaluation, model: CNN) -> None:
        """The figures of a validation, and how the weights and gradients of `model` are spread now and then."""
        metrics = {"step": steps_done, "loss": evaluation.loss, "accuracy": evaluation.accuracy}
        self._record("validation", metrics)
        self._draw("curves", "validation", metrics, steps_done)
        self._draw("confusion", "validation", evaluation.confusion.tolist(), steps_done)
        if steps_done >= min(self.histograms_at + self.total_steps / HISTOGRAMS, self.total_steps):
            self.histograms_at = steps_done
            self._draw("weights", model, steps_done)
        self.say(
            f"step {steps_done:>{len(str(self.total_steps))}}/{self.total_steps}  validation  "
            f"loss {evaluation.loss:.4f}  accuracy {evaluation.accuracy:.2%}"
        )

    def test(self, metrics: dict[str, Any]) -> None:
        """The final figures."""
        self._end_progress()
        self._draw("curves", "test", metrics, metrics["step"])
        self._draw("confusion", "test", metrics["confusion_matrix"], metrics["step"])
        self._draw("result", self.plan.config.to_json(), metrics)
        self.say(result_line(metrics))
        run = shlex.quote(str(self.plan.run.path))
        commands = [f"dist-mnist report {run}", f"dist-mnist predict IMAGE... --ckpt {run}"]
        if self.plan.config.tensorboard:
            commands.insert(0, f"tensorboard --logdir {run}")
        self.say(f"result    {self.plan.run.result_path}")
        for place, command in enumerate(commands):
            self.say(f"{'' if place else 'next':10}{command}")

    def looked_at(self, model: CNN, probabilities: np.ndarray, dataset: IdxDataset, step: int) -> None:
        """What the finished network makes of each test image: (N, classes) probabilities."""
        self._draw("predictions", probabilities, dataset, step)
        self._draw("network", model, dataset.image_shape)

    def stopped(self, steps_done: int) -> None:
        """The run was asked to stop, and has saved."""
        self._end_progress()
        self.say(f"stopped   after step {steps_done}, and saved; the same command goes on from there")

    def close(self) -> None:
        """Write out what is buffered and leave the terminal as it was."""
        self._end_progress()
        self._draw("close")
        self._try(self.plan.run.metrics_path.name, self.metrics.close)

    def _figures(self, metrics: dict[str, float]) -> str:
        """The least needed last: a narrow terminal cuts the line."""
        per_step = (time.monotonic() - self.began) / (metrics["step"] - self.start_step)
        minutes, seconds = divmod(int(per_step * (self.total_steps - metrics["step"])), 60)
        return (
            f"epoch {metrics['epoch']:.2f}  loss {metrics['loss']:.4f}  accuracy {metrics['accuracy']:.2%}  "
            f"left {minutes}:{seconds:02}  {metrics['images_per_s']:,.0f} images/s  lr {metrics['learning_rate']:.4g}"
        )

    def _record(self, kind: str, metrics: dict[str, float]) -> None:
        self.plan.run.ownership.check()
        self._try(
            self.plan.run.metrics_path.name,
            self.metrics.write,
            to_json({"kind": kind, **metrics, "elapsed_s": time.monotonic() - self.began}) + "\n",
        )

    def _open_board(self) -> None:
        from dist_mnist.reporting.tensorboard import Board

        self.board = Board(self.plan.run.tensorboard_path, self.start_step)

    def _draw(self, what: str, *arguments: Any) -> None:
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
    """Drop the lines of steps after the checkpoint that a run continues from: they will be written again."""
    if path.exists():
        lines = [line for line in path.read_bytes().splitlines(keepends=True) if _step_of(line) <= step]
        with atomic_write(path) as file:
            file.writelines(lines)
    return path


def _step_of(line: bytes) -> float:
    """The step of a line of metrics; infinity for one that was cut off when its writer was killed, or is none."""
    try:
        return parse(line, RECORD)["step"] if line.endswith(b"\n") else math.inf
    except ValueError:
        return math.inf
