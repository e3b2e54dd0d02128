"""Agreement between ranks on events that all must act on at the same step: a stop request, a due save, the time limit,
or states that differ.
"""

import signal
import time
from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist

from dist_mnist.distributed.states.compare import RankStates, State
from dist_mnist.distributed.world import World

EXCHANGE_EVERY_S = 0.1  # an exchange at every step would slow down short GPU steps and small CPUs


class StopRequest(Protocol):
    """The signal by which this process was asked to stop, if any."""

    signal: str | None


class TimeLimit(Protocol):
    """The run's time limit: `out_of_time` is by this rank's clock, `time_is_up` is what all ranks have agreed on."""

    time_is_up: bool

    def out_of_time(self) -> bool: ...


class Agreement:
    """Tell all ranks, at the same step or validation batch, what one of them knows.

    Ranks all-reduce their facts every n calls, about `EXCHANGE_EVERY_S` seconds apart by the slowest rank's clock. Each
    result is read at the next exchange, so that no rank waits for it. With GPUs a separate gloo group is used.
    Construction is collective if ranks compute on GPUs.

    Args:
        stop: this rank's stop request; it receives the signal that another rank got.
        overdue: whether this rank thinks that a save is due.
        limit: this rank's time limit; `time_is_up` is set on all ranks once one is out of time.
        state, check_every, comparable: see `RankStates`.
    """

    def __init__(
        self,
        world: World,
        stop: StopRequest,
        overdue: Callable[[], bool],
        limit: TimeLimit,
        state: State,
        check_every: int = 0,
        comparable: bool = True,
    ):
        self.stop, self.overdue, self.limit = stop, overdue, limit
        self.alone = world.size == 1
        self.group = None if self.alone or world.device.type == "cpu" else dist.new_group(backend="gloo")
        self.states = RankStates(world, state, check_every, comparable, self.group)
        self.to_save = self.differ = False
        self.steps_done = 0
        self.every = self.calls_left = 1  # the same on all ranks: all make the same calls and get the same results
        self.asked_at = time.monotonic()
        self.pending: tuple[torch.Tensor, torch.futures.Future] | None = None

    def after_step(self, steps_done: int) -> bool:
        """Return whether to stop now, as `to_stop` does, and update `to_save` and the time limit. Collective.

        Raises:
            StatesDiffer: on all ranks, if their states differ.
        """
        self.steps_done = steps_done
        self.states.after_step(steps_done)
        stopping = self.to_stop()
        if self.differ:
            self.states.name_difference(steps_done)
        return stopping

    def to_stop(self) -> bool:
        """Return whether to stop now, the same on all ranks. Collective; call it after each validation batch."""
        if self.alone:
            self.to_save, self.limit.time_is_up = self.overdue(), self.limit.time_is_up or self.limit.out_of_time()
            return self.stop.signal is not None
        self.calls_left -= 1
        if self.calls_left:
            return False
        now = time.monotonic()
        seconds_a_call, self.asked_at = (now - self.asked_at) / self.every, now
        stopping = self._answer()
        self._ask(seconds_a_call)
        self.calls_left = self.every
        return stopping

    def before_save(self, steps_done: int) -> None:
        """Check that all ranks hold the same state, before a save. Collective.

        Raises:
            StatesDiffer: on all ranks, if they do not.
        """
        self.to_save = False
        self.states.check(steps_done)

    def close(self) -> None:
        """Wait for the last exchange, so that no collective is pending when the group is destroyed. Collective."""
        self._answer()

    def _answer(self) -> bool:
        """Return whether a rank had received a signal at the last exchange; all adopt the one of the highest number."""
        if self.pending is None:
            return False
        (facts, work), self.pending = self.pending, None
        work.wait()
        number, microseconds, to_save, out_of_time, *digests = facts.tolist()
        # At most doubled: a GPU's first steps seem to take no time, as they are only queued.
        self.every = min(max(1, round(EXCHANGE_EVERY_S * 1e6 / max(1, microseconds))), 2 * self.every)
        if number:
            self.stop.signal = signal.Signals(number).name
        self.to_save = self.to_save or bool(to_save)
        self.limit.time_is_up = self.limit.time_is_up or bool(out_of_time)
        self.differ = self.differ or self.states.differ(*digests)
        return bool(number)

    def _ask(self, seconds_a_call: float) -> None:
        number = signal.Signals[self.stop.signal] if self.stop.signal else 0
        overdue = not self.to_save and self.overdue()
        out_of_time = self.limit.out_of_time()
        facts = torch.tensor([number, int(seconds_a_call * 1e6), bool(overdue), out_of_time, *self.states.facts()])
        self.pending = facts, dist.all_reduce(facts, dist.ReduceOp.MAX, self.group, async_op=True)
