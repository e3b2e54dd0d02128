"""Hyperparameter search: `dist-mnist sweep --search tpe --trials 30 lr=loguniform:0.01:0.5 model={cnn,resnet}`.

Each trial is a training process with its own run directory and the values on its command line. The objective is the
best accuracy on the validation split; the test split is not used. Workers started with the same command on the same
folder share the trials. A worker that is killed leaves its trial unfinished, and the next free worker resumes it.
"""

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import Timeout
from msgspec import Struct

from dist_mnist.config.overrides import Overrides, as_options
from dist_mnist.config.resolve import resolve
from dist_mnist.config.settings import FIELDS
from dist_mnist.run.checkpoints.store import store_of
from dist_mnist.run.records import MetricsRecord, read_run
from dist_mnist.tools.choices import SearchMethod
from dist_mnist.tools.sweep.hparams import shared_settings, write_columns
from dist_mnist.tools.sweep.process import Trainings, wait_until_left
from dist_mnist.tools.sweep.study import (
    UNGUARDED,
    Lock,
    SearchSettings,
    as_text,
    begin,
    check_begun,
    check_optuna,
    distributions,
    open_study,
)
from dist_mnist.tools.sweep.words import Choices, Interval, Space, options, search_space, size
from dist_mnist.utils.errors import UserError, os_error_as, tell, warn_once
from dist_mnist.utils.files import locked, shell_word
from dist_mnist.utils.schema import parse

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

FOLDER = "search"  # subfolder of the run directories' parent, for journal, locks and logs of the trials
LOOK_EVERY_S = 0.5  # at the validations of a trial that may be pruned
ROOM = 100_000_000  # bytes; with less free disk space a full disk counts as the cause of a failure
REASON, PRUNED_AT = "reason", "pruned_at"  # attributes of a trial


class TrialRow(Struct, frozen=True, kw_only=True):
    """A row of the table of trials; figures that do not exist are None."""

    number: int
    run: str
    state: str  # complete, pruned, failed or unfinished
    values: Mapping[str, str]
    validation_accuracy: float | None  # the best
    test_accuracy: float | None
    training_s: float | None
    reason: str | None = None  # why it failed


