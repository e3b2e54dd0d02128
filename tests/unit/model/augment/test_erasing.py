"""Random erasing: boxes of the published sizes, of noise, each by its sample's key alone."""

import math

import pytest
import torch

from dist_mnist.model.augment.erasing import RandomErasing
from dist_mnist.model.stateless_rng import fold_in, key_of

KEYS = fold_in(key_of("test"), torch.arange(4000))
CHANNELS, HEIGHT, WIDTH = 2, 28, 20


def images(count: int) -> torch.Tensor:
    """Of ones, which no noise below the largest pixel is, with one zero."""
    images = torch.ones(count, CHANNELS, HEIGHT, WIDTH)
    images[:, 0, 0, 0] = 0
    return images


def erased(probability: float = 1.0) -> torch.Tensor:
    """Which pixels (B, H, W) of the second channel change."""
    return RandomErasing(probability)(images(len(KEYS)), KEYS)[:, 1] != 1


@pytest.mark.parametrize("count", [0, 5])
def test_erasing_without_a_probability_returns_the_images(count):
    before = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8)
    assert RandomErasing()(before, KEYS[:count]) is before


def test_erasing_of_no_images_is_none():
    assert RandomErasing(1.0)(images(0), KEYS[:0]).shape == (0, CHANNELS, HEIGHT, WIDTH)


def test_erased_pixels_are_a_box_within_the_published_limits():
    mask = erased()
    rows, columns = mask.any(2), mask.any(1)
    assert mask.equal(rows[:, :, None] & columns[:, None, :])
    heights, widths = rows.sum(1), columns.sum(1)
    for side in (rows, columns):  # without a gap
        assert (side[:, 1:] & ~side[:, :-1]).sum(1).add(side[:, 0]).eq(1).all()
    area = heights * widths / (HEIGHT * WIDTH)
    assert 0.01 < area.min() < 0.03 and 0.38 < area.max() < 0.44
    assert abs(area.mean() - 0.21) < 0.01
    aspect = (heights / HEIGHT) / (widths / WIDTH)
    assert aspect.max() < 4.2 and aspect.min() > 1 / 4.2
    assert abs((aspect > 1).float().mean() - (aspect < 1).float().mean()) < 5 / math.sqrt(len(KEYS))


def test_erased_boxes_lie_anywhere():
    mask = erased().float().mean(0)
    assert mask.min() > 0.003 and mask.max() < 0.5  # corners are seldom within a box
    assert (mask - mask.flip(0)).abs().max() < 0.06 and (mask - mask.flip(1)).abs().max() < 0.06


def test_erasing_leaves_as_many_images_as_its_probability_says():
    changed = erased(0.25).flatten(1).any(1).float().mean()
    assert abs(changed - 0.25) < 5 * math.sqrt(0.25 * 0.75 / len(KEYS))


def test_erased_pixels_are_noise_between_the_extremes_of_their_image():
    before = images(len(KEYS)) * 200 + 50
    found = RandomErasing(1.0)(before, KEYS)
    noise = found[:, 1][found[:, 1] != 250]
    assert noise.min() >= 50 and noise.max() < 250 and noise.min() < 50.1 and noise.max() > 249.9
    assert abs(noise.mean() - 150) < 1 and abs(noise.std() - 200 / math.sqrt(12)) < 1
    both = found[(found != before).all(1, keepdim=True).expand_as(found)].reshape(-1, 2)
    assert abs(torch.corrcoef(both.T)[0, 1]) < 0.02


def test_erasing_of_a_sample_does_not_depend_on_the_others_of_its_batch():
    before = torch.randint(0, 256, (50, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = RandomErasing(0.5)(before, KEYS[:50])
    assert whole.dtype == torch.float32
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))[:20]
    assert RandomErasing(0.5)(before[order], KEYS[order]).equal(whole[order])
