"""The way back from idx files: the same pixels and labels in pictures, npz and CSV, read by other libraries."""

import hashlib
import json
import os
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from dist_mnist.data.convert import export
from dist_mnist.data.convert.export import Format, export_dataset
from dist_mnist.data.idx import open_idx
from dist_mnist.data.sources.classes import class_folders
from dist_mnist.utils.errors import UserError

NAMES = ["T-shirt/top", ".hidden", "a", "A", "кот", "100 %", "..", "ends."]


@pytest.fixture(params=[(), (1,), (3,), (2,)], ids=lambda channels: f"channels{channels}")
def folder(request, write_set) -> Path:
    """23 training and 9 test images of 4x5 pixels in 8 classes; one class has no test image."""
    rng = np.random.default_rng(1)
    train, test = (rng.integers(0, 256, (count, 4, 5, *request.param), np.uint8) for count in (23, 9))
    folder = write_set(train, np.arange(23, dtype=np.uint8) % 8, test, np.arange(9, dtype=np.uint8) % 7)
    (folder / "classes.json").write_text(json.dumps(NAMES))
    return folder


def arrays(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images (N, H, W, C) and labels, by split."""
    found = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        [images] = folder.glob(f"{prefix}-images-*")
        images, labels = open_idx(images), open_idx(folder / f"{prefix}-labels-idx1-ubyte")
        found[split] = images if images.ndim == 4 else images[..., np.newaxis], labels
    return found


def is_picture(folder: Path) -> bool:
    return arrays(folder)["train"][0].shape[3] in (1, 3)


def test_export_pictures_lie_in_folders_of_their_classes_under_their_index(folder, tmp_path):
    if not is_picture(folder):
        with pytest.raises(UserError, match="pictures have 1 or 3 channels, got 2; export --to npz or csv"):
            export_dataset(folder, Format.PICTURES, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    export_dataset(folder, Format.PICTURES, tmp_path / "out")
    count = 0
    for split, (images, labels) in arrays(folder).items():
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = tmp_path / "out" / split / class_folders(NAMES)[label] / f"{index:0{len(str(len(images) - 1))}}.png"
            with Image.open(path) as picture:
                assert picture.mode == ("L" if image.shape[2] == 1 else "RGB")
                np.testing.assert_array_equal(np.asarray(picture).reshape(image.shape), image)
            count += 1
    assert len([*(tmp_path / "out").rglob("*.png")]) == count == 32
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"train", "test", "classes.json"}
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == NAMES
    assert len([*(tmp_path / "out" / "test").iterdir()]) == 7, "no folder for a class without images"


@pytest.mark.parametrize("rows_at_once", [1, 10, 10_000])
def test_export_npz_has_the_arrays_in_their_dtypes(folder, tmp_path, monkeypatch, rows_at_once):
    monkeypatch.setattr(export, "CHUNK", 40 * rows_at_once)
    export_dataset(folder, Format.NPZ, tmp_path / "out")
    with np.load(tmp_path / "out" / "dataset.npz", allow_pickle=False) as archive:
        assert archive.files == ["x_train", "y_train", "x_test", "y_test"]
        for split, (images, labels) in arrays(folder).items():
            found = archive[f"x_{split}"]
            np.testing.assert_array_equal(found, images if images.shape[3] > 1 else images[..., 0])
            np.testing.assert_array_equal(archive[f"y_{split}"], labels)
            assert (found.dtype, archive[f"y_{split}"].dtype) == (np.uint8, np.uint8)


def test_export_csv_has_a_row_for_each_image(folder, tmp_path):
    export_dataset(folder, Format.CSV, tmp_path / "out")
    for split, (images, labels) in arrays(folder).items():
        head, *lines = (tmp_path / "out" / f"{split}.csv").read_text().splitlines()
        _, height, width, channels = images.shape
        names = [f"pixel{i}" for i in range(images[0].size)]
        if channels > 1:
            names = [f"{y + 1}x{x + 1}x{c + 1}" for y, x, c in np.ndindex(height, width, channels)]
        elif height != width:
            names = [f"{y + 1}x{x + 1}" for y, x in np.ndindex(height, width)]
        assert head == ",".join(["label", *names])
        table = np.array([line.split(",") for line in lines], int)
        np.testing.assert_array_equal(table[:, 0], labels)
        np.testing.assert_array_equal(table[:, 1:], images.reshape(len(images), -1))


@pytest.mark.parametrize("dtype", [">i2", ">i4", ">f4", ">f8", "i1"])
def test_export_other_dtypes_fit_into_npz_and_csv_exactly_and_not_into_pictures(write_set, tmp_path, dtype):
    images = np.random.default_rng(2).normal(0, 30, (8, 3, 3)).astype(dtype)
    folder = write_set(images, np.arange(8, dtype=">i4") % 2)
    with pytest.raises(UserError, match="do not fit into 8-bit pictures; export --to npz or csv"):
        export_dataset(folder, Format.PICTURES, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export_dataset(folder, Format.NPZ, tmp_path / "npz")
    export_dataset(folder, Format.CSV, tmp_path / "csv")
    with np.load(tmp_path / "npz" / "dataset.npz") as archive:
        np.testing.assert_array_equal(archive["x_train"], images)
        assert archive["x_train"].dtype == np.dtype(dtype).newbyteorder("=")
        assert archive["y_test"].dtype == np.int32
    rows = [line.split(",")[1:] for line in (tmp_path / "csv" / "train.csv").read_text().splitlines()[1:]]
    np.testing.assert_array_equal(np.array(rows, float).astype(dtype).reshape(images.shape), images)


@pytest.mark.parametrize("kind", Format)
def test_export_equal_data_make_equal_bytes_and_progress_ends_with_all(small_set, tmp_path, kind):
    seen: list[tuple[int, int]] = []
    for name in ("one", "two"):
        export_dataset(small_set, kind, tmp_path / name, lambda done, total: seen.append((done, total)))
    one, two = (
        {
            path.relative_to(tmp_path / name): hashlib.sha256(path.read_bytes()).digest()
            for path in files(tmp_path / name)
        }
        for name in ("one", "two")
    )
    assert one == two and len(one) >= 2
    assert seen[-1] == (26, 26)


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("kind", Format)
def test_export_what_is_there_is_left_and_a_failure_leaves_nothing(small_set, tmp_path, kind, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(UserError, match="already exists and is not an empty folder; it was not changed"):
        export_dataset(small_set, kind, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]

    def full(done: int, total: int) -> None:
        raise OSError(28, os.strerror(28))

    before = {*tmp_path.iterdir()}
    with pytest.raises(UserError, match=r"new: cannot be written \(No space left on device\); free some space"):
        export_dataset(small_set, kind, tmp_path / "new", full)
    assert {*tmp_path.iterdir()} == before


def test_class_folders_are_file_names_that_give_the_names_back():
    names = [
        *NAMES,
        "é",
        "é".upper(),
        "C:\\x",
        "__MACOSX",
        " blank ",
        "%41",
        "con",
        "straße",
        "STRASSE",
        "あ",
        "desktop.ini",
    ]
    folders = class_folders(names)
    assert [unquote(folder) for folder in folders] == names
    assert len({folder.casefold() for folder in folders}) == len(names), "also where capitals are the same"
    assert not any(set(folder) & set('/\\:*?"<>|') or folder[0] in ". " or folder[-1] in ". " for folder in folders)
    assert folders[-1] == "desktop%2Eini", "which is ignored where folders are read"
    assert class_folders(list("0123456789")) == tuple("0123456789")
    assert class_folders(["A", "a", "cat", "Cat"]) == ("A", "%61", "cat", "%43%61%74")


def test_class_folders_name_is_too_long():
    with pytest.raises(
        UserError, match=r"the name of class 1, 'あ.*is too long for a folder name; shorten it in classes\.json"
    ):
        class_folders(["a", "あ" * 86])