class Search:
    """One worker of a search.

    Args:
        words: search space, `NAME=INTERVAL` and `NAME=VALUE`; they override `others`.
        parent: folder for the run directories.
        others: settings of all trials, by name.
        trials: number of trials, including failed ones.
        prune: whether the median rule stops trials that fall behind; successive halving always prunes.
        seed: random seed for the values.

    Raises:
        UserError: Optuna is missing, or something of this does not fit.
    """

    def __init__(
        self,
        words: list[str],
        parent: Path,
        others: Mapping[str, Any],
        method: SearchMethod,
        trials: int,
        prune: bool = False,
        seed: int = 0,
    ):
        space = search_space(words)
        fixed = {name: one[0] for name, one in space.items() if isinstance(one, tuple) and len(one) == 1}
        self.space: Space = {name: possible for name, possible in space.items() if name not in fixed}
        self.parent, self.trials = parent, trials
        shared = shared_settings(words, others)
        self.options = [*as_options(shared), *options(fixed)]
        self.draws = shared.get("tensorboard", True)
        self.prunes = prune or method is SearchMethod.HALVING
        self._check(shared, method, prune)
        check_optuna()
        described = {name: _described(possible) for name, possible in self.space.items()}
        self.settings = SearchSettings(method=method, prune=prune, seed=seed, space=described, options=self.options)
        self.trainings, self.folder = Trainings(), parent / FOLDER

    @cached_property
    def lock(self) -> Lock:
        """The lock of the record; makes its folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return Lock(self.folder / "journal.log")

    @cached_property
    def study(self) -> "Study":
        """The record of the search, begun if it does not exist; errors as from `open_study`."""
        return open_study(self.lock, self.space, self.settings)

    def _check(self, shared: Mapping[str, Any], method: SearchMethod, prune: bool) -> None:
        if prune and method is SearchMethod.HALVING:
            raise UserError("--search halving always prunes: omit --prune")
        if self.trials > (points := size(self.space)):
            raise UserError(f"--trials must be at most {points:g}, the number of combinations; got {self.trials}")
        config = resolve(Overrides({name: value for name, value in shared.items() if name in FIELDS}))
        if not config.validation_fraction and not {"validation_fraction", "recipe"} & self.space.keys():
            raise UserError("a search compares trials on the validation split: give --validation-fraction above 0")

    def check(self) -> None:
        """Let the space be checked before the first trial, and begin the search; what fails may be given anew.

        Raises:
            UserError: some values do not fit, and the first to say so has said why; or the search was begun with other
                settings.
        """
        study = self.study
        with self.lock.held():  # another worker would claim the folder that is tried in
            if not check_begun(study, self.settings, self.parent):
                self.check_space()
                if self.draws:
                    write_columns(self.parent, self.space)
                begin(study, self.settings)

    def check_space(self) -> None:
        """Let each value of the space, or the ends of its interval, be checked in a training; leaves nothing behind.

        Raises:
            UserError: some do not fit; the first to say so has said why.
        """
        ends = {name: _ends(possible) for name, possible in self.space.items()}
        for index in range(max(map(len, ends.values()))):
            values = {name: of_name[index % len(of_name)] for name, of_name in ends.items()}
            if self.trainings.train(
                self.run_dir(0), [*self.options, *options(values), "--dry-run"], subprocess.DEVNULL
            ):
                raise UserError(f"{_listed(values)} cannot be trained, so nothing was started")

    def run_dir(self, number: int) -> Path:
        """Return the run directory of a trial."""
        return self.parent / f"trial-{number:03}"

    def run(self) -> None:
        """Train what no other worker does, until there are as many trials as asked for, or a stop request comes.

        Raises:
            UserError: the disk is full; the same command resumes.
        """
        self.trainings.listen()
        with os_error_as(f"{self.parent}: the search cannot continue", "fix the cause; the same command resumes"):
            while not self.trainings.asked_to_stop:
                with self._claimed() as trial:
                    if trial is None:
                        return
                    self._finish(trial)

    @contextmanager
    def _claimed(self) -> "Iterator[Trial | None]":
        """Context manager: claim a trial for this worker, an orphaned or a new one; None if no trial is left."""
        with ExitStack() as stack:
            with self.lock.held():
                trial = self._unfinished(stack) or self._new(stack)
                if trial:
                    for name, distribution in distributions(self.space).items():
                        trial._suggest(name, distribution)
            yield trial

    def _unfinished(self, stack: ExitStack) -> "Trial | None":
        from optuna.trial import Trial, TrialState

        for trial in self.study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            if self._own(stack, trial.number):
                return Trial(self.study, trial._trial_id)
        return None

    def _new(self, stack: ExitStack) -> "Trial | None":
        if len(self.study.get_trials(deepcopy=False)) >= self.trials:
            return None
        trial = self.study.ask()
        self._own(stack, trial.number)
        return trial

    def _own(self, stack: ExitStack, number: int) -> bool:
        """Try to claim a trial until the stack unwinds; return False if another worker has it."""
        try:
            stack.enter_context(locked(self.folder / f".{self.run_dir(number).name}.lock", UNGUARDED, wait_s=0))
        except Timeout:
            return False
        return True

    def _finish(self, trial: "Trial") -> None:
        """Train a trial and record its result; after a stop request the trial stays unfinished."""
        run_dir, log = self.run_dir(trial.number), self.folder / f"{self.run_dir(trial.number).name}.log"
        finished, code, said = run_dir / "result.json", 0, ""
        if not finished.exists() and PRUNED_AT not in trial.user_attrs:
            tell(f"{run_dir}, {trial.number + 1} of {self.trials}: {_listed(as_text(trial))}", sys.stdout)
            code, said = self._train(trial, run_dir, log)
        if finished.exists():
            self._report(trial, run_dir)
            self._complete(trial, run_dir)
        elif PRUNED_AT in trial.user_attrs:
            self._tell(trial, "PRUNED", f"pruned at validation {trial.user_attrs[PRUNED_AT]}")
        elif self.trainings.asked_to_stop or (run_dir / "stopped.json").exists():
            self.trainings.asked_to_stop = True
        else:
            self._check_room()
            self._fail(trial, said or _ended_by(code))

    def _check_room(self) -> None:
        """Raise a UserError if a full disk may have failed the trial, and would fail all others too."""
        if (free := shutil.disk_usage(self.parent).free) < ROOM:
            raise UserError(
                f"{self.parent}: a trial failed with only {free / 1e6:.0f} MB of disk space free: free more, then "
                "run the same command to resume"
            )

    def _train(self, trial: "Trial", run_dir: Path, log: Path) -> tuple[int, str]:
        """Train; gives the exit code, and what was said of the error."""
        wait_until_left(run_dir)
        command = [*self.options, *options(as_text(trial))]
        with open(log, "a+b") as output:
            before = output.seek(0, 2)

            def look() -> None:
                if PRUNED_AT not in trial.user_attrs and (number := self._report(trial, run_dir)):
                    trial.set_user_attr(PRUNED_AT, number)  # before the stop request, as this worker may be killed
                    self.trainings.stop()

            code = self.trainings.train(run_dir, command, output, look, LOOK_EVERY_S if self.prunes else None)
            output.seek(before)
            lines = output.read().decode(errors="replace").splitlines()
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return code, errors[-1] if errors else ""

    def _report(self, trial: "Trial", run_dir: Path) -> int:
        """Record new validations; return the number of the validation at which the trial is to be pruned, or 0."""
        known = self.study.get_trials(deepcopy=False)[trial.number].intermediate_values
        for number, record in enumerate(_validations(run_dir), start=1):
            if number not in known and record.accuracy is not None:
                trial.report(record.accuracy, number)
                if trial.should_prune():
                    return number
        return 0

    def _complete(self, trial: "Trial", run_dir: Path) -> None:
        accuracy = next(row.validation_accuracy for row in store_of(run_dir).summary() if row.best)
        if accuracy is None:
            self._fail(trial, "it has no validation split")
            return
        self.study.tell(trial, accuracy)
        tell(f"{run_dir}: {accuracy:.2%} on the validation split", sys.stdout)
        if self.prunes and len(_validations(run_dir)) < 2:
            warn_once(
                "search pruning",
                "trials have a single validation, at the end, so none can be pruned: give --validate-every N",
            )

    def _fail(self, trial: "Trial", reason: str) -> None:
        trial.set_user_attr(REASON, reason)
        self._tell(trial, "FAIL", f"failed: {reason}")

    def _tell(self, trial: "Trial", state: str, text: str) -> None:
        from optuna.trial import TrialState

        self.study.tell(trial, state=TrialState[state])
        tell(f"{self.run_dir(trial.number)}: {text}", sys.stdout)

    def rows(self) -> list[TrialRow]:
        """Return all trials so far: complete ones from best to worst (ties by number), pruned, failed, unfinished."""
        states = ("complete", "pruned", "failed", "unfinished")
        rows = [self._row(trial) for trial in self.study.get_trials(deepcopy=False)]
        return sorted(rows, key=lambda row: (states.index(row.state), -(row.validation_accuracy or 0), row.number))

    def _row(self, trial: "FrozenTrial") -> TrialRow:
        run_dir = self.run_dir(trial.number)
        run = None
        with suppress(UserError):  # it has not begun, or its folder was damaged or removed since
            run = read_run(run_dir)
        seen = list(trial.intermediate_values.values())
        return TrialRow(
            number=trial.number,
            run=str(run_dir),
            state={"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}.get(trial.state.name, "unfinished"),
            values=as_text(trial),
            validation_accuracy=trial.value if trial.state.name == "COMPLETE" else max(seen, default=None),
            test_accuracy=run.result.accuracy if run and run.result else None,
            training_s=run.training_s if run else None,
            reason=trial.user_attrs.get(REASON),
        )

    def command(self, row: TrialRow) -> str:
        """Return the command that repeats a trial in another folder, with the same bits on this machine."""
        words = [*self.options, *options(row.values), f"--run-dir={self.parent}-{self.run_dir(row.number).name}"]
        return " ".join(["dist-mnist train", *map(shell_word, words)])


def _validations(run_dir: Path) -> list[MetricsRecord]:
    """The validations of a run that may be at work; without lines that are not whole, or that no run wrote."""
    try:
        lines = (run_dir / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    records = []
    for line in lines:
        if line.endswith(b"\n"):
            with suppress(ValueError):
                records.append(parse(line, MetricsRecord))
    return [record for record in records if record.kind == "validation"]


def _described(possible: Interval | Choices) -> str:
    if isinstance(possible, tuple):
        return "{" + ",".join(possible) + "}"
    kind = "int" if possible.whole else "loguniform" if possible.log else "uniform"
    return f"{kind}:{possible.low}:{possible.high}"


def _ends(possible: Interval | Choices) -> list[str]:
    return list(possible) if isinstance(possible, tuple) else [str(possible.low), str(possible.high)]


def _listed(values: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _ended_by(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
