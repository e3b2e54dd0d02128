"""Steps that are spikes, taken again: whether what they computed can be computed again."""

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
    """Takes steps from a copy of the state before each, and one that is a spike again, at once.

    Where that gives other bits, one of the two was wrong, and the second counts.

    Args:
        state: gives all tensors that a step changes.
        values: where a step leaves what it was like (see `Trainer.step`).
    """

    def __init__(self, world: World, state: Callable[[], Sequence[torch.Tensor]], values: torch.Tensor):
        self.world, self.state, self.values = world, state, values
        self.recent = RecentSteps()
        self.told = 0

    def step(self, take: Callable[[], None], step: int, global_batch_size: int) -> None:
        """Take step `step`; all ranks decide alike. Collective."""
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
        self._tell(f"step {step}, a spike ({self.recent.describe(*values)}), was taken again", first, self._bits())

    def _bits(self) -> tuple[int, list[float]]:
        """A digest of the state, and this rank's own values."""
        return int(state_digest(self.state())), self.values.tolist()

    def _tell(self, what: str, first: tuple[int, list[float]], again: tuple[int, list[float]]) -> None:
        """Say whether all ranks came to the same bits. Collective."""
        ranks = gather_json(self.world, [socket.gethostname(), first[0] != again[0], first[1] != again[1]])
        self.told += 1
        if not self.world.is_main or self.told > TOLD:
            return
        if not any(state for _, state, _ in ranks):
            warn(f"{what}, with the same bits: its samples, the learning rate or the weights before it are the reason")
            return
        # Of what one rank computed wrong, all others have the sum; but the loss is its own.
        suspects = [rank for rank, (_, _, own) in enumerate(ranks) if own] or [
            rank for rank, (_, state, _) in enumerate(ranks) if state
        ]
        named = ", ".join(f"rank {rank} on {ranks[rank][0]}" for rank in suspects)
        warn(f"{what}, with OTHER BITS on {named}: a processor, a GPU or memory got one wrong; the second time counts")
