"""Folders of idx files opened whole: classes and their names, layouts, held-out test images; as ever for MNIST's."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest

from dist_mnist.data.idx import write_idx
from dist_mnist.data.sources.catalog import CATALOG
from dist_mnist.data.splits import Reading, open_data
from dist_mnist.utils.errors import UserError

RNG = np.random.default_rng(0)
LABELS = (np.arange(40) % 4).astype(np.uint8)
COLOUR = RNG.integers(0, 256, (40, 9, 8, 3), np.uint8)


def rows(dataset) -> list[int]:
    return dataset.rows_of(np.arange(len(dataset))).rows.tolist()


def test_open_data_of_ordinary_files_is_bit_for_bit_as_ever(write_set):
    """A run that resumes would not get over other figures."""
    images = (np.arange(40 * 6 * 5, dtype=np.uint64).reshape(40, 6, 5) * 7919 % 251).astype(np.uint8)
    labels = (np.arange(40) % 3).astype(np.uint8)
    folder = write_set(images[:30], labels[:30], images[30:], labels[30:])
    data = open_data(folder, 0.2, 3)
    assert (data.fingerprint, data.num_classes) == ("1ba10fdff0f0d2ba", 3)
    assert rows(data.validation) == [11, 7, 27, 14, 4, 1]
    assert (data.class_names, data.notes, data.test_fraction) == (("0", "1", "2"), (), 0)
    assert len(list(folder.iterdir())) == 4


def test_open_data_few_of_the_numbers_become_classes_and_their_names(write_set):
    numbers = np.array([3, 8], np.uint8)
    data = open_data(write_set(COLOUR, numbers[LABELS % 2]))
    assert (data.num_classes, data.class_names, data.label_numbers) == (2, ("3", "8"), (3, 8))
    assert data.train.sample_labels.tolist() == data.test.sample_labels.tolist() == (LABELS % 2).tolist()
    assert any("labels 3, 8 become classes 0 to 1" in note for note in data.notes)
    with pytest.raises(UserError, match=r"label 5 at index 1 is unknown: expected 3, 8, the classes of the train"):
        open_data(write_set(COLOUR, numbers[LABELS % 2], COLOUR[:2], np.array([3, 5], np.uint8)))


@pytest.mark.parametrize("numbers", [(0, 1, 2, 3), (1, 2, 3, 4), (5, 50, 500, 30_000)])
def test_open_data_names_of_classes_json_are_by_label_or_in_order(write_set, numbers):
    folder = write_set(COLOUR, np.array(numbers, ">i2")[LABELS])
    (folder / "classes.json").write_text(json.dumps(["a", "b", "c", "d"]))
    data = open_data(folder)
    assert data.class_names == ("a", "b", "c", "d") and data.test.sample_labels.tolist() == LABELS.tolist()


def test_open_data_of_a_known_dataset_has_its_names(write_set, monkeypatch):
    folder = write_set(COLOUR, LABELS)
    digest = hashlib.sha256((folder / "t10k-labels-idx1-ubyte").read_bytes()).hexdigest()
    monkeypatch.setitem(CATALOG, "kmnist", replace(CATALOG["kmnist"], test_labels_sha256=digest))
    assert open_data(folder).class_names == CATALOG["kmnist"].class_names[:4]
    (folder / "classes.json").write_text(json.dumps(["a", "b", "c", "d"]))
    assert open_data(folder).class_names == ("a", "b", "c", "d"), "the folder's own come first"


def test_open_data_like_a_models_reads_its_labels(write_set):
    folder = write_set(COLOUR, np.array([3, 8], np.uint8)[LABELS % 2])
    data = open_data(folder, like=Reading((3, 9, 8), tuple(range(10))))
    assert data.num_classes == 10 and set(data.test.sample_labels.tolist()) == {3, 8}
    assert open_data(folder, like=Reading((3, 9, 8), (4, 8))).label_numbers == (3, 8), "others are not pressed into it"
    letters = write_set(COLOUR, LABELS + 1)
    assert open_data(letters).num_classes == 4
    assert open_data(letters, like=Reading((3, 9, 8), (0, 1, 2, 3, 4))).num_classes == 5, "as earlier versions had it"


def test_open_data_channels_first_is_told_by_shape_and_reads_the_same_data(write_set, tmp_path):
    last = open_data(write_set(COLOUR, LABELS, folder=tmp_path / "last"), 0.2, 1)
    folder = write_set(np.ascontiguousarray(COLOUR.transpose(0, 3, 1, 2)), LABELS, folder=tmp_path / "first")
    first = open_data(folder, 0.2, 1)
    assert first.fingerprint == last.fingerprint and first.train.image_shape == (3, 9, 8)
    assert not first.train.stored.flags.owndata, "it stays a view of the map"
    np.testing.assert_array_equal(first.train.__getitems__(range(9)).images, last.train.__getitems__(range(9)).images)
    assert any("3x9x8 are read as channels x height x width" in note for note in first.notes) and not last.notes
    assert open_data(folder, layout="nhwc").train.image_shape == (8, 3, 9)
    assert open_data(folder, like=Reading((8, 3, 9), (0, 1, 2, 3))).train.image_shape == (8, 3, 9)
    assert open_data(tmp_path / "last", layout="nchw").train.image_shape == (9, 8, 3)


@pytest.mark.parametrize("shape", [(4, 9, 3), (3, 3, 3), (3, 4, 9), (1, 28, 28, 1)[:3], (5, 9, 8)], ids=str)
def test_open_data_shape_that_may_be_either_or_has_channels_last(write_set, shape):
    data = open_data(write_set(np.zeros((8, *shape), np.uint8), LABELS[:8]))
    expected = shape if shape == (1, 28, 28) else (shape[2], *shape[:2])
    assert data.train.image_shape == expected


@pytest.mark.parametrize("seed", [0, 7, None])
def test_open_data_test_fraction_holds_out_images_that_no_other_part_has(write_set, seed):
    folder = write_set(COLOUR, LABELS)
    for path in folder.glob("t10k*"):
        path.unlink()
    with pytest.raises(UserError, match=r"no file found for test images, test labels.*--test-fraction 0.1"):
        open_data(folder)
    data = open_data(folder, 0.25, seed, test_fraction=0.2)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [24, 8, 8] and data.test_fraction == 0.2
    assert sorted(rows(data.train) + rows(data.validation) + rows(data.test)) == list(range(40))
    assert rows(data.test) == (
        list(range(32, 40)) if seed is None else rows(open_data(folder, 0, seed, test_fraction=0.2).test)
    )
    assert data.test.sample_labels.tolist() == LABELS[rows(data.test)].tolist()
    with pytest.raises(UserError, match=r"--test-fraction 0.01 of 40 images leaves one of the two splits empty"):
        open_data(folder, test_fraction=0.01)


def test_open_data_with_test_files_holds_nothing_out(write_set):
    data = open_data(write_set(COLOUR, LABELS), test_fraction=0.5)
    assert data.test_fraction == 0 and len(data.train) == len(data.test) == 40


def test_open_data_one_hot_and_single_column_labels_are_the_same_data(write_set, tmp_path):
    for name, labels in (("one-hot", np.eye(4, dtype=np.uint8)[LABELS]), ("column", LABELS[:, None])):
        data = open_data(write_set(COLOUR, labels, folder=tmp_path / name))
        assert data.train.sample_labels.tolist() == LABELS.tolist() and data.num_classes == 4
    write_idx(tmp_path / "column" / "t10k-labels-idx1-ubyte", LABELS)
    assert open_data(tmp_path / "column").test.sample_labels.tolist() == LABELS.tolist(), "each file by itself"
