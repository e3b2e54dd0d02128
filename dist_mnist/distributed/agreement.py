"""Agreement: what one rank knows and all have to act on at the same step: a stop request, a save that is due, an end of
time, a bit that is wrong.
"""

import signal
import time
from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist

from dist_mnist.distributed.states.compare import RankStates, State
from dist_mnist.distributed.world import World

EXCHANGE_EVERY_S = 0.1  # hosts should not meet at each of a GPU's short steps, nor two ranks of a small CPU


class StopRequest(Protocol):
    """Whether this process was asked to stop, and by which signal."""

    signal: str | None


class TimeLimit(Protocol):
    """Whether the run's time is over: by this rank's clock, and (`time_is_up`) as all ranks have agreed."""

    time_is_up: bool

    def out_of_time(self) -> bool: ...


class Agreement:
    """Lets all ranks know, at the same step or batch of a validation, what one of them knows.

    They exchange what they know every so many calls, some `EXCHANGE_EVERY_S` seconds apart by the slowest rank's clock;
    the answer is taken with the next exchange, so that no rank waits for it. On GPUs a group of its own, over the CPU,
    is used. Collective, if ranks compute on GPUs.

    Args:
        stop: this rank's stop request; where another one got it, its signal becomes this one's.
        overdue: whether it is time to save, as far as this rank can know.
        limit: this rank's time limit; once one rank is out of time, all learn so from theirs.
        state, check_every, comparable: as of `RankStates`.
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
        self.every = self.calls_left = 1  # the same on all ranks, as all make the same calls and get the same answers
        self.asked_at = time.monotonic()
        self.pending: tuple[torch.Tensor, torch.futures.Future] | None = None

    def after_step(self, steps_done: int) -> bool:
        """Whether to stop now, as `to_stop`, which see; from now on `to_save` and the time limit tell whether to save
        or to end. Collective.

        Raises:
            StatesDiffer: alike on all ranks, if their states do.
        """
        self.steps_done = steps_done
        self.states.after_step(steps_done)
        stopping = self.to_stop()
        if self.differ:
            self.states.name_difference(steps_done)
        return stopping

    def to_stop(self) -> bool:
        """Whether to stop now, the same on all ranks. Collective; to be called after each batch of a validation."""
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
        """All ranks are about to save, which needs them to hold the same state. Collective.

        Raises:
            StatesDiffer: alike on all ranks, if they do not.
        """
        self.to_save = False
        self.states.check(steps_done)

    def close(self) -> None:
        """Take the last answer, so that nothing is under way when the group ends. Collective."""
        self._answer()

    def _answer(self) -> bool:
        """Whether a rank had got a signal when it was asked; the one of the largest number is everybody's then."""
        if self.pending is None:
            return False
        (facts, work), self.pending = self.pending, None
        work.wait()
        number, microseconds, to_save, out_of_time, *digests = facts.tolist()
        # No more than doubled: a GPU's first steps take no time, as they are only put in its queue.
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
