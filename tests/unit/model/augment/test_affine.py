"""Augmentation, read off images whose pixels hold their own coordinates: these show where each pixel came from."""

import math
from collections.abc import Callable

import pytest
import torch

from dist_mnist.model.augment.affine import RandomAffine

SIZES = [(28, 28), (20, 36), (31, 17)]
KEYS = torch.randint(-(2**63), 2**63 - 1, (200,), generator=torch.Generator().manual_seed(0))


def noise(count: int, height: int = 28, width: int = 28, channels: int = 1) -> torch.Tensor:
    return torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(1)) * 254 + 1


def sources(
    transform: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], keys: torch.Tensor, height: int, width: int
) -> torch.Tensor:
    """Maps (B, 2, 3) from coordinates of new pixels to those of old ones (x, y from the centre), fitted inside.

    Bilinear interpolation keeps a linear ramp exact, so the fit must have no residue to speak of.
    """
    y, x = torch.meshgrid(torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2, indexing="ij")
    images = torch.stack([x, y, torch.ones_like(x)]).expand(len(keys), 3, height, width)
    found = transform(images, keys).double()
    maps = []
    for image in found:
        inside = image[2] > 1 - 1e-6  # where nothing from outside was mixed in
        points = torch.stack([x[inside], y[inside], torch.ones(int(inside.sum()))], 1).double()
        fit = torch.linalg.lstsq(points, torch.stack([image[0][inside], image[1][inside]], 1))
        assert (points @ fit.solution - torch.stack([image[0][inside], image[1][inside]], 1)).abs().max() < 1e-3
        maps.append(fit.solution.T)
    return torch.stack(maps)


def test_random_affine_without_options_returns_the_images():
    images = torch.randint(0, 256, (5, 1, 28, 28), dtype=torch.uint8)
    result = RandomAffine()(images, KEYS[:5])
    assert result.equal(images) and result.dtype == torch.uint8


@pytest.mark.parametrize("options", [{}, {"rotate": 10.0, "shift": 2.0}], ids=str)
def test_random_affine_empty_batch_stays_empty(options):
    assert RandomAffine(**options)(torch.empty(0, 1, 28, 28, dtype=torch.uint8), KEYS[:0]).shape == (0, 1, 28, 28)


@pytest.mark.parametrize("size", SIZES)
def test_rotate_turns_about_the_centre(size):
    maps = sources(RandomAffine(rotate=30), KEYS, *size)
    turns, shifts = maps[:, :, :2], maps[:, :, 2]
    torch.testing.assert_close(turns @ turns.mT, torch.eye(2).double().expand(len(KEYS), 2, 2), atol=1e-4, rtol=0)
    assert (torch.linalg.det(turns) > 0).all() and shifts.abs().max() < 1e-3
    angles = torch.rad2deg(torch.atan2(turns[:, 1, 0], turns[:, 0, 0]))
    assert angles.abs().max() <= 30 and angles.min() < -25 and angles.max() > 25 and angles.mean().abs() < 5


@pytest.mark.parametrize("size", SIZES)
def test_scale_is_alike_in_both_directions(size):
    maps = sources(RandomAffine(scale=0.2), KEYS, *size)
    zooms = 1 / maps[:, 0, 0]
    torch.testing.assert_close(maps[:, 1, 1], maps[:, 0, 0], atol=1e-4, rtol=0)
    assert maps[:, [0, 1], [1, 0]].abs().max() < 1e-4 and maps[:, :, 2].abs().max() < 1e-3
    assert 0.8 - 1e-4 < zooms.min() < 0.83 and 1.17 < zooms.max() < 1.2 + 1e-4


@pytest.mark.parametrize("size", SIZES)
def test_shear_keeps_the_area(size):
    maps = sources(RandomAffine(shear=20), KEYS, *size)
    torch.testing.assert_close(torch.linalg.det(maps[:, :, :2]), torch.ones(len(KEYS)).double(), atol=1e-3, rtol=0)
    slopes = torch.rad2deg(torch.atan(maps[:, 0, 1]))
    assert slopes.abs().max() <= 20.01 and slopes.min() < -17 and slopes.max() > 17
    assert (maps[:, [0, 1], [0, 1]] - 1).abs().max() < 1e-4 and maps[:, 1, 0].abs().max() < 1e-4


@pytest.mark.parametrize("size", SIZES)
def test_shift_is_in_pixels_along_both_axes(size):
    maps = sources(RandomAffine(shift=3), KEYS, *size)
    torch.testing.assert_close(maps[:, :, :2], torch.eye(2).double().expand(len(KEYS), 2, 2), atol=1e-4, rtol=0)
    shifts = maps[:, :, 2]
    assert (shifts.abs().amax(0) <= 3.001).all() and (shifts.amin(0) < -2.7).all() and (shifts.amax(0) > 2.7).all()
    assert abs(torch.corrcoef(shifts.T)[0, 1]) < 0.35


