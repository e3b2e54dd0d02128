"""Asynchronous checkpoints: the state is copied between two steps and written while training continues."""

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

OVERHEAD = 0.005  # fraction of the time for periodic checkpoints, in addition to those at fixed steps
SHORTEST_S, LONGEST_S = 5.0, 60.0
OnSaved = Callable[[Path, CheckpointInfo], object]


def no_news(path: Path, info: CheckpointInfo) -> None:
    """Ignore the news of a saved checkpoint."""


class AsyncSaver:
    """Copy the state on rank 0, and write it in a thread.

    If a checkpoint cannot be written, nothing of it is left and earlier ones are untouched; training continues with a
    warning or ends, according to `--save-errors`.

    Args:
        store: writes and prunes checkpoints.
        state: returns a copy of all arrays of a checkpoint.
        shares_cores: whether training computes on the CPU, so that the writing thread uses one of its cores.
        on_saved: called in the writing thread for each checkpoint that is on the disk.

    Raises:
        UserError: on construction, if the disk has no space for two checkpoints.
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
        self.stalled_s = self.writing_s = 0.0  # time of the last save in the training and in the writing thread
        self.saved_at = time.monotonic()
        self.writing: Future[None] | None = None
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="save")
        self._check_room()

    @classmethod
    def on_main(
        cls, world: World, store: CheckpointStore, state: Callable[[], Arrays], config: Config, on_saved: OnSaved
    ) -> "AsyncSaver":
        """Return a saver on rank 0, and a null object on other ranks."""
        return cls(store, state, config, world.device.type == "cpu", on_saved) if world.is_main else null(AsyncSaver)

    def overdue(self) -> bool:
        """Whether the last save is older than `--checkpoint-every-s`, by default than `affordable_s`."""
        every_s = self.config.checkpoint_every_s
        if every_s is None:
            every_s = self.affordable_s()
        return every_s > 0 and time.monotonic() - self.saved_at >= every_s

    def affordable_s(self) -> float:
        """Return the shortest interval between saves whose overhead is at most `OVERHEAD`, from 5 to 60 seconds.

        A save costs the training time that it takes: the copy, the wait for the previous save, and on a CPU the compute
        time of the writing thread. While a checkpoint is being written its cost is unknown, and the result is 60.

        Young (1974) and Daly (2006) minimise the total cost of saves and failures; to first order the optimal interval
        is sqrt(2 * cost * MTBF). The mean time between failures (MTBF) is not known here, so the overhead is bounded
        instead. cost / OVERHEAD is the optimum for an MTBF of cost / (2 * OVERHEAD**2): half an hour for a save that
        costs 0.1 s. With rarer failures this saves more often than the optimum, at a cost of half a percent at most;
        with more frequent ones, less often.
        """
        if self.writing and not self.writing.done():
            return LONGEST_S
        cost_s = self.stalled_s + (self.writing_s if self.shares_cores else 0.0)
        return min(max(SHORTEST_S, cost_s / OVERHEAD), LONGEST_S)

    def save(self, info: CheckpointInfo) -> None:
        """Begin to write a checkpoint of the current state, with its description.

        Raises:
            UserError: the previous checkpoint could not be written, and `--save-errors` is not "warn".
        """
        began = time.monotonic()
        self.finish(warn_only=self.config.save_errors == "warn")
        self.writing = self.thread.submit(self._write_timed, self.state(), info)
        self.saved_at = time.monotonic()
        self.stalled_s = self.saved_at - began

    def finish(self, warn_only: bool = False) -> None:
        """Wait until the checkpoint being written is on the disk.

        Raises:
            UserError: it could not be written, unless `warn_only`.
        """
        writing, self.writing = self.writing, None
        try:
            if writing:
                writing.result()
        except OSError as error:
            text = f"{self.run_dir}: a checkpoint could not be written ({error.strerror}); earlier checkpoints are kept"
            if not warn_only:
                raise UserError(f"{text}. Free disk space, and the same command resumes from the last one.") from None
            warn(f"{text}, and training continues WITHOUT A NEW ONE: free disk space")

    def close(self) -> None:
        """Shut the thread down once it has finished writing."""
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
                f"{self.run_dir}: not enough disk space for two checkpoints: {needed / 1e6:.0f} MB needed, "
                f"{free / 1e6:.0f} MB free; free disk space, or give another --run-dir"
            )
