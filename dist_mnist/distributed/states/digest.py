"""Digests of a rank's tensors: 64 bits that change with any bit flip, computed at memory bandwidth.

They detect accidents, not attacks: sums modulo 2^64 whose terms have odd multipliers. A bit flip changes its term by a
power of two; times an odd number, that is no multiple of 2^64, so the sum changes. Many changes at once go undetected
with a probability of about 2^-64.
"""

from collections.abc import Iterable, Sequence
from functools import cache

import torch

from dist_mnist.utils.hashing import GOLDEN

ROW = 8192  # bytes with a multiplier for each word (or byte, in the last row); rows are summed before multiplication
SMALL = 1 << 18  # bytes; smaller tensors are concatenated first, as each operation takes some microseconds


def state_digest(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return one digest of all tensors, in this order: () int64 on their device, without synchronisation."""
    memory = [_memory(tensor) for tensor in tensors]
    small = [part for part in memory if len(part) < SMALL]
    together = [torch.cat(small)] if small else []
    return fold(_digests([*together, *(part for part in memory if len(part) >= SMALL)]))


def tensor_digests(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return a digest of each of n > 0 tensors, over its numbers in memory order: (n,) int64 on their device."""
    return _digests([_memory(tensor) for tensor in tensors])


def fold(digests: torch.Tensor) -> torch.Tensor:
    """Combine digests (n,), in this order, into one: () int64."""
    return (digests * _multipliers(len(digests), digests.device)).sum()


def _digests(memory: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([_digest(part) for part in memory])


def _digest(memory: torch.Tensor) -> torch.Tensor:
    """Return the digest, () int64, of bytes (n,) uint8."""
    multipliers = _multipliers(ROW, memory.device)
    end = len(memory) - len(memory) % ROW
    words = memory[:end].view(torch.int64).view(-1, ROW // 8).sum(0)  # (ROW / 8,)
    return (words * multipliers[: ROW // 8]).sum() + (memory[end:] * multipliers[: len(memory) - end]).sum()


def _memory(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's bytes, (n,) uint8, in memory order; a view if possible."""
    outermost_first = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    memory = tensor.detach().permute(outermost_first).reshape(-1).view(torch.uint8)
    return memory.clone() if memory.storage_offset() % 8 else memory  # words must be aligned


@cache
def _multipliers(count: int, device: torch.device) -> torch.Tensor:
    return torch.arange(1, count + 1, device=device) * GOLDEN | 1
