"""The run directory: paths of a run's files, and the start and end of attempts."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from dist_mnist.elastic.progress import read_progress
from dist_mnist.run.checkpoints.store import CheckpointStore
from dist_mnist.run.ownership import Ownership
from dist_mnist.run.records import Failures, Stopped
from dist_mnist.utils.errors import UserError, os_error_as, whole_number
from dist_mnist.utils.files import UNFINISHED, atomic_write, to_json
from dist_mnist.utils.schema import parse

SAME_FAILURES = 2  # failures in a row at the same step after which a run is not restarted


class RunDirectory:
    """The folder of one run: config.json, checkpoints/, tensorboard/, metrics.jsonl and result.json.

    Only rank 0 may write, as the owner (`owned`). An owner that has lost the folder to another gets `TakenOver`.
    """

    def __init__(self, path: Path):
        self.path = path
        self.tensorboard_path = path / "tensorboard"
        self.metrics_path = path / "metrics.jsonl"
        self.result_path = path / "result.json"
        self.config_path = path / "config.json"
        self.stopped_path = path / "stopped.json"
        self.progress_path = path / ".progress"
        self._failures_path = path / ".failures"
        self.ownership = Ownership(path)
        self.checkpoints = CheckpointStore(path / "checkpoints", self.ownership.check)
        self._new_parents: list[Path] = []  # parent folders that were created for it

    @contextmanager
    def owned(self, wait_s: float = 5.0) -> Iterator[None]:
        """Create the folders and own them for a `with` block (see `Ownership.held`).

        Raises:
            UserError: the folder cannot be created or written, or another run is using it; the message names it.
        """
        with ExitStack() as stack:
            with os_error_as(f"{self.path}: the run directory cannot be written", "give another --run-dir"):
                self._new_parents = [parent for parent in self.path.parents if not parent.exists()]
                self.checkpoints.folder.mkdir(parents=True, exist_ok=True)
                self._check_places()
                stack.enter_context(self.ownership.held(wait_s))
            yield

    def remove_if_empty(self) -> None:
        """Remove the folder if it has nothing but the files of `owned`."""
        if sorted(self.path.iterdir()) == [self.ownership.lock_path, self.checkpoints.folder]:
            with suppress(OSError):  # there are checkpoints
                self.checkpoints.folder.rmdir()
                self.ownership.lock_path.unlink()
                for folder in (self.path, *self._new_parents):
                    folder.rmdir()

    def _check_places(self) -> None:
        """Raise a UserError if something other than a file is at the path of one of the run's files."""
        chain = self.checkpoints.chain.path
        of_user = (self.metrics_path, self.result_path, self.config_path, self.stopped_path, chain)
        own = (self.progress_path, self._failures_path, self.ownership.owner_path, self.ownership.lock_path)
        for path in (*of_user, *own):
            if os.path.lexists(path) and not path.is_file() and os.path.lexists(path):  # its owner may just remove it
                raise UserError(f"{path} is not a regular file: remove it, or give another --run-dir")

    def begin_attempt(self) -> None:
        """Begin an attempt at the run, the first or another.

        Raises:
            UserError: torchrun has restarted a run that has failed twice at the same step.
        """
        self.stopped_path.unlink(missing_ok=True)
        for folder in (self.path, self.checkpoints.folder):
            for path in folder.glob(UNFINISHED):  # left by a run that was killed while it wrote
                path.unlink()
        failures = Failures()
        if (last := read_progress(self.progress_path)) and whole_number("TORCHELASTIC_RESTART_COUNT", 0):
            with suppress(OSError, ValueError):
                failures = parse(self._failures_path.read_bytes(), Failures)
            times = failures.times + 1 if failures.step == last[0] else 1
            failures = Failures(step=last[0], times=times)
            if times >= SAME_FAILURES:
                raise UserError(
                    f"{self.path}: the run failed {times} times in a row at step {last[0]}, most recently in phase "
                    f"'{last[1]}', and is not restarted: see the errors above"
                )
        self.write_json(self._failures_path, failures)

    def end_attempt(self, steps_done: int, signal: str | None) -> None:
        """Record that the run finished, or was stopped by a `signal`, which is written to stopped.json."""
        if signal:
            self.write_json(self.stopped_path, Stopped(step=steps_done, signal=signal))
        for path in (self.progress_path, self._failures_path):
            path.unlink(missing_ok=True)

    def write_json(self, path: Path, value: object) -> None:
        """Write a record or JSON values to one of the run's JSON files."""
        self.ownership.check()
        with atomic_write(path) as file:
            file.write(to_json(value, indent=2).encode() + b"\n")
