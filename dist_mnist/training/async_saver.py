"""Saving beside training: the weights are copied between two steps, and written while training goes on."""

import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from dist_mnist.config.settings import Config
from dist_mnist.distributed.world import World
from dist_mnist.run.checkpoints.file import Arrays
from dist_mnist.run.checkpoints.store import CheckpointStore
from dist_mnist.run.records import CheckpointInfo
from dist_mnist.utils.errors import UserError, warn
from dist_mnist.utils.null import null

OVERHEAD = 0.005  # of the time, for checkpoints between those that are saved whatever the clock says
SHORTEST_S, LONGEST_S = 5.0, 60.0
OnSaved = Callable[[Path, CheckpointInfo], object]


def no_news(path: Path, info: CheckpointInfo) -> None:
    """Nobody asks what is on the disk."""


class AsyncSaver:
    """Rank 0's: copies the state, and leaves the writing to a thread.

    Of a checkpoint that cannot be written nothing is left, and those before it are untouched; training goes on with a
    warning, or ends, as `--save-errors` says.

    Args:
        store: where checkpoints are written and pruned.
        state: gives a copy of all that a checkpoint holds.
        shares_cores: whether training computes on the CPU, which the writing thread then takes a core of.
        on_saved: is told of each checkpoint that is on the disk, in the writing thread.

    Raises:
        UserError: on construction, if the disk has no room for two checkpoints.
    """

    def __init__(
        self,
        store: CheckpointStore,
        state: Callable[[], Arrays],
        config: Config,
        shares_cores: bool = True,
        on_saved: OnSaved = no_news,
    ):
        self.store, self.state, self.config, self.shares_cores = store, state, config, shares_cores
        self.on_saved = on_saved
        self.run_dir = store.folder.parent
        self.stalled_s = self.writing_s = 0.0  # by the last save: of training's thread, and of the writing one
        self.saved_at = time.monotonic()
        self.writing: Future[None] | None = None
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="save")
        self._check_room()

    @classmethod
    def on_main(
        cls, world: World, store: CheckpointStore, state: Callable[[], Arrays], config: Config, on_saved: OnSaved
    ) -> "AsyncSaver":
        """A saver on rank 0, and on other ranks one that does nothing."""
        return cls(store, state, config, world.device.type == "cpu", on_saved) if world.is_main else null(AsyncSaver)

    def overdue(self) -> bool:
        """Whether the last save is longer ago than `--checkpoint-every-s`, or than `affordable_s` without it."""
        every_s = self.config.checkpoint_every_s
        if every_s is None:
            every_s = self.affordable_s()
        return every_s > 0 and time.monotonic() - self.saved_at >= every_s

    def affordable_s(self) -> float:
        """Seconds from the last save to the next: the fewest by which that cost at most `OVERHEAD`, from 5 to 60.

        A save costs what training loses by it: the copy, the wait for the save before, and on a CPU the time for which
        the writing thread computes. While a checkpoint is being written its cost is not known, and the most holds.

        Young (1974) and Daly (2006) minimise the time that saves and failures take together: sqrt(2 * cost * MTBF) is
        their optimum to first order. That needs the mean time between failures (MTBF), which nobody knows here; so the
        overhead is bounded instead. cost / OVERHEAD is their optimum where a failure comes every cost / (2 *
        OVERHEAD**2): half an hour, if a save costs 0.1 s. Where failures are rarer, more is saved than would be
        optimal, for half a percent at most; where they are more frequent, less.
        """
        if self.writing and not self.writing.done():
            return LONGEST_S
        cost_s = self.stalled_s + (self.writing_s if self.shares_cores else 0.0)
        return min(max(SHORTEST_S, cost_s / OVERHEAD), LONGEST_S)

    def save(self, info: CheckpointInfo) -> None:
        """Begin to write a checkpoint of the state as it is now, with its description.

        Raises:
            UserError: the one before could not be written, and the run is not to go on then.
        """
        began = time.monotonic()
        self.finish(warn_only=self.config.save_errors == "warn")
        self.writing = self.thread.submit(self._write_timed, self.state(), info)
        self.saved_at = time.monotonic()
        self.stalled_s = self.saved_at - began

    def finish(self, warn_only: bool = False) -> None:
        """Wait until what is being written is on the disk.

        Raises:
            UserError: it could not be written, and that is not only to be warned of.
        """
        writing, self.writing = self.writing, None
        try:
            if writing:
                writing.result()
        except OSError as error:
            text = f"{self.run_dir}: a checkpoint could not be written ({error.strerror}); those before it are kept"
            if not warn_only:
                raise UserError(f"{text}. Make room, and the same command resumes from the last of them.") from None
            warn(f"{text}, and training goes on WITHOUT A NEW ONE: make room")

    def close(self) -> None:
        """End the thread, after what it is writing."""
        self.thread.shutdown()

    def _write_timed(self, arrays: Arrays, info: CheckpointInfo) -> None:
        began = time.thread_time()
        try:
            self._write(arrays, info)
        finally:
            self.writing_s = time.thread_time() - began

    def _write(self, arrays: Arrays, info: CheckpointInfo) -> None:
        self.store.check_owner()
        self.store.save(arrays, info)
        self.on_saved(self.store.path(info.step), info)
        self.store.prune(self.config.keep)

    def _check_room(self) -> None:
        needed = 2 * sum(np.asarray(array).nbytes for array in self.state().values())
        free = shutil.disk_usage(self.run_dir).free
        if free < needed:
            raise UserError(
                f"{self.run_dir}: there is no room for checkpoints: {free / 1e6:.0f} MB are free, two take "
                f"{needed / 1e6:.0f} MB; make room, or give another --run-dir"
            )
