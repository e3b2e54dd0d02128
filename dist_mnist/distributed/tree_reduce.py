"""Deterministic tree reduction: sums with the same bits for any number of ranks.

Floating-point addition is not associative, so a sum's bits depend on its order. Here the order is a fixed, complete
binary tree whose leaves are the microbatches of a global batch. Each rank holds a subtree, and ranks combine theirs
pairwise (a butterfly of log2(world size) exchanges). a + b and b + a have the same bits, so all ranks get the same sum.
"""

from itertools import pairwise

import torch
import torch.distributed as dist

from dist_mnist.distributed.world import World

Tensors = list[torch.Tensor]


class TreeSum:
    """The sum of lists of tensors, which are added one microbatch at a time."""

    def __init__(self) -> None:
        self.pending: list[tuple[int, Tensors]] = []  # subtrees and their heights, left to right

    def add(self, leaf: Tensors) -> None:
        """Add the tensors of the next microbatch; their memory is reused."""
        height, right = 0, leaf
        while self.pending and self.pending[-1][0] == height:
            left = self.pending.pop()[1]
            if left:
                torch._foreach_add_(left, right)
            height, right = height + 1, left
        self.pending.append((height, right))

    def total(self, world: World) -> Tensors:
        """Return the sum over all ranks' leaves, the same bits on each; all must have added as many. Collective."""
        [(_, tensors)] = self.pending
        if world.size == 1 or not tensors:
            return tensors
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        theirs = torch.empty_like(flat)
        distance = 1
        while distance < world.size:
            peer = world.rank ^ distance
            exchange = [dist.P2POp(dist.isend, flat, peer), dist.P2POp(dist.irecv, theirs, peer)]
            for work in dist.batch_isend_irecv(exchange):
                work.wait()
            flat += theirs
            distance *= 2
        for tensor, values in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(values.view(tensor.shape))
        return tensors


def microbatch_sizes(global_batch_size: int, microbatches: int, rank: int, world_size: int) -> list[int]:
    """Return the sizes of this rank's microbatches; all sizes differ by at most one, and not with the world size."""
    mine = microbatches // world_size
    bounds = [global_batch_size * i // microbatches for i in range(rank * mine, (rank + 1) * mine + 1)]
    return [stop - start for start, stop in pairwise(bounds)]
