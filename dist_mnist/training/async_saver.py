"""Saving beside training: the weights are copied between two steps, and written while training goes on."""

import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from dist_mnist.config.settings import Config
from dist_mnist.distributed.world import World
from dist_mnist.run.checkpoints.file import Arrays
from dist_mnist.run.checkpoints.store import CheckpointStore
from dist_mnist.run.records import CheckpointInfo
from dist_mnist.utils.errors import UserError, warn
from dist_mnist.utils.null import null


class AsyncSaver:
    """Rank 0's: copies the state, and leaves the writing to a thread.

    Of a checkpoint that cannot be written nothing is left, and those before it are untouched; training goes on with a
    warning, or ends, as `--save-errors` says.

    Args:
        store: where checkpoints are written and pruned.
        state: gives a copy of all that a checkpoint holds.

    Raises:
        UserError: on construction, if the disk has no room for two checkpoints.
    """

    def __init__(self, store: CheckpointStore, state: Callable[[], Arrays], config: Config):
        self.store, self.state, self.config = store, state, config
        self.run_dir = store.folder.parent
        self.saved_at = time.monotonic()
        self.writing: Future[None] | None = None
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="save")
        self._check_room()

    @classmethod
    def on_main(cls, world: World, store: CheckpointStore, state: Callable[[], Arrays], config: Config) -> "AsyncSaver":
        """A saver on rank 0, and on other ranks one that does nothing."""
        return cls(store, state, config) if world.is_main else null(AsyncSaver)

    def overdue(self) -> bool:
        """Whether the last save is longer ago than `--checkpoint-every-s`."""
        every_s = self.config.checkpoint_every_s
        return bool(every_s) and time.monotonic() - self.saved_at >= every_s

    def save(self, info: CheckpointInfo) -> None:
        """Begin to write a checkpoint of the state as it is now, with its description.

        Raises:
            UserError: the one before could not be written, and the run is not to go on then.
        """
        self.finish(warn_only=self.config.save_errors == "warn")
        self.writing = self.thread.submit(self._write, self.state(), info)
        self.saved_at = time.monotonic()

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

    def _write(self, arrays: Arrays, info: CheckpointInfo) -> None:
        self.store.check_owner()
        self.store.save(arrays, info)
        self.store.prune(self.config.keep)

    def _check_room(self) -> None:
        needed = 2 * sum(np.asarray(array).nbytes for array in self.state().values())
        free = shutil.disk_usage(self.run_dir).free
        if free < needed:
            raise UserError(
                f"{self.run_dir}: there is no room for checkpoints: {free / 1e6:.0f} MB are free, two take "
                f"{needed / 1e6:.0f} MB; make room, or give another --run-dir"
            )
