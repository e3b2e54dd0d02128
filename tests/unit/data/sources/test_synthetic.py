"""Generated digits: the same however they are asked for, evenly mixed, readable, and written as MNIST's files."""

import os
from pathlib import Path

import numpy as np
import pytest

from dist_mnist.data.idx import open_idx
from dist_mnist.data.sources import synthetic
from dist_mnist.data.sources.synthetic import BLOCK, make_digits, write_digits
from dist_mnist.utils.errors import UserError

FILES = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]

COUNT = 4 * BLOCK


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    return make_digits(COUNT, seed=3)


def test_make_digits_gives_uint8_images_and_labels(digits):
    images, labels = digits
    assert images.shape == (COUNT, 28, 28) and images.dtype == np.uint8
    assert labels.shape == (COUNT,) and labels.dtype == np.uint8


@pytest.mark.parametrize("start", [0, 7, BLOCK])
def test_make_digits_zero_samples_gives_empty_arrays(start):
    images, labels = make_digits(0, seed=0, start=start)
    assert images.shape == (0, 28, 28) and labels.shape == (0,)


def test_make_digits_same_seed_gives_the_same_digits(digits):
    for first, second in zip(digits, make_digits(BLOCK, seed=3), strict=True):
        np.testing.assert_array_equal(first[:BLOCK], second)


@pytest.mark.parametrize(
    ("start", "count"), [(0, 1), (BLOCK - 1, 1), (BLOCK, 1), (BLOCK - 3, 7), (5, BLOCK), (500, 2 * BLOCK)]
)
def test_make_digits_any_range_gives_the_same_samples(digits, start, count):
    for whole, part in zip(digits, make_digits(count, seed=3, start=start), strict=True):
        np.testing.assert_array_equal(part, whole[start : start + count])


@pytest.mark.parametrize("other", [{"seed": 4}, {"split": "test"}, {"start": BLOCK}])
def test_make_digits_other_seed_split_or_block_changes_every_image(digits, other):
    images, labels = make_digits(BLOCK, **{"seed": 3, **other})
    assert not np.array_equal(labels, digits[1][:BLOCK])
    assert (images != digits[0][:BLOCK]).any(axis=(1, 2)).all()


def test_make_digits_no_image_occurs_twice(digits):
    assert len(np.unique(digits[0].reshape(len(digits[0]), -1), axis=0)) == len(digits[0])


def test_make_digits_classes_are_balanced_and_shuffled(digits):
    counts = np.bincount(digits[1], minlength=10)
    expected = len(digits[1]) / 10
    assert len(counts) == 10
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()
    repeats = (digits[1][1:] == digits[1][:-1]).mean()  # 0.1 where order is random, near 1 where classes come sorted
    assert 0.05 < repeats < 0.15


def test_skeletons_each_has_a_chance():
    skeletons = synthetic._skeletons()
    np.testing.assert_allclose(np.bincount(skeletons.digits, weights=skeletons.odds), 0.1)
    assert (skeletons.odds > 0).all()


def test_skeleton_straight_strokes_pass_their_points_evenly():
    control, straight, curved, joined = synthetic._skeleton(" 2000! 2080! | 6080! 6000! ")
    path = straight @ control + curved @ control
    np.testing.assert_allclose(path[[0, -1]], [[-0.3, -0.5], [0.1, -0.5]], atol=1e-6)
    assert (joined == 0).sum() == 1  # the pen was lifted once
    steps = np.abs(np.diff(path[:, 1]))[joined[1:] == 1]
    np.testing.assert_allclose(steps, 1.6 / (synthetic.NUM_POINTS - 1), atol=0.02)
    assert steps.mean() > 0.022  # no position is spent on the way through the air
    assert np.isclose(np.abs(path[:, 0]), [[0.3], [0.1]]).any(axis=0).all()


def test_make_digits_light_on_black_centred_and_sized_like_mnist(digits):
    images = digits[0].astype(np.float64)
    ink = images.sum(axis=(1, 2))
    grid = np.arange(28)
    assert (images.max(axis=(1, 2)) > 150).all() and 0.1 < images.mean() / 255 < 0.17
    for axis in (1, 2):  # the projections on x and on y
        profile = images.sum(axis=axis)
        assert np.abs((profile * grid).sum(axis=1) / ink - 13.5).max() < 3
    sides = np.maximum(*(((images > 25).any(axis=axis)).sum(axis=1) for axis in (1, 2)))
    assert 19 <= np.median(sides) <= 21 and sides.max() <= 23
    assert (images[:, [0, -1]].max(axis=(1, 2)) > 60).mean() < 0.05  # the margin, which MNIST's digits seldom reach


def test_make_digits_nearest_mean_tells_classes_apart(digits):
    """Nearest class mean, fitted on one split, reads the other far above the 10 % of chance."""
    images, labels = digits
    means = np.stack([images[labels == digit].mean(axis=0).ravel() for digit in range(10)])
    others, truth = make_digits(BLOCK, seed=3, split="test")
    flat = others.reshape(BLOCK, -1).astype(np.float64)
    nearest = ((means**2).sum(axis=1) - 2 * flat @ means.T).argmin(axis=1)
    assert (nearest == truth).mean() > 0.6


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"count": -1, "seed": 0}, "count is -1"),
        ({"count": 1, "seed": -2}, "seed is -2"),
        ({"count": 1, "seed": 0, "start": -3}, "start is -3"),
        ({"count": 1, "seed": 0, "split": "valid"}, "split is 'valid'"),
    ],
)
def test_make_digits_invalid_argument_is_named(arguments, named):
    with pytest.raises(UserError, match=named):
        make_digits(**arguments)


def test_write_digits_files_hold_the_sequence(tmp_path: Path):
    folder = tmp_path / "new" / "digits"
    write_digits(folder, seed=5, num_train=BLOCK + 40, num_test=30)
    assert sorted(os.listdir(folder)) == sorted(FILES)
    written = [np.asarray(open_idx(folder / name)) for name in FILES]
    expected = [*make_digits(BLOCK + 40, 5, "train"), *make_digits(30, 5, "test")]
    for array, wanted in zip(written, expected, strict=True):
        np.testing.assert_array_equal(array, wanted)
        assert array.dtype == np.uint8


def test_write_digits_test_labels_come_last(tmp_path: Path, monkeypatch):
    names = []
    write = synthetic.write_idx_chunks

    def noting(path, *rest):
        names.append(path.name)
        write(path, *rest)

    monkeypatch.setattr(synthetic, "write_idx_chunks", noting)
    write_digits(tmp_path, num_train=3, num_test=3)
    assert names == FILES


@pytest.mark.parametrize("arguments", [{"num_train": -1}, {"num_test": -1}, {"seed": -1}])
def test_write_digits_invalid_argument_writes_nothing(tmp_path: Path, arguments):
    with pytest.raises(UserError, match=f"{next(iter(arguments))} is -1"):
        write_digits(tmp_path / "digits", **arguments)
    assert not (tmp_path / "digits").exists()
