"""The ledger: silent over an epoch that used each sample once, and over nothing else."""

import numpy as np
import pytest
import torch

from dist_mnist.data.coverage import Coverage, CoverageError
from dist_mnist.data.sampler import GlobalOrder

N = 103


@pytest.fixture
def ledger(alone):
    return Coverage(GlobalOrder(num_samples=N, global_batch_size=10), alone)


def shuffled(seed: int) -> torch.Tensor:
    return torch.randperm(N, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1, 10, 50, N])
def test_ledger_of_an_exact_epoch_in_any_order_closes(ledger, size):
    for epoch in range(3):
        for ids in shuffled(epoch).split(size):
            ledger.add(ids)
        ledger.add(torch.empty(0, dtype=torch.int64))  # a rank's part may be empty
        assert ledger.reduced()[0] == N
        ledger.close(epoch)
        assert ledger.reduced() == [0] * 4


def doubled(ids):
    return torch.cat([ids, ids[5:6]])


def omitted(ids):
    return ids[1:]


def exchanged(ids):
    return torch.cat([ids[1:], ids[7:8]])


def two_exchanged(ids):
    """One up, one down: count and sum stay."""
    ids = ids.sort().values.clone()
    ids[3] += 1
    ids[50] -= 1
    return ids


def outside(ids):
    return torch.where(ids == 17, N, ids)


@pytest.mark.parametrize("change", [doubled, omitted, exchanged, two_exchanged, outside, torch.zeros_like])
def test_ledger_of_any_other_epoch_is_refused(ledger, change):
    ledger.add(change(shuffled(1)))
    with pytest.raises(CoverageError, match=f"epoch 4 did not use each of its {N} samples exactly once"):
        ledger.close(4)


def test_ledger_of_errors_in_two_epochs_does_not_cancel_them(ledger):
    ids = shuffled(0)
    ledger.add(ids[:-1])
    with pytest.raises(CoverageError):
        ledger.close(0)
    ledger.add(ids[-1:])
    ledger.close(0)  # what was missing came: only a whole epoch begins the next


def test_ledger_resumed_within_an_epoch_closes(alone):
    order, ids = GlobalOrder(num_samples=N, global_batch_size=10), shuffled(2)
    first = Coverage(order, alone)
    first.add(ids[:40])
    rest = Coverage(order, alone, first.reduced())
    rest.add(ids[40:])
    rest.close(0)
    forgetful = Coverage(order, alone, None)
    forgetful.add(ids[40:])
    with pytest.raises(CoverageError):
        forgetful.close(0)


def test_ledger_with_dropped_samples_counts_them(alone):
    order = GlobalOrder(num_samples=N, global_batch_size=10, drop_last=True)
    ledger = Coverage(order, alone)
    for ids in order.ids(range(10)):
        ledger.add(torch.from_numpy(ids))
    ledger.close(0)
    ledger.add(shuffled(0)[:99])
    with pytest.raises(CoverageError, match="its 100 samples"):
        ledger.close(1)
    ledger = Coverage(order, alone)
    kept = np.concatenate(order.ids(range(10)))
    kept[3] = order.dropped(0)[0]
    ledger.add(torch.from_numpy(kept))
    with pytest.raises(CoverageError, match="epoch 0"):
        ledger.close(0)


@pytest.mark.parametrize("n", [100_000, 3_000_000])
def test_ledger_sums_beyond_64_bits_are_exact(alone, n):
    """Of 100 000 ids the sum of cubes wraps around, of 3 million single cubes do."""
    order = GlobalOrder(num_samples=n, global_batch_size=n)
    ledger = Coverage(order, alone)
    assert (n * (n - 1) // 2) ** 2 > 2**63
    ledger.add(torch.arange(n))
    ledger.close(0)
    ledger.add(torch.arange(n).clamp(max=n - 2))
    with pytest.raises(CoverageError):
        ledger.close(1)
