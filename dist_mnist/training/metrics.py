"""What is measured while training: loss, accuracy, speed, waiting and memory between log lines."""

import math
import resource
import socket
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch

from dist_mnist.data.sampler import GlobalOrder
from dist_mnist.distributed.collectives import gather_json, gather_rows, sum_over_ranks
from dist_mnist.distributed.world import World
from dist_mnist.training.trainer import Trainer

SLOW = 1.5  # times the median rank's own time per step
NOTICEABLE_S = 1.0  # of own time, below which nobody is called slow
MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024  # the unit of getrusage
T = TypeVar("T")


class Share(NamedTuple):
    """What one rank has done since the last reading."""

    seconds: float  # of training
    fetching: float  # of them, waiting for data
    communicating: float  # of them, in collectives; on CPUs, where that can be told from work
    memory: float  # bytes of the host that the process has taken at most
    device_memory: float  # bytes of the GPU


class Meter:
    """Reads a trainer's totals now and then. Time in pauses (validation, saving) does not count as training.

    `totals` are those that `reduced` gave when a run stopped between two readings; they count on rank 0.
    """

    def __init__(
        self,
        trainer: Trainer,
        order: GlobalOrder,
        world: World,
        step: int = 0,
        totals: list[float | None] | None = None,
    ):
        self.trainer, self.order, self.world, self.step = trainer, order, world, step
        self.seconds, self.running_since, self.fetching_s = 0.0, time.perf_counter(), 0.0
        self.images_before = (totals and totals[2]) or 0.0
        self.hosts = gather_json(world, socket.gethostname())
        if totals and world.is_main:
            numbers = [math.nan if total is None else total for total in totals]  # of a step that was skipped
            trainer.totals += torch.tensor(numbers, dtype=torch.float64, device=world.device)

    def timing(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches; the time until each is there counts as waiting for data."""
        waiting = iter(batches)
        while True:
            began = time.perf_counter()
            try:
                batch = next(waiting)
            except StopIteration:
                return
            finally:
                self.fetching_s += time.perf_counter() - began
            yield batch

    def reduced(self) -> list[float]:
        """Loss, right answers and images since the last reading, summed over all ranks. Collective."""
        return sum_over_ranks(self.trainer.totals, self.world).tolist()

    def read(self, steps_done: int) -> dict[str, Any]:
        """Means over the steps since the last reading, over all ranks; then begins anew. Collective."""
        loss, correct, images = self.reduced()
        ranks = self._shares()
        steps, seconds, before = steps_done - self.step, self.seconds, self.images_before
        self.trainer.totals.zero_()
        self.trainer.waiting.seconds = self.seconds = self.fetching_s = self.images_before = 0.0
        self.step = steps_done
        return {
            "step": steps_done,
            "epoch": steps_done / self.order.steps_per_epoch,
            "loss": loss / images,
            "accuracy": correct / images,
            "learning_rate": float(self.trainer.controls.lr),
            "gradient_norm": float(self.trainer.gradient_norm),
            "skipped_steps": self.trainer.skipped_steps,
            "images_per_s": (images - before) / seconds,
            "waiting_for_data": sum(rank.fetching for rank in ranks) / sum(rank.seconds for rank in ranks),
            "memory_gb": max(rank.memory for rank in ranks) / 1e9,
            **self._by_device(ranks, steps),
        }

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock for the time of a `with` block."""
        self.trainer.wait()
        self.seconds += time.perf_counter() - self.running_since
        yield
        self.running_since = time.perf_counter()

    def _shares(self) -> list[Share]:
        device = self.world.device
        mine = Share(
            self.seconds,
            self.fetching_s,
            self.trainer.waiting.seconds,
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_BYTES,
            torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
        )
        if self.world.size == 1:
            return [mine]
        rows = gather_rows(torch.tensor(mine, dtype=torch.float64, device=device))
        return [Share(*row) for row in rows.tolist()]

    def _by_device(self, ranks: list[Share], steps: int) -> dict[str, Any]:
        """Of GPUs, their memory; of several ranks on CPUs, each one's own time, without waiting for the others."""
        if self.world.device.type == "cuda":
            return {"device_memory_gb": max(rank.device_memory for rank in ranks) / 1e9, "slow_rank": None}
        if self.world.size == 1:
            return {"slow_rank": None}
        own = [rank.seconds - rank.communicating for rank in ranks]
        times = {"slowest": max(own), "median": statistics.median_low(own), "fastest": min(own)}
        return {
            "communicating": sum(rank.communicating for rank in ranks) / sum(rank.seconds for rank in ranks),
            **{f"{which}_rank_ms_per_step": 1e3 * seconds / steps for which, seconds in times.items()},
            "slow_rank": self._slow_rank(own),
        }

    def _slow_rank(self, own: list[float]) -> str | None:
        """Which rank the others have been waiting for, in words."""
        median = max(statistics.median_low(own), 1e-9)
        slowest = own.index(max(own))
        if own[slowest] < max(SLOW * median, NOTICEABLE_S):
            return None
        times = own[slowest] / median
        return f"rank {slowest} on {self.hosts[slowest]} takes {times:.1f} times as long as the median rank"
