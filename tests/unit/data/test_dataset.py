"""The memory-mapped dataset: its rows are the files' rows, its parts are disjoint, and what does not fit is refused."""

import os

import numpy as np
import pytest
from torch.utils.data import DataLoader

from dist_mnist.data.convert.describe import describe
from dist_mnist.data.dataset import IdxDataset
from dist_mnist.data.idx import IdxError, write_idx
from dist_mnist.data.loader import Loader
from dist_mnist.data.sampler import GlobalOrder
from dist_mnist.data.sources.files import SplitFiles
from dist_mnist.data.splits import open_data
from dist_mnist.utils.errors import UserError

RNG = np.random.default_rng(0)
LABELS = np.arange(20, dtype=np.uint8) % 3
IMAGES = RNG.integers(0, 256, (20, 4, 5), np.uint8)
SETS = {
    "uint8": (IMAGES, LABELS),
    "int16 big-endian": (RNG.integers(-30000, 30000, (20, 4, 5)).astype(">i2"), LABELS.astype(">i4")),
    "float32": (RNG.normal(size=(20, 3, 2)).astype(np.float32), LABELS.astype(np.int8)),
    "NxHxWxC": (RNG.integers(0, 256, (20, 4, 5, 3), np.uint8), LABELS),
}


def numbered(total: int) -> IdxDataset:
    """A dataset whose labels are the numbers of its rows."""
    return IdxDataset(np.arange(total, dtype=np.uint8).reshape(-1, 1, 1), np.arange(total))


def rows_of(dataset: IdxDataset) -> list[int]:
    return dataset.__getitems__(np.arange(len(dataset))).labels.tolist()


@pytest.mark.parametrize("name", SETS)
def test_gather_of_any_ids_gives_the_files_rows(tmp_path, name):
    images, labels = SETS[name]
    files = SplitFiles(tmp_path / "images", tmp_path / "labels")
    write_idx(files.images, images)
    write_idx(files.labels, labels)
    dataset = IdxDataset.open(files)
    assert not dataset.images.flags.owndata and not dataset.images.flags.writeable  # a view of the read-only map
    ids = np.array([19, 0, 7, 7, 3])
    samples = dataset.__getitems__(ids)
    np.testing.assert_array_equal(samples.images, images[ids].reshape(5, *images.shape[1:3], -1))
    np.testing.assert_array_equal(samples.labels, labels[ids])
    np.testing.assert_array_equal(samples.ids, ids)
    assert samples.images.dtype == images.dtype.newbyteorder("=") and samples.images.dtype.isnative
    assert samples.labels.dtype == np.int64
    channels = images.shape[3] if images.ndim == 4 else 1
    assert dataset.image_shape == (channels, *images.shape[1:3])


def test_dataset_item_is_an_image_and_its_label(tmp_path):
    dataset = IdxDataset(IMAGES, LABELS)
    for index in (0, 5, 19, -1, -20):
        image, label = dataset[index]
        np.testing.assert_array_equal(image[..., 0], IMAGES[index])
        assert label == LABELS[index] and isinstance(label, int)
    for index in (20, -21):
        with pytest.raises(IndexError, match=f"index {index} is out of range for a dataset of 20"):
            dataset[index]


def test_dataset_in_a_plain_data_loader_gives_every_sample_once():
    train, _ = numbered(23).split(0.2, seed=1)
    batches = list(DataLoader(train, batch_size=5, shuffle=True, collate_fn=lambda samples: samples))
    assert [len(batch.labels) for batch in batches] == [5, 5, 5, 4]
    assert sorted(np.concatenate([batch.labels for batch in batches])) == sorted(rows_of(train))


@pytest.mark.parametrize(
    ("total", "fraction", "held_out"), [(10, 0.3, 3), (1000, 0.1, 100), (7, 0.5, 3), (70, 0.99, 69)]
)
def test_split_parts_are_disjoint_and_complete(total, fraction, held_out):
    train, validation = (rows_of(part) for part in numbered(total).split(fraction, seed=4))
    assert (len(train), len(validation)) == (total - held_out, held_out)
    assert sorted(train + validation) == list(range(total))


def test_split_with_another_seed_is_another():
    first, again, other = (rows_of(numbered(1000).split(0.3, seed)[1]) for seed in (1, 1, 2))
    assert first == again
    assert 50 < len(set(first) & set(other)) < 130  # 90 are expected of two independent draws
    assert abs(np.mean(first) - 500) < 50  # not one end of the file


