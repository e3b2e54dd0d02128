"""Computes steps that are spikes again, to see whether the result is reproducible."""

import socket
from collections.abc import Callable, Sequence

import numpy as np
import torch

from dist_mnist.distributed.collectives import gather_json, sum_over_ranks
from dist_mnist.distributed.states.digest import state_digest
from dist_mnist.distributed.world import World
from dist_mnist.training.spikes.watch import TOLD, RecentSteps
from dist_mnist.utils.errors import warn


class SpikeAudit:
    """Keep a copy of the state before each step, and compute a step that is a spike again from it, at once.

    If that gives other bits, one of the two was wrong, and the second counts.

    Args:
        state: returns all tensors that a step changes.
        values: the tensor with a step's values (see `Trainer.step`).
    """

    def __init__(self, world: World, state: Callable[[], Sequence[torch.Tensor]], values: torch.Tensor):
        self.world, self.state, self.values = world, state, values
        self.recent = RecentSteps()
        self.told = 0

    def step(self, take: Callable[[], None], step: int, global_batch_size: int) -> None:
        """Run step `step`, again if it is a spike; all ranks decide alike. Collective."""
        before = [tensor.clone() for tensor in self.state()]
        take()
        loss = float(sum_over_ranks(self.values[:1], self.world)) / global_batch_size
        values = loss, float(self.values[3])
        if not len(self.recent.spikes(np.array([values]))):
            return
        first = self._bits()
        for tensor, value in zip(self.state(), before, strict=True):
            tensor.copy_(value)
        take()
        self._tell(f"step {step}, a spike ({self.recent.describe(*values)}), was computed again", first, self._bits())

    def _bits(self) -> tuple[int, list[float]]:
        """Return a digest of the state, and this rank's own values."""
        return int(state_digest(self.state())), self.values.tolist()

    def _tell(self, what: str, first: tuple[int, list[float]], again: tuple[int, list[float]]) -> None:
        """Warn of the spike, and say whether all ranks computed the same bits again. Collective."""
        ranks = gather_json(self.world, [socket.gethostname(), first[0] != again[0], first[1] != again[1]])
        self.told += 1
        if not self.world.is_main or self.told > TOLD:
            return
        if not any(state for _, state, _ in ranks):
            warn(f"{what}, with the same bits: the cause is its samples, the learning rate or the weights before it")
            return
        # An error of one rank is in the gradient sum of all, but the loss is the rank's own.
        suspects = [rank for rank, (_, _, own) in enumerate(ranks) if own] or [
            rank for rank, (_, state, _) in enumerate(ranks) if state
        ]
        named = ", ".join(f"rank {rank} on {ranks[rank][0]}" for rank in suspects)
        warn(f"{what}, with OTHER BITS on {named}: a processor, GPU or memory made an error; the second result counts")
