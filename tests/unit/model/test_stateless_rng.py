"""Addressed draws: SplitMix64 to the bit, evenly spread, and a sample's own wherever it stands in a batch."""

import pytest
import torch

from dist_mnist.model.stateless_rng import fold_in, keep_mask, key_of, uniform

MASK = 2**64 - 1


def mix(value: int) -> int:
    """SplitMix64's finalizer, in Python's integers."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & MASK
    return value ^ value >> 31


def splitmix64(state: int, count: int) -> list[int]:
    return [mix(state + i * 0x9E3779B97F4A7C15 & MASK) for i in range(1, count + 1)]


def signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


@pytest.fixture(scope="module")
def keys() -> torch.Tensor:
    return fold_in(key_of("test", 0), torch.arange(20_000))


def test_reference_splitmix64_gives_the_published_numbers():
    """Of https://rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64, seed 1234567."""
    assert splitmix64(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("key", [0, 1, 1234567, 2**63 - 1, 2**63, MASK])
def test_uniform_any_keys_is_splitmix64(key):
    expected = [(value >> 40) / 2**24 for value in splitmix64(key, 50)]
    assert uniform(torch.tensor([signed(key)]), 50)[0].tolist() == expected


@pytest.mark.parametrize("drop", [0.0, 0.25, 0.4, 0.99])
def test_masks_are_sixteen_bits_of_splitmix64_each(drop):
    key = 987654321987654321
    lanes = [value >> 16 * lane & 0xFFFF for value in splitmix64(key, 13) for lane in range(4)]
    as_signed = [lane - 2**16 if lane >= 2**15 else lane for lane in lanes]
    expected = [lane >= round(drop * 2**16) - 2**15 for lane in as_signed]
    for count in (1, 3, 4, 50):
        assert keep_mask(torch.tensor([key]), count, drop)[0].tolist() == expected[:count]


@pytest.mark.parametrize("sample", [0, 1, 59_999, 2**40])
@pytest.mark.parametrize("base", [0, -5, 2**62])
def test_sample_keys_are_those_of_the_reference(base, sample):
    expected = signed(mix((sample * 0x9E3779B97F4A7C15 ^ base) & MASK))
    assert fold_in(base, torch.tensor([sample])).tolist() == [expected]


def test_addresses_of_other_purposes_seeds_and_epochs_differ():
    wanted = [(purpose, seed, epoch) for purpose in ("augment", "dropout") for seed in range(20) for epoch in range(20)]
    assert len({key_of(*what) for what in wanted}) == len(wanted)
    assert key_of("augment", 1, 2) == key_of("augment", 1, 2)
    assert all(-(2**63) <= key_of(*what) < 2**63 for what in wanted)


def test_sample_keys_of_other_samples_differ(keys):
    assert len(keys.unique()) == len(keys)


def test_uniform_numbers_are_spread_evenly(keys):
    numbers = uniform(keys, 5)
    assert numbers.dtype == torch.float32 and numbers.shape == (len(keys), 5)
    assert numbers.min() >= 0 and numbers.max() < 1
    deviation = (1 / 12 / len(keys)) ** 0.5
    assert ((numbers.mean(0) - 0.5).abs() < 5 * deviation).all()
    assert ((numbers.var(0) - 1 / 12).abs() < 5 * (1 / 180 / len(keys)) ** 0.5).all()
    correlation = torch.corrcoef(numbers.T) - torch.eye(5)
    assert (correlation.abs() < 5 * len(keys) ** -0.5).all()


@pytest.mark.parametrize("drop", [0.0, 0.1, 0.4, 0.5, 0.99])
def test_masks_drop_as_many_as_asked_for(keys, drop):
    mask = keep_mask(keys, 7, drop)
    assert mask.dtype == torch.bool and mask.shape == (len(keys), 7)
    deviation = (drop * (1 - drop) / len(keys)) ** 0.5
    assert ((mask.float().mean(0) - (1 - drop)).abs() <= 5 * deviation + 2**-16).all()


def test_draws_of_a_sample_elsewhere_in_the_batch_are_the_same(keys):
    order = torch.randperm(len(keys), generator=torch.Generator().manual_seed(0))
    for draw in (lambda k: uniform(k, 3), lambda k: keep_mask(k, 9, 0.4)):
        torch.testing.assert_close(draw(keys[order]), draw(keys)[order], rtol=0, atol=0)
        torch.testing.assert_close(draw(keys[77:78]), draw(keys)[77:78], rtol=0, atol=0)
        assert len(draw(keys[:0])) == 0
    ids = torch.arange(100)
    assert fold_in(7, ids[50:]).equal(fold_in(7, ids)[50:])
