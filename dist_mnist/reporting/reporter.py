"""Calls the listeners of a run on rank 0; other ranks hold a null object."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

from dist_mnist.config.settings import TRACKERS
from dist_mnist.distributed.world import World
from dist_mnist.evaluation.checkpoints.result import Tested
from dist_mnist.evaluation.evaluate import Evaluation
from dist_mnist.model.classifier import Classifier
from dist_mnist.model.source import UserCode, kind_of, users_code
from dist_mnist.reporting.listener import Listener, Outcome, RunEnd, RunStart, SavedCheckpoint, Validation
from dist_mnist.reporting.listeners import kubeflow
from dist_mnist.reporting.listeners.console import Console
from dist_mnist.reporting.listeners.follower import Follower, Report, tracker
from dist_mnist.reporting.listeners.metrics_file import MetricsFile
from dist_mnist.reporting.text import setting_text
from dist_mnist.run.network import Network
from dist_mnist.run.plan import Plan
from dist_mnist.run.records import CheckpointInfo, Ended, MetricsRecord, read_config
from dist_mnist.utils.errors import UserError, as_utf8, short, warn
from dist_mnist.utils.null import null

Listeners = Sequence[Listener]


class Reporter:
    """Calls every listener in turn. An exception becomes a warning, once for each method of a listener."""

    def __init__(self, plan: Plan, console: Console, listeners: Listeners):
        self.plan, self.console = plan, console
        self.listeners: list[Listener] = [console, *listeners]
        self.steps_done = 0
        self._saved: SimpleQueue[SavedCheckpoint] = SimpleQueue()
        self._failed: set[str] = set()
        self._running = False

    @classmethod
    @contextmanager
    def on_main(cls, world: World, plan: Plan, listeners: Listeners = ()) -> Iterator["Reporter"]:
        """Yield a reporter on rank 0, which also reports a failure of the `with` block; a silent one on other ranks.

        Raises:
            UserError: a listener given by `--log-to` cannot be created.
        """
        if not world.is_main:
            yield null(Reporter)
            return
        reporter = cls(plan, Console(plan, str(world)), [*_listeners(plan), *listeners])
        try:
            yield reporter
        except BaseException as error:
            reporter._end("failed", error=error)
            raise

    def begin(self, network: Network, step: int, ended: Ended | None) -> None:
        """Report the start of the run after `step` steps; `ended` if it ended before its full length."""
        self.steps_done, self._running = step, True
        start = RunStart(
            run_dir=self.plan.run.path,
            config=read_config(self.plan.run.path),
            parameters=network.model.num_parameters(),
            step=step,
            total_steps=self.plan.total_steps,
            notes=tuple(network.notes),
            ended=ended,
        )
        self._tell("on_start", start)

    def say(self, text: str) -> None:
        """Print a line on the console."""
        self.console.say(text)

    def step(self, steps_done: int) -> None:
        """Report a step; must be called after each."""
        self.steps_done = steps_done
        self._tell("on_step", steps_done)
        self._tell_saved()

    def log(self, record: MetricsRecord) -> None:
        """Report the metrics of the steps since the last log line.

        Raises:
            TakenOver: another process has taken over the run directory; `validation` raises it, too.
        """
        self.plan.run.ownership.check()
        self._tell("on_log", record)

    def validation(self, steps_done: int, elapsed_s: float, evaluation: Evaluation, model: Classifier) -> None:
        """Report a validation of `model`."""
        self.plan.run.ownership.check()
        record = MetricsRecord(
            kind="validation",
            step=steps_done,
            loss=evaluation.loss,
            accuracy=evaluation.accuracy,
            elapsed_s=elapsed_s,
            unix_time_s=time.time(),
        )
        self._tell("on_validation", Validation(record=record, evaluation=evaluation, model=model))

    def saved(self, path: Path, info: CheckpointInfo) -> None:
        """Report a checkpoint on disk. Any thread may call this; listeners are called in the training thread."""
        self._saved.put(SavedCheckpoint(path=path, info=info))

    def finished(self, tested: Tested) -> None:
        """Report that the run has finished and has been tested."""
        self._end("finished", tested=tested)

    def stopped(self) -> None:
        """Report that a stop request has ended the run, after it has saved."""
        self._end("stopped")

    def _end(self, outcome: Outcome, tested: Tested | None = None, error: BaseException | None = None) -> None:
        if self._running:
            self._tell_saved()
            self._running = False
            self._tell("on_end", RunEnd(outcome=outcome, step=self.steps_done, tested=tested, error=error))

    def _tell_saved(self) -> None:
        while not self._saved.empty():
            self._tell("on_checkpoint", self._saved.get())

    def _tell(self, method: str, of: object) -> None:
        for listener in tuple(self.listeners):
            try:
                getattr(listener, method)(of)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # also SystemExit, and asyncio's CancelledError
                self._warn_once(listener, method, error)
                if method == "on_start":
                    self.listeners.remove(listener)

    def _warn_once(self, listener: Listener, method: str, error: BaseException) -> None:
        says_what = type(listener).__str__ is not object.__str__
        what = _text(listener) if says_what else f"{type(listener).__name__}.{method} failed"
        if what not in self._failed:
            self._failed.add(what)
            why = isinstance(error, OSError) and error.strerror
            why = why or f"{type(error).__name__}: {short(' '.join(_text(error).split()), 300)}"
            warn(f"{self.plan.run.path}: {what} ({why}); training goes on without it")


def _text(of: object) -> str:
    """`str` of what may be the user's, and may fail at that."""
    try:
        return str(of)
    except Exception:
        return type(of).__name__


def _listeners(plan: Plan) -> Iterator[Listener]:
    """Yield the listeners, besides the console, that settings and environment ask for."""
    run, config = plan.run, plan.config
    yield MetricsFile(run.metrics_path)
    if config.tensorboard and not run.result_path.exists():
        if as_utf8(str(run.path)) == str(run.path):
            from dist_mnist.reporting.listeners.tensorboard import Board

            yield Board(plan)
        else:
            warn(f"{run.path}: there are no curves for TensorBoard, which cannot read a folder whose name is not UTF-8")
    yield from kubeflow.from_environment()
    if not set(TRACKERS).isdisjoint(config.log_to):
        yield Report()
    for name in config.log_to:
        yield Follower(tracker(name), run.ownership.check) if name in TRACKERS else _own(name)
    before = plan.started.settings.get("log_to") if plan.started else None
    if before and not config.log_to:
        names = short(setting_text(before), 200)
        warn(f"{run.path} was logged to {names} before, but is not now: give --log-to at each start")


def _own(name: str) -> Listener:
    """Create an instance of the class given by `--log-to FILE.py:CLASS`.

    Raises:
        UserError: the class cannot be imported or instantiated, or is not a listener.
    """
    code = UserCode.of(name, "--log-to")
    make = code.find()
    with users_code(f"--log-to {name}", code.origin):
        listener = make()
    if not isinstance(listener, Listener):
        raise UserError(f"--log-to {name} gives {kind_of(listener)}, not a dist_mnist.Listener")
    return listener
