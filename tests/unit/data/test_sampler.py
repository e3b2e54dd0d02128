"""The global order: each sample once an epoch, in the same batches for any number of ranks, from any step on."""

import time
import tracemalloc

import numpy as np
import pytest

from dist_mnist.data.permutation import Permutation
from dist_mnist.data.sampler import GlobalOrder, ShardedBatchSampler, shard
from dist_mnist.utils.errors import UserError

TOPOLOGIES = [
    (n, batch, world)
    for n, batch in [(1, 1), (7, 7), (10, 3), (64, 16), (101, 10), (997, 100)]
    for world in (1, 2, 3, 8)
]
HUGE = [10**12, 2**40, 2**40 + 1, 2**62]


def make_order(n: int = 101, batch: int = 10, **options) -> GlobalOrder:
    return GlobalOrder(num_samples=n, global_batch_size=batch, **{"seed": 5, **options})


def parts(order: GlobalOrder, steps: range, world: int) -> list[list[np.ndarray]]:
    """For each step, the ranks' parts."""
    return list(zip(*(order.ids(steps, rank, world) for rank in range(world)), strict=True))


@pytest.mark.parametrize("size", [*range(1, 71), 1000, 65_535, 65_536, 65_537])
def test_permutation_of_any_size_is_a_bijection(size):
    items = Permutation(size, "test", 1)(np.arange(size))
    assert items.dtype == np.int64
    np.testing.assert_array_equal(np.sort(items), np.arange(size))


def test_permutation_of_nothing_is_empty():
    assert Permutation(0, "test")(np.arange(0)).tolist() == []


def test_permutation_of_another_address_is_another():
    positions = np.arange(1000)
    first, again, *others = (
        Permutation(1000, *address)(positions)
        for address in [("a", 1, 2), ("a", 1, 2), ("b", 1, 2), ("a", 2, 2), ("a", 1, 3)]
    )
    np.testing.assert_array_equal(first, again)
    for other in others:
        assert (first == other).sum() < 10  # 1 is expected of two independent ones
    np.testing.assert_array_equal(Permutation(1000, "a", 1, 2)(positions[::-7]), first[::-7])


