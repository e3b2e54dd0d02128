"""Training metrics per log interval: loss, accuracy, speed, time spent waiting, and memory."""

import math
import resource
import socket
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch

from dist_mnist.data.sampler import GlobalOrder
from dist_mnist.distributed.collectives import CollectiveTimer, gather_json, gather_rows, sum_over_ranks
from dist_mnist.distributed.world import World
from dist_mnist.run.records import MetricsRecord
from dist_mnist.training.spikes.watch import SpikeWatch
from dist_mnist.training.trainer import StepStatistics
from dist_mnist.utils.errors import warn

STRAGGLER = 1.5  # times the median rank's own time per step
NOTICEABLE_S = 1.0  # of own time; below it no rank is called a straggler
MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024  # the unit of getrusage
T = TypeVar("T")


class RankUsage(NamedTuple):
    """The time and memory that one rank has used since the last reading."""

    seconds: float  # training time
    fetching_s: float  # part of it spent waiting for data
    communicating_s: float  # part of it spent in collectives; measured on CPUs only
    memory: float  # peak resident bytes of the process
    device_memory: float  # peak bytes on the GPU


class Meter:
    """Sums of the steps' results, read once per log interval. Pauses (validation, saving) do not count as training.

    Args:
        step: number of steps done before.
        sums: the result of `reduced` when a run stopped between two readings; used on rank 0.
        timer: measures this rank's seconds in collectives.
    """

    def __init__(
        self,
        order: GlobalOrder,
        world: World,
        timer: CollectiveTimer,
        step: int = 0,
        sums: Sequence[float | None] | None = None,
    ):
        self.order, self.world, self.timer, self.step = order, world, timer, step
        self.sums = torch.zeros(3, dtype=torch.float64, device=world.device)
        self.spikes = SpikeWatch(order, world, step)
        self.began = self.running_since = time.perf_counter()
        self.seconds = self.fetching_s = 0.0
        self.communicated_s = timer.seconds
        self.images_before = (sums and sums[2]) or 0.0
        self.hosts = gather_json(world, socket.gethostname())
        self.stragglers: set[int] = set()  # ranks that a warning has named
        if sums and world.is_main:
            numbers = [math.nan if total is None else total for total in sums]  # None: NaN of a skipped step
            self.sums += torch.tensor(numbers, dtype=torch.float64, device=world.device)

    def add(self, values: torch.Tensor) -> None:
        """Add a step's values (see `Trainer.step`), (4,) float64. Collective; hardly ever synchronises."""
        self.sums += values[:3]
        self.spikes.add(values)

    def timing(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the same batches, and count the time until each is available as waiting for data."""
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
        """Return summed loss, correct predictions and images since the last reading, over all ranks. Collective."""
        return sum_over_ranks(self.sums, self.world).tolist()

    def elapsed_s(self) -> float:
        """Return the seconds since construction, pauses included."""
        return time.perf_counter() - self.began

    def read(self, steps_done: int, last_step: StepStatistics) -> MetricsRecord:
        """Return means over all ranks and all steps since the last reading, and reset the sums. Collective."""
        loss, correct, images = self.reduced()
        ranks = self._usage_of_ranks()
        seconds = sum(rank.seconds for rank in ranks)
        record = MetricsRecord(
            kind="train",
            step=steps_done,
            epoch=steps_done / self.order.steps_per_epoch,
            loss=loss / images,
            accuracy=correct / images,
            **last_step._asdict(),
            spikes=self.spikes.look(),
            images_per_s=(images - self.images_before) / self.seconds,
            waiting_for_data=sum(rank.fetching_s for rank in ranks) / seconds,
            memory_gb=max(rank.memory for rank in ranks) / 1e9,
            **self._by_device(ranks, steps_done),
            elapsed_s=self.elapsed_s(),
            unix_time_s=time.time(),
        )
        self.sums.zero_()
        self.seconds = self.fetching_s = self.images_before = 0.0
        self.communicated_s, self.step = self.timer.seconds, steps_done
        return record

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock for a `with` block, after the device has finished its queue."""
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        self.seconds += time.perf_counter() - self.running_since
        yield
        self.running_since = time.perf_counter()

    def _usage_of_ranks(self) -> list[RankUsage]:
        device = self.world.device
        mine = RankUsage(
            self.seconds,
            self.fetching_s,
            self.timer.seconds - self.communicated_s,
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_BYTES,
            torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
        )
        if self.world.size == 1:
            return [mine]
        rows = gather_rows(torch.tensor(mine, dtype=torch.float64, device=device))
        return [RankUsage(*row) for row in rows.tolist()]

    def _by_device(self, ranks: list[RankUsage], steps_done: int) -> dict:
        """Return device memory for GPUs; for several ranks on CPUs, their own times, without waiting for others."""
        if self.world.device.type == "cuda":
            return {"device_memory_gb": max(rank.device_memory for rank in ranks) / 1e9}
        if self.world.size == 1:
            return {}
        own = [rank.seconds - rank.communicating_s for rank in ranks]
        self._warn_of_straggler(own, steps_done)
        steps = steps_done - self.step
        times = {"slowest": max(own), "median": statistics.median_low(own), "fastest": min(own)}
        return {
            "communicating": sum(rank.communicating_s for rank in ranks) / sum(rank.seconds for rank in ranks),
            **{f"{which}_rank_ms_per_step": 1e3 * seconds / steps for which, seconds in times.items()},
        }

    def _warn_of_straggler(self, own: list[float], step: int) -> None:
        """Warn of a straggler, a rank that the others wait for, once."""
        median = max(statistics.median_low(own), 1e-9)
        times, slowest = max(own) / median, own.index(max(own))
        if slowest in self.stragglers or times < STRAGGLER or own[slowest] < NOTICEABLE_S:
            return
        self.stragglers.add(slowest)
        if self.world.is_main:
            warn(
                f"rank {slowest} on {self.hosts[slowest]} is a straggler: by step {step} it takes {times:.1f} times as "
                "long as the median rank, and all ranks wait for it"
            )
