"""Proof that an epoch used every sample exactly once, at the cost of four sums per step."""

from collections.abc import Sequence

import torch

from dist_mnist.data.sampler import GlobalOrder
from dist_mnist.distributed.collectives import sum_over_ranks
from dist_mnist.distributed.world import World


class CoverageError(RuntimeError):
    """An epoch did not use every sample exactly once."""


class Coverage:
    """Sums of the 0th to 3rd powers of the sample ids used, modulo 2^64, checked against their closed forms.

    The sums change if one id of 0 ... n-1 is missing, repeated or replaced.
    """

    def __init__(self, order: GlobalOrder, world: World, sums: Sequence[int] | None = None):
        """`sums`: the result of `reduced` when a run stopped within an epoch; used on rank 0 only."""
        self.order, self.world = order, world
        self.sums = torch.tensor(sums if sums and world.is_main else [0] * 4, device=world.device)

    def add(self, ids: torch.Tensor) -> None:
        """Add this rank's sample ids, (B,) int64, without synchronisation."""
        self.sums += _sums(ids)

    def reduced(self) -> list[int]:
        """Return the sums over all ranks since the start of the epoch. Collective."""
        return sum_over_ranks(self.sums, self.world).tolist()

    def close(self, epoch: int, what: str = "") -> None:
        """Verify a finished epoch and reset the sums for the next one. Collective.

        Raises:
            CoverageError: on every rank, if a sample was skipped or used twice.
        """
        found = self.reduced()
        expected = (_power_sums(self.order.num_samples) - _sums(torch.from_numpy(self.order.dropped(epoch)))).tolist()
        if found != expected:
            raise CoverageError(
                f"{what or f'epoch {epoch}'} did not use each of its {expected[0]} samples exactly once: {found[0]} "
                f"were used, and the sums of powers of their ids are {found[1:]}, expected {expected[1:]}; do not "
                "trust these results"
            )
        self.sums.zero_()


def _sums(ids: torch.Tensor) -> torch.Tensor:
    """Return the sums of the 0th to 3rd powers of ids (B,) int64, modulo 2^64: (4,) int64."""
    return torch.stack([torch.ones_like(ids), ids, ids * ids, ids * ids * ids]).sum(1)


def _power_sums(n: int) -> torch.Tensor:
    """Return these sums over all ids below n, in closed form."""
    triangle = n * (n - 1) // 2
    sums = [n, triangle, (n - 1) * n * (2 * n - 1) // 6, triangle * triangle]
    return torch.tensor([(value + 2**63) % 2**64 - 2**63 for value in sums])
