"""Console output of a run: a progress bar on a terminal, a plain line for each log interval in a log file."""

from rich.console import Console as Terminal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from dist_mnist.config.settings import is_own_code, named_again
from dist_mnist.data.labels import listed
from dist_mnist.distributed.world import counted
from dist_mnist.reporting.listener import Listener, RunEnd, RunStart, Validation
from dist_mnist.reporting.text import class_label, result_line, seconds_line
from dist_mnist.run.plan import Plan
from dist_mnist.run.records import MetricsRecord, RunResult
from dist_mnist.utils.errors import as_utf8, warn, warn_once
from dist_mnist.utils.files import shell_word

WIDE = 120  # least columns of a terminal that shows the bar


class Console(Listener):
    """Prints the progress of a run; `processes` describes its processes and devices."""

    def __init__(self, plan: Plan, processes: str):
        self.plan, self.processes = plan, processes
        self.start_step, self.total_steps = 0, plan.total_steps
        self.terminal = _terminal()
        self.progress: Progress | None = None

    def say(self, text: str) -> None:
        """Print a line; one that standard output cannot take (full disk, closed pipe) is dropped, with a warning."""
        try:
            self.terminal.print(as_utf8(text), markup=False)
        except (OSError, SystemExit) as error:  # Rich raises SystemExit for a closed pipe
            self.terminal = _terminal()  # the old one would write its unwritten buffer again
            why = (isinstance(error, OSError) and error.strerror) or "its reader has gone"
            warn_once("standard output", f"standard output cannot be written ({why}); training goes on without it")

    def on_start(self, start: RunStart) -> None:
        """Print data, network and run; show the progress bar."""
        self.start_step = start.step
        self._say_data()
        self._say_network(start)
        batch = self.plan.config.batch_size
        self.say(f"run       {start.run_dir}: {self.total_steps} steps of {batch} images on {self.processes}")
        if start.step >= self.total_steps:
            self.say(f"finished  all {self.total_steps} steps of this run are done; it is only evaluated again")
        elif start.ended:
            self.say(f"finished  this run ended early, after step {start.step}; it is only evaluated again")
        elif start.step:
            self.say(f"resume    after step {start.step}")
        if self.terminal.is_terminal and start.step < self.total_steps and not start.ended:
            self._show_progress()

    def on_step(self, step: int) -> None:
        """Move the progress bar of a terminal, also between log lines."""
        if self.progress:
            self.progress.update(self.progress.task_ids[0], completed=step)

    def on_log(self, record: MetricsRecord) -> None:
        """Print the metrics of the steps since the last log line."""
        if self.progress:
            self.progress.update(self.progress.task_ids[0], description=self._figures(record))
        else:
            self.say(f"{self._at(record.step)}  {self._figures(record)}")

    def on_validation(self, validation: Validation) -> None:
        """Print the result of a validation."""
        step, found = validation.record.step, validation.evaluation
        self.say(f"{self._at(step)}  validation  loss {found.loss:.4f}  accuracy {found.accuracy:.2%}")

    def on_end(self, end: RunEnd) -> None:
        """Print the result and what to do next; restore the terminal."""
        if self.progress:
            self.progress.stop()
        if end.result:
            self._say_result(end.result)
        elif end.outcome == "stopped":
            self.say(f"stopped   after step {end.step}, and saved; the same command resumes from there")

    def _say_data(self) -> None:
        plan, data = self.plan, self.plan.data
        sizes = f"{len(data.train)} for training, {len(data.validation)} for validation, {len(data.test)} for testing"
        held_out = f" (held out, {data.test_fraction:.0%} of the training images)" if data.test_fraction else ""
        numbered = data.class_names == tuple(map(str, range(data.num_classes)))
        names = "" if numbered else f": {listed([class_label(name) for name in data.class_names])}"
        self.say(f"data      {plan.folder}: {sizes}{held_out}; {data.num_classes} classes{names}")
        for note in data.notes:
            warn(note)

    def _say_network(self, start: RunStart) -> None:
        config = self.plan.config
        name = "" if config.model == "cnn" else f"{config.model}, "
        size = counted(start.parameters, "parameter")
        self.say(f"network   {name}{size}, {config.precision}, recipe {config.recipe!r}")
        for note in start.notes:
            self.say(note)

    def _say_result(self, result: RunResult) -> None:
        paths, model = self.plan.run, self.plan.config.model
        run = shell_word(paths.path)
        self.say(result_line(result))
        self.say(f"time      {seconds_line(result.seconds)}")
        code = f" --model {shell_word(named_again(model))}" if is_own_code(model) else ""
        commands = [f"dist-mnist report {run}{code}", f"dist-mnist predict IMAGE... --ckpt {run}{code}"]
        if paths.tensorboard_path.exists():
            commands.insert(0, f"tensorboard --logdir {run}")
        self.say(f"result    {paths.result_path}")
        for number, command in enumerate(commands):
            self.say(f"{'' if number else 'next':10}{command}")

    def _at(self, step: int) -> str:
        return f"step {step:>{len(str(self.total_steps))}}/{self.total_steps}"

    def _figures(self, record: MetricsRecord) -> str:
        """Format metrics, the least important last: a narrow terminal truncates the line."""
        per_step = record.elapsed_s / (record.step - self.start_step)
        minutes, seconds = divmod(int(per_step * (self.total_steps - record.step)), 60)
        return (
            f"epoch {record.epoch:.2f}  loss {record.loss:.4f}  accuracy {record.accuracy:.2%}  "
            f"left {minutes}:{seconds:02}  {record.images_per_s:,.0f} images/s  lr {record.learning_rate:.4g}"
        )

    def _show_progress(self) -> None:
        rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")
        columns = (MofNCompleteColumn(), TextColumn("{task.description}", table_column=rest))
        bar = (BarColumn(20),) if self.terminal.width >= WIDE else ()
        self.progress = Progress(*bar, *columns, console=self.terminal, expand=True)
        self.progress.add_task("", total=self.total_steps, completed=self.start_step)
        self.progress.start()


def _terminal() -> Terminal:
    return Terminal(soft_wrap=True, highlight=False)
