"""Mixup and cutmix: shares of the published distribution, and images, labels and losses that have just these."""

import math

import pytest
import torch
from torch.nn import functional as F

from dist_mnist.model.augment.mixing import Mixing, symmetric_beta
from dist_mnist.model.losses import Targets
from dist_mnist.model.stateless_rng import fold_in, key_of, uniform

KEYS = fold_in(key_of("test"), torch.arange(4000))
CDFS = {
    0.5: lambda x: 2 / math.pi * torch.asin(x.sqrt()),
    1.0: lambda x: x,
    2.0: lambda x: 3 * x**2 - 2 * x**3,
}


def pixels(seed: int, count: int = len(KEYS)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 2, 28, 20), dtype=torch.uint8, generator=generator)


def spread(rows: torch.Tensor) -> torch.Tensor:
    return rows[:, None, None, None]


@pytest.mark.parametrize("alpha", CDFS)
def test_symmetric_beta_has_its_distribution(alpha):
    """By Kolmogorov and Smirnov: a sample this far off comes once in 100 000."""
    shares = symmetric_beta(torch.full((len(KEYS),), alpha), *uniform(KEYS, 2).unbind(1)).double().sort().values
    ranks = torch.arange(len(KEYS) + 1, dtype=torch.float64) / len(KEYS)
    expected = CDFS[alpha](shares)
    distance = max((expected - ranks[:-1]).abs().max(), (expected - ranks[1:]).abs().max())
    assert distance < math.sqrt(math.log(2e5) / 2 / len(KEYS))


@pytest.mark.parametrize("alpha", [0.05, 0.2, 8.0])
def test_symmetric_beta_has_its_moments(alpha):
    shares = symmetric_beta(torch.full((len(KEYS),), alpha), *uniform(KEYS, 2).unbind(1)).double()
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(shares.mean() - 0.5) < 5 * math.sqrt(variance / len(KEYS))
    assert abs(shares.var() / variance - 1) < 0.05


@pytest.mark.parametrize("alpha", [1e-6, 0.01, 1.0, 1000.0])
def test_symmetric_beta_of_extreme_numbers_is_a_share(alpha):
    edges = torch.tensor([0.0, 2**-24, 0.25, 0.5, 0.75, 1 - 2**-24])
    first, second = (grid.flatten() for grid in torch.meshgrid(edges, edges, indexing="ij"))
    shares = symmetric_beta(torch.full_like(first, alpha), first, second)
    assert shares.dtype == torch.float32 and ((shares >= 0) & (shares <= 1)).all()


def test_mixup_blends_images_by_their_shares():
    images, partners = pixels(1), pixels(2)
    mixtures, shares = Mixing(mixup=0.4)(images, partners, KEYS)
    torch.testing.assert_close(mixtures, images * spread(shares) + partners * spread(1 - shares), atol=1e-3, rtol=0)
    assert mixtures.dtype == shares.dtype == torch.float32 and shares.min() < 0.01 and shares.max() > 0.99
    assert abs(shares.var() - 1 / (4 * 1.8)) < 0.01


def test_cutmix_cuts_a_box_of_the_partner_and_its_share_is_what_is_left():
    images, partners = pixels(1), pixels(2)
    mixtures, shares = Mixing(cutmix=1.0)(images, partners, KEYS)
    of_partner = (mixtures == partners).all(1)
    assert (of_partner | (mixtures == images).all(1)).all()
    cut = (mixtures != images).any(1)
    rows, columns = cut.any(2), cut.any(1)
    box = rows[:, :, None] & columns[:, None, :]
    assert (of_partner | ~box).all(), "what is inside of the changed pixels is all the partner's"
    alike = (images == partners).all(1)
    least, most = (~alike & of_partner).float().mean((1, 2)), of_partner.float().mean((1, 2))
    assert ((1 - shares >= least - 1e-6) & (1 - shares <= most + 1e-6)).all()
    assert (1 - shares).max() > 0.8 and 0.55 < shares.mean() < 0.75  # what lies outside of the image is cut off
    where = box.float().mean(0)
    assert where.min() > 0.1 and (where - where.flip(0)).abs().max() < 0.06


def test_mixing_leaves_as_many_images_as_its_probability_says():
    images = pixels(1)
    mixtures, shares = Mixing(mixup=1.0, cutmix=1.0, probability=0.3)(images, pixels(2), KEYS)
    same = (mixtures == images).flatten(1).all(1)
    assert shares[same].eq(1).all()
    assert abs(same.float().mean() - 0.7) < 0.05  # of small boxes some are empty


def test_mixup_and_cutmix_together_have_half_of_the_images_each():
    images, partners = pixels(1), pixels(2)
    mixtures, _ = Mixing(mixup=5.0, cutmix=1.0)(images, partners, KEYS)
    whole = ((mixtures == images) | (mixtures == partners)).flatten(1).all(1).float().mean()
    assert abs(whole - 0.5) < 5 / math.sqrt(len(KEYS)) / 2


@pytest.mark.parametrize("mixing", [Mixing(mixup=0.2), Mixing(cutmix=1.0), Mixing(0.2, 1.0, 0.5)], ids=str)
def test_mixture_of_a_sample_does_not_depend_on_the_others_of_its_batch(mixing):
    images, partners, keys = pixels(1, 50), pixels(2, 50), KEYS[:50]
    whole = mixing(images, partners, keys)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))[:20]
    for part, expected in zip(mixing(images[order], partners[order], keys[order]), whole, strict=True):
        assert part.equal(expected[order])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_of_a_mixture_is_the_cross_entropy_of_its_soft_label(smoothing):
    generator = torch.Generator().manual_seed(0)
    logits, shares = torch.randn(30, 5, generator=generator), torch.rand(30, generator=generator)
    labels, partners = torch.arange(30) % 5, torch.arange(30) * 7 % 5
    soft = shares[:, None] * F.one_hot(labels, 5) + (1 - shares[:, None]) * F.one_hot(partners, 5)
    expected = F.cross_entropy(logits, soft, reduction="none", label_smoothing=smoothing)
    targets = Targets(labels, partners, shares)
    torch.testing.assert_close(targets.losses(logits, smoothing), expected)
    assert targets.dominant().equal(torch.where(shares >= 0.5, labels, partners))


def test_loss_of_images_that_are_not_mixed_is_that_of_their_labels_bit_for_bit():
    logits, labels = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 5
    alone, unmixed = Targets(labels), Targets(labels, labels.flip(0), torch.ones(9))
    assert unmixed.losses(logits, 0.1).equal(alone.losses(logits, 0.1)) and unmixed.dominant().equal(labels)
