"""Digests of a rank's tensors: 64 bits that change with any bit of them, taken at the speed of memory.

They tell an accident, not an attack: sums modulo 2^64 whose terms have odd multipliers. A bit that flips changes its
term by a power of two, which an odd number does not make a multiple of 2^64; so the sum changes. Many changes at once
go unseen by a chance of 2^-64 or so.
"""

from collections.abc import Iterable, Sequence
from functools import cache

import torch

from dist_mnist.utils.hashing import GOLDEN

ROW = 8192  # bytes that have multipliers of their own, as words or one by one; other rows are added to them before
SMALL = 1 << 18  # bytes; smaller tensors are put together first, as each operation takes some microseconds


def state_digest(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """One digest of them all, in this order: () int64 on their device; nothing is waited for."""
    memory = [_memory(tensor) for tensor in tensors]
    small = [part for part in memory if len(part) < SMALL]
    together = [torch.cat(small)] if small else []
    return fold(_digests([*together, *(part for part in memory if len(part) >= SMALL)]))


def tensor_digests(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """A digest of each, of its numbers in the order of its memory: (n,) int64 on their device, for n tensors or more
    than none.
    """
    return _digests([_memory(tensor) for tensor in tensors])


def fold(digests: torch.Tensor) -> torch.Tensor:
    """One digest, () int64, of several (n,) in their order."""
    return (digests * _multipliers(len(digests), digests.device)).sum()


def _digests(memory: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([_digest(part) for part in memory])


def _digest(memory: torch.Tensor) -> torch.Tensor:
    """() int64, of bytes (n,) uint8."""
    multipliers = _multipliers(ROW, memory.device)
    end = len(memory) - len(memory) % ROW
    words = memory[:end].view(torch.int64).view(-1, ROW // 8).sum(0)  # (ROW / 8,)
    return (words * multipliers[: ROW // 8]).sum() + (memory[end:] * multipliers[: len(memory) - end]).sum()


def _memory(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor's numbers, (n,) uint8, in the order in which they lie in memory; a view, if it can be."""
    outermost_first = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    memory = tensor.detach().permute(outermost_first).reshape(-1).view(torch.uint8)
    return memory.clone() if memory.storage_offset() % 8 else memory  # words are aligned


@cache
def _multipliers(count: int, device: torch.device) -> torch.Tensor:
    return torch.arange(1, count + 1, device=device) * GOLDEN | 1