def test_split_without_a_seed_holds_out_the_last():
    train, validation = numbered(20).split(0.3, seed=None)
    assert (rows_of(train), rows_of(validation)) == (list(range(14)), list(range(14, 20)))
    assert rows_of(validation.split(0.5, seed=None)[1]) == [17, 18, 19]


def test_split_of_no_fraction_holds_out_nothing():
    train, validation = numbered(10).split(0, seed=1)
    assert rows_of(train) == list(range(10)) and len(validation) == 0


def test_split_of_less_than_one_image_is_refused():
    with pytest.raises(UserError, match=r"--validation-fraction 0.05 of 10 images leaves one of the two splits empty"):
        numbered(10).split(0.05, seed=1)


@pytest.mark.parametrize(("total", "folds"), [(10, 2), (103, 5), (7, 7)])
@pytest.mark.parametrize("seed", [4, None])
def test_fold_each_sample_is_held_out_once_and_trained_on_otherwise(total, folds, seed):
    parts = [tuple(map(rows_of, numbered(total).fold(fold, folds, seed))) for fold in range(folds)]
    assert sorted(row for _, held_out in parts for row in held_out) == list(range(total))
    assert all(sorted(train + held_out) == list(range(total)) for train, held_out in parts)
    assert max(len(held_out) for _, held_out in parts) - min(len(held_out) for _, held_out in parts) <= 1
    if seed is None:
        assert all(held_out == list(range(held_out[0], held_out[-1] + 1)) for _, held_out in parts), "blocks"
    else:
        again, other = (rows_of(numbered(total).fold(1, folds, one)[1]) for one in (seed, 5))
        assert parts[1][1] == again != other


def test_fold_of_a_part_stays_in_it_and_of_too_few_is_refused():
    rest, test = numbered(100).split(0.2, seed=1)
    held_out = [row for fold in range(3) for row in rows_of(rest.fold(fold, 3, seed=1)[1])]
    assert sorted(held_out + rows_of(test)) == list(range(100))
    assert rows_of(rest.first(5)) == rows_of(rest)[:5] and len(rest.first(99)) == 80
    with pytest.raises(UserError, match="--validation-fold cannot divide 3 images into 4 folds: give at most 3"):
        numbered(3).fold(0, 4, seed=1)


def test_split_of_a_part_gives_parts_of_itself():
    train, validation = numbered(100).split(0.5, seed=1)
    first, second = (rows_of(piece) for piece in train.split(0.5, seed=2))
    assert sorted(first + second) == sorted(rows_of(train))
    assert not set(first + second) & set(rows_of(validation))


SMALL_TEST = {"test_images": IMAGES[:6], "test_labels": LABELS[:6]}
MISFITS = {
    "negative label": (
        {"train_labels": np.where(np.arange(20) == 7, -1, LABELS).astype(np.int8)},
        "train-labels.*: label -1 at index 7 is negative",
    ),
    "label beyond training's": (
        {"test_labels": np.where(np.arange(6) == 4, 3, LABELS[:6]).astype(np.uint8)},
        "t10k-labels.*: label 3 at index 4 is unknown: expected 0 to 2",
    ),
    "counts differ": ({"train_labels": LABELS[:-1]}, "has 20 images but .* has 19 labels"),
    "flat images": ({"train_images": IMAGES[:, 0]}, "expected 3 or 4 dimensions .*, got 2"),
    "float labels": ({"train_labels": LABELS.astype(np.float32)}, "expected labels as integers in 1 .*, got .*f4"),
    "labels of several columns": ({"train_labels": np.ones((20, 8), np.int32)}, "must be one-hot.*row 0 is"),
    "labels in three dimensions": ({"train_labels": LABELS[:, None, None]}, r"labels in 1 .*, got shape \(20, 1, 1\)"),
    "no images": ({"train_images": IMAGES[:0], "train_labels": LABELS[:0]}, "the file has no pixels"),
    "no pixels": ({"train_images": IMAGES[:, :0]}, "the file has no pixels"),
    "one class": ({"train_labels": LABELS * 0, "test_labels": LABELS[:6] * 0}, "all labels are 0"),
    "other shape": ({"test_images": IMAGES[:6, 1:]}, "t10k-images.*the files do not belong together"),
    "other dtype": ({"test_images": IMAGES[:6].astype(np.int16)}, "t10k-images.*the files do not belong together"),
}


@pytest.mark.parametrize(("arrays", "message"), [pytest.param(*values, id=name) for name, values in MISFITS.items()])
def test_open_data_files_that_do_not_fit_are_refused(write_set, arrays, message):
    folder = write_set(**({"train_images": IMAGES, "train_labels": LABELS} | SMALL_TEST | arrays))
    with pytest.raises(UserError, match=message):
        open_data(folder, 0.1, 0)


