"""Saving beside training: the weights are copied between two steps, and written while training goes on."""

import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from dist_mnist.evaluation.evaluate import Evaluation
from dist_mnist.run.checkpoint import Arrays, save_checkpoint
from dist_mnist.run.plan import Plan
from dist_mnist.training.trainer import Trainer
from dist_mnist.utils.errors import UserError, warn
from dist_mnist.utils.versions import versions


class Saver:
    """Rank 0's: decides when to save, by steps or by the clock; copies, and leaves the writing to a thread.

    Of a checkpoint that cannot be written nothing is left, and those before it are untouched; training goes on with a
    warning, or ends, as `--save-errors` says.

    Raises:
        UserError: on construction, if the disk has no room for two checkpoints.
    """

    def __init__(self, plan: Plan, trainer: Trainer):
        self.plan, self.trainer = plan, trainer
        self.saved_at = time.monotonic()
        self.writing: Future[None] | None = None
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="save")
        self._check_room()

    def save_if_due(
        self, steps_done: int, sums: Mapping[str, list], validation: Evaluation | None, now: bool = False
    ) -> None:
        """Begin to write a checkpoint after `steps_done` steps if one is wanted, or whatever the calendar says `now`.

        `sums` are the running ones of ledger and meter, which go on where they were.

        Raises:
            UserError: the one before could not be written, and the run is not to go on then.
        """
        every_s = self.plan.config.checkpoint_every_s
        overdue = every_s and time.monotonic() - self.saved_at >= every_s
        if not (now or overdue or self.plan.wants_checkpoint(steps_done)):
            return
        self.finish(warn_only=self.plan.config.save_errors == "warn")
        info = self.plan.identity() | {
            "step": steps_done,
            "epoch": steps_done / self.plan.order.steps_per_epoch,
            "validation": validation and {"accuracy": validation.accuracy, "loss": validation.loss},
            "versions": versions(),
            **sums,
        }
        self.writing = self.thread.submit(self._write, self.trainer.state(), info)
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
            text = (
                f"{self.plan.run.path}: a checkpoint could not be written ({error.strerror}); those before it are kept"
            )
            if not warn_only:
                raise UserError(f"{text}. Make room, and the same command goes on from the last of them.") from None
            warn(f"{text}, and training goes on WITHOUT A NEW ONE: make room")

    def close(self) -> None:
        """End the thread, after what it is writing."""
        self.thread.shutdown()

    def _write(self, arrays: Arrays, info: dict[str, Any]) -> None:
        self.plan.run.ownership.check()
        save_checkpoint(self.plan.run.checkpoints.path(info["step"]), arrays, info)
        self.plan.run.checkpoints.prune(self.plan.config.keep)

    def _check_room(self) -> None:
        needed = 2 * sum(np.asarray(array).nbytes for array in self.trainer.state().values())
        free = shutil.disk_usage(self.plan.run.checkpoints.folder).free
        if free < needed:
            raise UserError(
                f"{self.plan.run.path}: there is no room for checkpoints: {free / 1e6:.0f} MB are free, two take "
                f"{needed / 1e6:.0f} MB; make room, or give another --run-dir"
            )
