"""What is measured while training: loss, accuracy and speed between log lines."""

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dist_mnist.data.order import GlobalOrder
from dist_mnist.distributed import World, gather_json, gather_rows, sum_over_ranks
from dist_mnist.step import Trainer

SLOW = 1.5  # times the median rank's own time per step
NOTICEABLE_S = 1.0  # of own time, below which nobody is called slow


class Meter:
    """Reads a trainer's totals now and then. Time in pauses (validation, saving) does not count as training.

    `totals` are those that `reduced` gave when a run stopped between two readings; they count on rank 0.
    """

    def __init__(self, trainer: Trainer, order: GlobalOrder, world: World, totals: list[float] | None = None):
        self.trainer, self.order, self.world = trainer, order, world
        self.seconds, self.running_since = 0.0, time.perf_counter()
        self.images_before = totals[2] if totals else 0.0
        self.hosts = gather_json(world, socket.gethostname())
        if totals and world.is_main:
            trainer.totals += torch.tensor(totals, dtype=torch.float64, device=world.device)

    def reduced(self) -> list[float]:
        """Loss, right answers and images since the last reading, summed over all ranks. Collective."""
        return sum_over_ranks(self.trainer.totals, self.world).tolist()

    def read(self, steps_done: int) -> dict[str, Any]:
        """Means over the steps since the last reading, over all ranks; then begins anew. Collective."""
        loss, correct, images = self.reduced()
        slow_rank = self._slow_rank()
        seconds, before = self.seconds, self.images_before
        self.trainer.totals.zero_()
        self.trainer.waiting.seconds = self.seconds = self.images_before = 0.0
        return {
            "step": steps_done,
            "epoch": steps_done / self.order.steps_per_epoch,
            "loss": loss / images,
            "accuracy": correct / images,
            "learning_rate": float(self.trainer.controls.lr),
            "gradient_norm": float(self.trainer.gradient_norm),
            "skipped_steps": self.trainer.skipped_steps,
            "images_per_s": (images - before) / seconds,
            "slow_rank": slow_rank,
        }

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock for the time of a `with` block."""
        self.trainer.wait()
        self.seconds += time.perf_counter() - self.running_since
        yield
        self.running_since = time.perf_counter()

    def _slow_rank(self) -> str | None:
        """Which rank the others have been waiting for, in words; only on CPUs, where waiting can be told from work."""
        if self.world.size == 1 or self.world.device.type != "cpu":
            return None
        own = gather_rows(torch.tensor([self.seconds - self.trainer.waiting.seconds]))[:, 0].tolist()
        median = max(sorted(own)[(len(own) - 1) // 2], 1e-9)
        slowest = own.index(max(own))
        if own[slowest] < max(SLOW * median, NOTICEABLE_S):
            return None
        times = own[slowest] / median
        return f"rank {slowest} on {self.hosts[slowest]} takes {times:.1f} times as long as the median rank"
