"""What is measured while training: loss, accuracy, speed, waiting and memory between log lines."""

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
NOTICEABLE_S = 1.0  # of own time, below which no rank is called a straggler
MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024  # the unit of getrusage
T = TypeVar("T")


class RankUsage(NamedTuple):
    """What one rank has used since the last reading."""

    seconds: float  # of training
    fetching_s: float  # of them, waiting for data
    communicating_s: float  # of them, in collectives; on CPUs, where that can be told from work
    memory: float  # bytes of the host that the process has taken at most
    device_memory: float  # bytes of the GPU


class Meter:
    """Adds up what each step gives, and is read now and then. Time in pauses (validation, saving) is not training time.

    Args:
        step: the steps done before.
        sums: those that `reduced` gave when a run stopped between two readings; they count on rank 0.
        timer: counts this rank's seconds in collectives.
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
        self.stragglers: set[int] = set()  # ranks that were named
        if sums and world.is_main:
            numbers = [math.nan if total is None else total for total in sums]  # of a step that was skipped
            self.sums += torch.tensor(numbers, dtype=torch.float64, device=world.device)

    def add(self, values: torch.Tensor) -> None:
        """Enter what a step gave (see `Trainer.step`), (4,) float64. Collective; as good as no synchronisation."""
        self.sums += values[:3]
        self.spikes.add(values)

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
        """Loss, right predictions and images since the last reading, summed over all ranks. Collective."""
        return sum_over_ranks(self.sums, self.world).tolist()

    def elapsed_s(self) -> float:
        """Seconds since this meter was made, pauses included."""
        return time.perf_counter() - self.began

    def read(self, steps_done: int, last_step: StepStatistics) -> MetricsRecord:
        """Means over the steps since the last reading, over all ranks; then begins anew. Collective."""
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
        """Stop the clock for the time of a `with` block, once the device has done what it was given."""
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
        """Of GPUs, their memory; of several ranks on CPUs, each one's own time, without waiting for the others."""
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
        """Name the rank that the others have been waiting for, once."""
        median = max(statistics.median_low(own), 1e-9)
        times, slowest = max(own) / median, own.index(max(own))
        if slowest in self.stragglers or times < STRAGGLER or own[slowest] < NOTICEABLE_S:
            return
        self.stragglers.add(slowest)
        if self.world.is_main:
            warn(
                f"rank {slowest} on {self.hosts[slowest]} takes {times:.1f} times as long as the median rank, "
                f"by step {step}: all ranks wait for this straggler"
            )