@pytest.mark.parametrize("axis", [0, 1], ids=["across", "down"])
def test_shift_by_whole_pixels_is_exact(axis):
    key = KEYS[:1]
    pixels = 4 / sources(RandomAffine(shift=1), key, 20, 36)[0, axis, 2].item()  # shift in pixels grows with the option
    lines = noise(1, 20, 36)
    lines = lines[:, :, :1].expand(1, 1, 20, 36) if axis == 0 else lines[:, :, :, :1].expand(1, 1, 20, 36)
    moved, dim = RandomAffine(shift=abs(pixels))(lines, key), 3 - axis
    size, sign = lines.shape[dim], int(math.copysign(1, pixels))
    expected = lines.narrow(dim, 4, size - 4) if sign > 0 else lines.narrow(dim, 0, size - 4)
    found = moved.narrow(dim, 0, size - 4) if sign > 0 else moved.narrow(dim, 4, size - 4)
    other = 5 - dim  # along the other axis the shift is not whole: leave out where zeros moved in
    torch.testing.assert_close(found.narrow(other, 8, 4), expected.narrow(other, 8, 4), atol=0.01, rtol=0)
    gone = moved.narrow(dim, size - 4, 4) if sign > 0 else moved.narrow(dim, 0, 4)
    assert gone.abs().max() < 0.01  # zeros moved in


def test_rotate_by_a_quarter_turn_is_exact():
    key = KEYS[:1]
    turn = sources(RandomAffine(rotate=1), key, 29, 29)[0]
    degrees = math.degrees(math.atan2(turn[1, 0], turn[0, 0]))
    images = noise(1, 29, 29, channels=3)
    found = RandomAffine(rotate=90 / abs(degrees))(images, key)
    expected = torch.rot90(images, int(math.copysign(1, degrees)), (2, 3))
    torch.testing.assert_close(found[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], atol=1.0, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_flip_mirrors_half_of_the_images(size):
    images = noise(1, *size, channels=2).expand(len(KEYS), 2, *size)
    found = RandomAffine(flip=True)(images, KEYS)
    same, mirrored = ((found - one).abs().amax((1, 2, 3)) < 0.01 for one in (images, images.flip(3)))
    assert (same ^ mirrored).all() and 80 < mirrored.sum() < 120


def test_flip_leaves_rotation_and_shift_as_they_were():
    images = noise(1).expand(20, 1, 28, 28)
    plain, found = (
        RandomAffine(rotate=15, shift=2)(images, KEYS[:20]),
        RandomAffine(rotate=15, shift=2, flip=True)(images, KEYS[:20]),
    )
    other = RandomAffine(rotate=15, shift=2)(images.flip(3), KEYS[:20])
    same, mirrored = ((found - one).abs().amax((1, 2, 3)) < 0.05 for one in (plain, other))
    assert (same ^ mirrored).all() and mirrored.any()


def test_antithetic_pairs_undo_each_other():
    """Each parameter once one way, once the other; the same ones every time."""
    transforms = {"shift": RandomAffine(shift=3), "turn": RandomAffine(rotate=30)}
    for name, transform in transforms.items():
        pairs = transform.antithetic(6)
        assert pairs.equal(transform.antithetic(6)) and pairs[:2].equal(transform.antithetic(4)[:2])
        assert len(pairs.unique(dim=0)) == 12 and (pairs.abs() <= 1).all()
        assert pairs[:6].equal(-pairs[6:]), name
    shifts = sources(transforms["shift"].transform, transforms["shift"].antithetic(6), 28, 28)[:, :, 2]
    torch.testing.assert_close(shifts[:6], -shifts[6:], atol=1e-3, rtol=0)
    turns = sources(transforms["turn"].transform, transforms["turn"].antithetic(6), 28, 28)[:, :, :2]
    torch.testing.assert_close(turns[:6], turns[6:].transpose(1, 2), atol=1e-3, rtol=0)


def test_transform_one_row_applies_to_all_images():
    images, affine = noise(5), RandomAffine(rotate=15, shift=2)
    numbers = affine.antithetic(1)[:1]
    assert affine.transform(images, numbers).equal(affine.transform(images, numbers.repeat(5, 1)))


FULL = RandomAffine(rotate=15, scale=0.2, shear=10, shift=2)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32])
def test_random_affine_keeps_the_shape_and_differs_by_key(size, dtype):
    images = noise(1, *size, channels=2).to(dtype).expand(20, 2, *size)
    result = FULL(images, KEYS[:20])
    assert result.shape == images.shape and result.dtype == torch.float32
    assert len(result.unique(dim=0)) == 20
    assert result.equal(FULL(images, KEYS[:20]))


def test_random_affine_of_a_sample_does_not_depend_on_its_batch():
    images, order = noise(20), torch.randperm(20, generator=torch.Generator().manual_seed(3))
    whole = FULL(images, KEYS[:20])
    assert FULL(images[order], KEYS[:20][order]).equal(whole[order])
    assert torch.cat([FULL(images[i : i + 7], KEYS[i : min(i + 7, 20)]) for i in range(0, 20, 7)]).equal(whole)