def test_fingerprint_of_other_data_differs(write_set, tmp_path):
    changed = IMAGES.copy()
    changed[11, 2, 3] ^= 1
    sets = {"a": (IMAGES, LABELS), "b": (IMAGES, LABELS), "c": (changed, LABELS), "d": (IMAGES, LABELS[::-1])}
    found = {name: open_data(write_set(*arrays, folder=tmp_path / name), 0, 0) for name, arrays in sets.items()}
    assert found["a"].fingerprint == found["b"].fingerprint
    assert len({data.fingerprint for data in found.values()}) == 3


@pytest.mark.parametrize("name", SETS)
def test_pixel_statistics_are_those_of_all_images(name):
    images, labels = SETS[name]
    mean, deviation = IdxDataset(images, labels).pixel_statistics()
    pixels = images.astype(np.float64).reshape(-1, images.shape[3] if images.ndim == 4 else 1)
    np.testing.assert_allclose(mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(deviation, pixels.std(0), rtol=1e-9)


def test_pixel_statistics_of_a_sample_are_close_and_of_a_constant_finite():
    images = np.linspace(0, 255, 20_000).astype(np.uint8).reshape(-1, 1, 1)  # sorted: one end would not do as a sample
    mean, deviation = IdxDataset(images, np.zeros(20_000, np.uint8)).pixel_statistics()
    assert abs(mean[0] - images.mean()) < 2 and abs(deviation[0] - images.std()) < 1
    assert IdxDataset(np.full((5, 2, 2), 9, np.uint8), LABELS[:5]).pixel_statistics() == (9, 1)


@pytest.mark.parametrize(("name", "largest"), [("uint8", 255), ("int16 big-endian", 32767), ("float32", 1)])
def test_pixel_scaling_of_each_kind_gives_offset_and_scale(name, largest):
    dataset = IdxDataset(*SETS[name])
    for kind, expected in (("raw", (0, 1)), ("unit", (0, largest)), ("standard", dataset.pixel_statistics())):
        assert dataset.pixel_scaling(kind) == expected
    assert [len(part) for part in IdxDataset(*SETS["NxHxWxC"]).pixel_scaling("unit")] == [3, 3]


def test_open_data_real_mnist_has_its_published_figures(mnist):
    facts = describe(mnist)
    assert (facts["training images"], facts["test images"], facts["classes"]) == (60_000, 10_000, 10)
    assert facts["image shape (channels, height, width)"] == [1, 28, 28]
    assert facts["images per class (test)"] == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert facts["pixel mean"] == pytest.approx([33.32], abs=0.5)
    assert facts["pixel standard deviation"] == pytest.approx([78.57], abs=0.5)


@pytest.mark.parametrize("kind", ["images", "labels"])
def test_gather_from_a_file_that_has_shrunk_is_refused(small_set, alone, kind):
    data = open_data(small_set)
    order = GlobalOrder(num_samples=20, global_batch_size=5)
    [path] = small_set.glob(f"train-{kind}*")
    os.truncate(path, 20)
    for read in (lambda: data.train[19], lambda: list(Loader(data.train, order, range(4), alone))):
        with pytest.raises(IdxError, match=f"{path} has shrunk while in use, from .* to 20 bytes"):
            read()
    assert data.test[0]


def test_gather_from_a_file_replaced_by_renaming_gives_the_old_one(small_set):
    data = open_data(small_set)
    before = data.train.__getitems__(range(20))
    [path] = small_set.glob("train-images*")
    path.with_name("new").write_bytes(b"shorter")
    path.with_name("new").rename(path)
    after = data.train.__getitems__(range(20))
    assert np.array_equal(before.images, after.images)


def test_mnist_images_lie_in_the_order_of_their_writers(mnist):
    """Of two groups in turn: a digit leans as the next but one does. So the last images are by writers of their own."""
    images = np.asarray(open_data(mnist).train.images[..., 0], np.float64)
    rows = np.arange(28.0)
    ink = images.sum((1, 2))
    x, y = ((images.sum(axis) * rows).sum(1) / ink for axis in (1, 2))
    x, y = rows - x[:, None], rows - y[:, None]
    slants = np.einsum("nhw,nh,nw->n", images, y, x) / np.einsum("nhw,nh->n", images, y**2)
    assert np.corrcoef(slants[:-2], slants[2:])[0, 1] > 0.3
    assert abs(np.corrcoef(slants[:-20_000], slants[20_000:])[0, 1]) < 0.2
