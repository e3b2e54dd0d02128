"""Labels as people have them: columns, one-hot, any numbers; one that seems to be a mistake is named."""

from pathlib import Path

import numpy as np
import pytest

from dist_mnist.data.labels import MAX_CLASSES, as_classes, count_labels, flat_labels, label_numbers
from dist_mnist.utils.errors import UserError

PATH = Path("train-labels-idx1-ubyte")


def numbers_of(train, test=None, names=None) -> tuple[int, ...]:
    counts = count_labels(np.asarray(train), PATH)
    return label_numbers(
        np.asarray(train), counts, None if test is None else count_labels(np.asarray(test), PATH), names, PATH
    )


@pytest.mark.parametrize("dtype", ["u1", "i1", ">i2", ">i4", ">f4"])
def test_flat_labels_of_one_hot_rows_are_the_places_of_the_ones(dtype):
    labels = np.array([2, 0, 1, 2])
    np.testing.assert_array_equal(flat_labels(np.eye(3)[labels].astype(dtype), PATH), labels)


def test_flat_labels_of_one_column_is_a_view_without_a_copy():
    column = np.arange(5, dtype=">i4")[:, None]
    flat = flat_labels(column, PATH)
    assert flat.tolist() == [0, 1, 2, 3, 4] and np.shares_memory(flat, column)


@pytest.mark.parametrize("row", [[0, 0, 0], [1, 1, 0], [0, 2, 0], [0, -1, 2]], ids=str)
def test_flat_labels_row_that_is_not_one_hot_is_named(row):
    stored = np.eye(3, dtype=np.int8)[[0, 1, 2, 1]]
    stored[2] = row
    with pytest.raises(UserError, match=f"{PATH}: labels in 2 dimensions .*one-hot.*row 2 is"):
        flat_labels(stored, PATH)


@pytest.mark.parametrize(
    ("train", "test", "names", "expected"),
    [
        ([0, 1, 2], [2, 1], None, (0, 1, 2)),
        ([0, 2], [0, 1], None, (0, 1, 2)),  # a class may have no image
        ([3, 8, 3], [8], None, (3, 8)),
        ([1, 2, 3, 4], [4], None, (1, 2, 3, 4)),  # as EMNIST letters
        ([1, 2, 3, 4], [0], None, (0, 1, 2, 3, 4)),  # numbered from 0, after all
        ([1, 2, 3, 4], None, None, (1, 2, 3, 4)),
        ([10, 2_000_000_000, -0], [10], None, (0, 10, 2_000_000_000)),
        ([3, 8], [8], "ab", (3, 8)),
        ([0, 1], [1], "abcd", (0, 1, 2, 3)),
        ([1, 2], [1], "abc", (0, 1, 2)),
    ],
)
def test_label_numbers_are_those_from_0_or_those_in_use(train, test, names, expected):
    assert numbers_of(train, test, names) == expected


@pytest.mark.parametrize(("train", "names"), [([0, 1, 7], "ab"), ([0, 1, 2], "ab"), ([5, 6], "a")])
def test_label_numbers_other_than_the_names_are_refused(train, names):
    with pytest.raises(UserError, match=f"{PATH}: the file has .* labels .* classes.json has {len(names)} names"):
        numbers_of(train, names=names)


@pytest.mark.parametrize("outlier", [57, 200, 3_000_000])
def test_label_numbers_single_image_far_from_the_others_is_named(outlier):
    labels = np.arange(1000) % 10
    labels[123] = outlier
    with pytest.raises(
        UserError, match=f"label {outlier} .index 123. has 1 of the images, other labels have about 100 each"
    ):
        numbers_of(labels)
    assert numbers_of(labels, names=[str(n) for n in range(11)]) == (*range(10), outlier), "who names it means it"


def test_label_numbers_few_images_of_every_class_are_no_mistake():
    assert numbers_of([0, 10, 20, 30, 30]) == (0, 10, 20, 30)


def test_count_labels_more_than_can_be_trained_and_negative_ones_are_refused():
    with pytest.raises(UserError, match=f"more than {MAX_CLASSES} distinct labels"):
        count_labels(np.arange(MAX_CLASSES + 1), PATH)
    with pytest.raises(UserError, match="label -3 at index 2 is negative"):
        count_labels(np.array([0, 1, -3], np.int8), PATH)


def test_count_labels_of_any_size_are_those_of_numpy():
    labels = np.random.default_rng(0).choice([0, 5, 2**31 - 1, 77], 3 << 20).astype(">i4")
    expected = np.unique(labels, return_counts=True)
    for found, wanted in zip(count_labels(labels, PATH), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_as_classes_are_places_among_the_numbers():
    labels = np.array([8, 3, 8, 500], ">i2")
    assert as_classes(labels, (3, 8, 500)).tolist() == [1, 0, 1, 2]
    assert as_classes(labels, range(501)) is labels
