"""Preemption: a signal becomes a stop request, on which all ranks agree at a step boundary (graceful shutdown)."""

import ctypes
import os
import signal
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from dist_mnist.distributed.world import World

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PR_SET_PDEATHSIG = 1
EXCHANGE_EVERY_S = 0.1  # hosts should not meet at each of a GPU's short steps, nor two ranks of a small CPU


class StopSignal:
    """Whether this process got a stop request, by which signal, and since when; one object a process, made in main."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self._waits = "TORCHELASTIC_RUN_ID" in os.environ  # torchrun would take an end for a failure
        self._wakeup = -1
        self._noticed_at: float | None = None

    @classmethod
    def listening(cls) -> "StopSignal":
        """From here on SIGTERM, SIGINT and SIGUSR1 are stop requests, and so is the death of the torchrun above us."""
        stop = cls()
        stop._wakeup, write_end = os.pipe()
        os.set_blocking(stop._wakeup, False)
        os.set_blocking(write_end, False)
        for number in SIGNALS:
            signal.signal(number, stop._on_signal)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        if sys.platform == "linux" and stop._waits:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        return stop

    def wait_for_a_step(self) -> None:
        """From here on a stop request waits for the next step; before, it ends the process, with nothing to save."""
        self._waits = True

    def noticed_at(self) -> float | None:
        """When (time.monotonic) the stop request came; known also while the main thread is deep in a collective."""
        if self._noticed_at is None and self._wakeup >= 0:
            try:
                numbers = os.read(self._wakeup, 64)
            except BlockingIOError:
                numbers = b""
            if set(numbers) & set(SIGNALS):
                self._noticed_at = time.monotonic()
        return self._noticed_at

    def wait_for_own(self, seconds: float) -> None:
        """Wait until this process itself got a stop request, if only another rank did so far, but no longer than that.

        When a node joins, each torchrun asks its own ranks to stop, to start them again. One whose ranks had left
        before, because the others agreed to, would take the run for finished.
        """
        until = time.monotonic() + seconds
        while self.noticed_at() is None and time.monotonic() < until:
            time.sleep(0.02)

    def _on_signal(self, number: int, _: object) -> None:
        if not self._waits:
            raise SystemExit(128 + number)
        self.signal = self.signal or signal.Signals(number).name


class StopAgreement:
    """Lets all ranks know, at the same step or batch of a validation, that one of them got a stop request.

    They exchange what they know every so many calls, some `EXCHANGE_EVERY_S` seconds apart by the slowest rank's clock;
    the answer is taken with the next exchange, so that no rank waits for it. On GPUs a group of its own, over the CPU,
    is used.
    """

    def __init__(self, world: "World", stop: StopSignal):
        import torch.distributed as dist

        self.stop = stop
        self.alone = world.size == 1
        self.every = self.calls_left = 1  # the same on all ranks, as all make the same calls and get the same answers
        self.asked_at = time.monotonic()
        self.group = None if self.alone or world.device.type == "cpu" else dist.new_group(backend="gloo")
        self.pending: tuple[torch.Tensor, torch.futures.Future] | None = None

    def to_stop(self) -> bool:
        """Whether to stop now, the same on all ranks. Collective; to be called after each step or batch."""
        if self.alone:
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

    def close(self) -> None:
        """Take the last answer, so that nothing is under way when the group ends. Collective."""
        self._answer()

    def _answer(self) -> bool:
        """Whether a rank had got a signal when it was asked; the one of the largest number is everybody's then."""
        if self.pending is None:
            return False
        (facts, work), self.pending = self.pending, None
        work.wait()
        number, microseconds = facts.tolist()
        # No more than doubled: a GPU's first steps take no time, as they are only put in its queue.
        self.every = min(max(1, round(EXCHANGE_EVERY_S * 1e6 / max(1, microseconds))), 2 * self.every)
        if number:
            self.stop.signal = signal.Signals(number).name
        return bool(number)

    def _ask(self, seconds_a_call: float) -> None:
        import torch
        import torch.distributed as dist

        number = signal.Signals[self.stop.signal] if self.stop.signal else 0
        facts = torch.tensor([number, int(seconds_a_call * 1e6)])
        self.pending = facts, dist.all_reduce(facts, dist.ReduceOp.MAX, self.group, async_op=True)
