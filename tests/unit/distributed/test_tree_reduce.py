"""Sums over a tree: the same bits however its leaves are shared out."""

import pytest
import torch

from dist_mnist.data.sampler import shard
from dist_mnist.distributed.tree_reduce import TreeSum, microbatch_sizes

LEAVES = 8


def leaf(number: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    return [torch.randn(3, 5, generator=generator) * 10.0**number, torch.randn(7, generator=generator)]


def tree_sum(leaves: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    total = TreeSum()
    for tensors in leaves:
        total.add(tensors)
    [(_, result)] = total.pending
    return result


def test_tree_of_subtrees_has_the_bits_of_the_whole():
    whole = tree_sum([leaf(i) for i in range(LEAVES)])
    for parts in (2, 4, 8):
        size = LEAVES // parts
        subtrees = [tree_sum([leaf(i) for i in range(p * size, (p + 1) * size)]) for p in range(parts)]
        for mine, expected in zip(tree_sum(subtrees), whole, strict=True):
            assert mine.equal(expected)
    in_a_row = leaf(0)
    for i in range(1, LEAVES):
        torch._foreach_add_(in_a_row, leaf(i))
    assert not in_a_row[0].equal(whole[0]), "else this test would say nothing"
    torch.testing.assert_close(in_a_row, whole)


@pytest.mark.parametrize("size", [1, 7, 8, 250, 1001])
def test_microbatches_for_any_world_size_are_the_same(size):
    whole = microbatch_sizes(size, LEAVES, 0, 1)
    assert len(whole) == LEAVES and sum(whole) == size and max(whole) - min(whole) <= 1
    for world_size in (2, 4, 8):
        parts = [microbatch_sizes(size, LEAVES, rank, world_size) for rank in range(world_size)]
        assert [size for part in parts for size in part] == whole
        for rank, part in enumerate(parts):  # as the sampler shares a batch out
            assert sum(part) == len(shard(0, size, rank, world_size))