@pytest.mark.parametrize("size", HUGE)
def test_permutation_that_is_huge_costs_what_is_asked_for(size):
    positions = np.append(np.arange(1000) * (size // 1000), size - 1)
    tracemalloc.start()
    began = time.perf_counter()
    items = Permutation(size, "huge")(positions)
    seconds, (_, peak) = time.perf_counter() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(np.unique(items)) == len(positions)
    assert items.min() >= 0 and items.max() < size
    assert abs(items.astype(float).mean() / size - 0.5) < 0.05
    assert peak < 1 << 20 and seconds < 1


@pytest.mark.parametrize("size", [10, 60, 1000])
def test_permutation_puts_every_item_at_every_position_as_often(size):
    """Chi-square over where positions go under many keys: within 5 deviations of its mean, the degrees of freedom."""
    cells, trials, shown = min(size, 10), 500, np.unique([0, size // 2, size - 1])
    found = np.stack([Permutation(size, "chance", trial)(shown) for trial in range(trials)]) * cells // size
    expected = np.bincount(np.arange(size) * cells // size) / size * trials
    for column in found.T:
        statistic = ((np.bincount(column, minlength=cells) - expected) ** 2 / expected).sum()
        assert abs(statistic - (cells - 1)) < 5 * (2 * (cells - 1)) ** 0.5


def test_permutation_neighbours_are_independent():
    items = Permutation(65_537, "neighbours")(np.arange(65_537)).astype(float)
    assert abs(np.corrcoef(items[:-1], items[1:])[0, 1]) < 5 / 256
    assert abs(np.corrcoef(items, np.arange(65_537))[0, 1]) < 5 / 256


@pytest.mark.parametrize(("start", "stop", "world"), [(0, 10, 3), (7, 9, 4), (5, 5, 2), (0, 1000, 7)])
def test_shard_of_any_world_is_complete_and_equal_to_within_one(start, stop, world):
    shards = [shard(start, stop, rank, world) for rank in range(world)]
    assert [position for part in shards for position in part] == list(range(start, stop))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@pytest.mark.parametrize(("n", "batch", "world"), TOPOLOGIES)
def test_global_order_for_any_world_has_each_sample_once_in_the_same_batches(n, batch, world):
    order = make_order(n, batch)
    assert order.steps_per_epoch == -(-n // batch)
    for epoch in (0, 1, 5):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        whole, sharded = order.ids(steps), parts(order, steps, world)
        np.testing.assert_array_equal(np.sort(np.concatenate(whole)), np.arange(n))
        for step, ids, shares in zip(steps, whole, sharded, strict=True):
            np.testing.assert_array_equal(np.concatenate(shares), ids)
            assert len(ids) == order.batch_size(step) and order.epoch(step) == epoch
            sizes = [len(share) for share in shares]
            assert max(sizes) - min(sizes) <= 1
        assert [len(ids) for ids in whole[:-1]] == [batch] * (len(whole) - 1)
        assert len(whole[-1]) == (n % batch or batch)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("n", "batch"), [(101, 10), (5, 5), (33, 2)])
def test_global_order_from_any_step_goes_on_the_same(n, batch, shuffle):
    order = make_order(n, batch, shuffle=shuffle)
    total = 3 * order.steps_per_epoch + 1
    whole = order.ids(range(total), 1, 2)
    for start in range(total):
        for ids, expected in zip(order.ids(range(start, total), 1, 2), whole[start:], strict=True):
            np.testing.assert_array_equal(ids, expected)


def test_global_order_of_another_epoch_or_seed_is_another():
    order = make_order(1000, 1000)
    epochs = [*order.ids(range(3)), make_order(1000, 1000, seed=6).ids(range(1))[0]]
    for i, first in enumerate(epochs):
        for second in epochs[:i]:
            assert (first == second).sum() < 10


@pytest.mark.parametrize(("n", "batch"), [(101, 10), (100, 10), (7, 4)])
def test_global_order_with_drop_last_drops_the_shorter_batch(n, batch):
    order = make_order(n, batch, drop_last=True)
    assert order.steps_per_epoch == n // batch and order.samples_per_epoch == n // batch * batch
    for epoch in range(3):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        batches = order.ids(steps)
        assert {len(ids) for ids in batches} == {batch}
        assert len(np.unique(np.concatenate(batches))) == order.samples_per_epoch


def test_in_order_batches_go_through_the_files():
    order = make_order(10, 4, shuffle=False)
    assert [ids.tolist() for ids in order.ids(range(4))] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [0, 1, 2, 3]]
    assert [ids.tolist() for ids in order.ids(range(3), 1, 2)] == [[2, 3], [6, 7], [9]]


@pytest.mark.parametrize(("n", "batch", "drop_last"), [(0, 1, False), (10, 0, False), (10, -1, False), (10, 11, True)])
def test_global_order_without_a_batch_is_refused(n, batch, drop_last):
    with pytest.raises(UserError, match=f"{n} samples do not make a batch of {batch}"):
        make_order(n, batch, drop_last=drop_last)


@pytest.mark.parametrize("steps", [range(0), range(1), range(3, 100), range(31, 97)])
@pytest.mark.parametrize(("rank", "world"), [(0, 1), (2, 3)])
def test_batch_sampler_yields_the_ids_of_the_order(steps, rank, world):
    order = make_order()
    sampler = ShardedBatchSampler(order, steps, rank, world)
    assert len(sampler) == len(steps)
    for _ in range(2):  # it can be gone through again
        for ids, expected in zip(sampler, order.ids(steps, rank, world), strict=True):
            np.testing.assert_array_equal(ids, expected)


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (2, 3)])
def test_batch_sampler_with_partners_yields_theirs_behind_the_ids_of_the_order(rank, world):
    order, steps = make_order(partners=True), range(3, 100)
    for step, ids in zip(steps, ShardedBatchSampler(order, steps, rank, world), strict=True):
        [own] = order.ids(range(step, step + 1), rank, world)
        np.testing.assert_array_equal(ids, np.concatenate([own, order.partners_of(own, order.epoch(step))]))
