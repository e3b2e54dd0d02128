"""`data import` of what `data export` wrote: the same bytes and class names; and classes.json beside other sources."""

import json
from pathlib import Path

import numpy as np
import pytest

from dist_mnist.data.convert.export import Format
from dist_mnist.data.idx import open_idx
from dist_mnist.data.sources.classes import read_class_names, write_class_names
from helpers.data import encoded, write_csv, write_npz
from helpers.runs import dist_mnist

# As Fashion-MNIST's; out of the order of letters; differing in case alone; numbers that are not their labels; one that
# no picture has, and one that only a test picture has.
NAMES = (
    "T-shirt/top", "Trouser", "Thumbs.db", "cat", "Cat", "CAT", "10", "9", "0", "train", ".hidden", "Ångström",
    "кот", "100 %", "nobody", "tested only",
)  # fmt: skip

SHAPES = [(6, 6), (4, 5), (2, 8), (6, 6, 3), (4, 5, 3), (1, 12, 3), (3, 7, 3)]


def imported(source: Path, to: Path, *options: object) -> dict:
    """The summary of an import that has to succeed."""
    done = dist_mnist("data", "import", source, "--to", to, "--json", *options)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return json.loads(done.stdout)


def refused(source: Path, to: Path, *options: object) -> str:
    """The sentence of an import that has to fail."""
    done = dist_mnist("data", "import", source, "--to", to, *options)
    assert (done.returncode, done.stdout, to.exists()) == (2, "", False), (done.returncode, done.stdout, done.stderr)
    return done.stderr


def named_set(write_set, *shape: int) -> Path:
    """A folder of 60 training and 23 test images of noise."""
    rng = np.random.default_rng(4)
    train, test = (rng.integers(0, 256, (count, *shape), np.uint8) for count in (60, 23))
    folder = write_set(
        train, np.arange(60, dtype=np.uint8) % 14, test, np.append(np.arange(22), 15).astype(np.uint8) % 16
    )
    write_class_names(folder, NAMES)
    return folder


def assert_same(found: Path, expected: Path) -> None:
    """All that `expected` holds is in `found`, byte for byte."""
    for path in expected.iterdir():
        assert (found / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", Format)
def test_import_of_an_export_gives_the_same_bytes_and_names(write_set, tmp_path, kind, shape):
    folder = named_set(write_set, *shape)
    done = dist_mnist("data", "export", folder, "--to", kind, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    options = ("--layout=hwc",) if shape[0] in (1, 3) and kind == Format.NPZ else ()
    found = imported(tmp_path / "out", tmp_path / "again", *options)
    assert_same(tmp_path / "again", folder)
    assert tuple(one["name"] for one in found["classes"]) == NAMES
    assert "2 of 16 classes have no training pictures: nobody, tested only; they are in classes.json" in found["notes"]


@pytest.mark.parametrize("form", ["folders", "npz", "npy", "csv", "parquet"])
def test_import_classes_json_beside_a_source_orders_the_names_in_it(tmp_path, form):
    """Labels that are names themselves, and folders that have them."""
    rng = np.random.default_rng(5)
    images = rng.integers(0, 256, (8, 5, 5), np.uint8)
    labels = np.array(["b", "c", "a", "b", "c", "a", "b", "c"])
    source = tmp_path / "source"
    source.mkdir()
    write_class_names(source, ["c", "a", "b"])
    if form == "npz":
        write_npz(source / "set.npz", (images, labels, images, labels))
    elif form == "npy":
        for split in ("train", "test"):
            np.save(source / f"x_{split}.npy", images)
            np.save(source / f"y_{split}.npy", labels)
    for split in ("train", "test"):
        if form == "csv":
            write_csv(source / f"{split}.csv", images, labels)
        elif form == "parquet":
            pytest.importorskip("pyarrow")
            from helpers.data import write_parquet

            write_parquet(source / f"{split}.parquet", images, labels)
        elif form == "folders":
            for index, (image, label) in enumerate(zip(images, labels, strict=True)):
                path = source / split / label / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encoded(image))
    imported(source, tmp_path / "out")
    assert read_class_names(tmp_path / "out") == ("c", "a", "b")
    assert open_idx(tmp_path / "out" / "train-labels-idx1-ubyte").tolist() == [2, 0, 1, 2, 0, 1, 2, 0]
    np.testing.assert_array_equal(open_idx(tmp_path / "out" / "train-images-idx3-ubyte"), images)


@pytest.mark.parametrize(("labels", "sentence"), [
    (["a", "dog"], "the label dog is not one of the 3 classes in classes.json"),
    (["0", "3"], "the label 3 is not one of the 3 classes in classes.json"),
    (["0", "b"], "labels are mixed, some class numbers such as 0, some class names such as 'b'"),
])  # fmt: skip
def test_import_labels_that_classes_json_does_not_name_are_refused(tmp_path, labels, sentence):
    for split in ("train", "test"):
        write_csv(tmp_path / "source" / f"{split}.csv", np.zeros((4, 5, 5), np.uint8), labels * 2)
    write_class_names(tmp_path / "source", ["c", "a", "b"])
    assert sentence in refused(tmp_path / "source", tmp_path / "out")


def test_import_folder_that_classes_json_does_not_name_is_refused(tmp_path):
    for name in ("0", "a"):
        path = tmp_path / "source" / name / "1.png"
        path.parent.mkdir(parents=True)
        path.write_bytes(encoded(np.zeros((4, 4), np.uint8)))
    write_class_names(tmp_path / "source", ["a", "b"])
    said = refused(tmp_path / "source", tmp_path / "out", "--test-fraction=0.5")
    assert "the sub-folder '0' is not a class in classes.json; add its name there, or remove" in said
    (tmp_path / "source" / "classes.json").write_text('["a", "a"]')
    assert "names must be unique" in refused(tmp_path / "source", tmp_path / "out", "--test-fraction=0.5")
