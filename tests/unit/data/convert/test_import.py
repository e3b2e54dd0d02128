"""`dist-mnist data import`: every kind of source becomes the idx files that it was made from."""

import gzip
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_mnist.data.dataset import IdxDataset
from dist_mnist.data.idx import open_idx, write_idx
from dist_mnist.data.sources.classes import read_class_names
from dist_mnist.data.sources.files import find_files
from dist_mnist.data.splits import open_data
from helpers.data import (
    Pictures,
    encoded,
    some_colours,
    some_digits,
    write_cifar,
    write_csv,
    write_npz,
    write_parquet,
    write_pictures,
    write_splits,
)
from helpers.runs import SMALL, dist_mnist, train_here

NAMES = [f"digit {number}" for number in range(10)]
NUMBERS = list("0123456789")


@pytest.fixture(scope="module")
def drawn() -> Pictures:
    return some_digits()


@pytest.fixture(scope="module")
def coloured() -> Pictures:
    return some_colours()


def imported(source: object, to: Path, *options: object) -> dict:
    """The summary of an import that has to succeed."""
    done = dist_mnist("data", "import", *([source] if not isinstance(source, list) else source), "--to", to, "--json",
                      *options)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return json.loads(done.stdout)


def refused(source: object, to: Path, *options: object) -> str:
    """The sentence of an import that has to fail, and leave nothing."""
    before = sorted(os.listdir(to.parent))
    done = dist_mnist("data", "import", source, "--to", to, *options)
    assert (done.returncode, done.stdout) == (2, ""), (done.returncode, done.stdout, done.stderr)
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1, done.stderr
    assert sorted(os.listdir(to.parent)) == before
    return done.stderr


def read_back(folder: Path) -> Pictures:
    """All images and labels of a folder, as the trainer reads them."""
    parts = []
    for split in ("train", "test"):
        dataset = IdxDataset.open(find_files(folder)[split])
        samples = dataset.__getitems__(np.arange(len(dataset)))
        parts += [samples.images[..., 0] if samples.images.shape[3] == 1 else samples.images, samples.labels]
    return Pictures(*parts)


def assert_equal(found: Pictures, expected: Pictures) -> None:
    for name, one, other in zip(Pictures._fields, found, expected, strict=True):
        assert np.array_equal(one, other), name


def as_npy(folder: Path, data: Pictures) -> Path:
    folder.mkdir()
    for name, array in zip(("x_train", "y_train", "x_test", "y_test"), data, strict=True):
        np.save(folder / f"{name}.npy", array)
    return folder


def as_kuzushiji(folder: Path, data: Pictures) -> Path:
    folder.mkdir()
    for name, array in zip(("train-imgs", "train-labels", "test-imgs", "test-labels"), data, strict=True):
        np.savez_compressed(folder / f"k49-{name}.npz", array)
    return folder


def as_csv(folder: Path, data: Pictures, **options: bool) -> Path:
    write_csv(folder / "some_train.csv", *data[:2], **options)
    write_csv(folder / "some_test.csv", *data[2:], **options)
    (folder / "sample_submission.csv").write_text("ImageId,Label\n1,0\n")
    return folder


def as_parquet(folder: Path, data: Pictures) -> Path:
    middle = len(data.train_images) // 2
    for number, part in enumerate((slice(None, middle), slice(middle, None))):
        path = folder / "data" / f"train-0000{number}-of-00002.parquet"
        write_parquet(path, data.train_images[part], data.train_labels[part], NAMES)
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", *data[2:], NAMES)
    return folder


def as_idx(folder: Path, data: Pictures) -> Path:
    folder.mkdir()
    for name, array in zip(("my-train-a", "my-train-b", "my-test-a", "my-test-b"), data, strict=True):
        write_idx(folder / name, array)
    packed = folder / "my-test-a"
    (folder / "my-test-a.gz").write_bytes(gzip.compress(packed.read_bytes()))
    packed.unlink()
    return folder


SOURCES: dict[str, tuple[Callable[[Path, Pictures], Path], list[str]]] = {
    "folders": (lambda to, data: write_splits(to, data, NAMES), NAMES),
    "csv": (as_csv, NUMBERS),
    "csv without header": (lambda to, data: as_csv(to, data, header=False), NUMBERS),
    "csv, label last": (lambda to, data: as_csv(to, data, label_last=True), NUMBERS),
    "csv without header, label last": (lambda to, data: as_csv(to, data, header=False, label_last=True), NUMBERS),
    "npz of Keras": (lambda to, data: write_npz(to.with_suffix(".npz"), data), NUMBERS),
    "npz of MedMNIST": (lambda to, data: write_npz(to.with_suffix(".npz"), data, "medmnist"), NUMBERS),
    "npz of Kuzushiji": (as_kuzushiji, NUMBERS),
    "npy": (as_npy, NUMBERS),
    "parquet": (as_parquet, NAMES),
    "idx": (as_idx, NUMBERS),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_import_of_any_kind_gives_the_images_and_labels_in_their_order(kind, drawn, tmp_path):
    make, names = SOURCES[kind]
    found = imported(make(tmp_path / "source", drawn), tmp_path / "out")
    assert_equal(read_back(tmp_path / "out"), drawn)
    assert list(read_class_names(tmp_path / "out")) == names == [one["name"] for one in found["classes"]]
    assert [one["train"] for one in found["classes"]] == np.bincount(drawn.train_labels).tolist()
    assert (found["training_images"], found["test_images"], found["image_shape"]) == (120, 40, [28, 28, 1])
    assert Image.open(found["contact_sheet"]).height > 10 * 28
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "classes.json", "contact-sheet.png", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte",
        "train-images-idx3-ubyte", "train-labels-idx1-ubyte",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["folders", "npz of Keras", "npy", "parquet", "idx"])
def test_import_of_colours_gives_the_same_images(kind, coloured, tmp_path):
    imported(SOURCES[kind][0](tmp_path / "source", coloured), tmp_path / "out")
    assert_equal(read_back(tmp_path / "out"), coloured)


@pytest.mark.parametrize("fine", [0, 10])
def test_import_of_cifars_binary_version_gives_names_and_colours(fine, coloured, tmp_path):
    imported(write_cifar(tmp_path / "source", coloured, NAMES, fine), tmp_path / "out")
    assert_equal(read_back(tmp_path / "out"), coloured)
    assert list(read_class_names(tmp_path / "out")) == NAMES
    if fine:
        imported(tmp_path / "source", tmp_path / "coarse", "--label-column=coarse")
        assert read_class_names(tmp_path / "coarse") == ("coarse 0", "coarse 1")
        assert np.array_equal(read_back(tmp_path / "coarse").train_labels, coloured.train_labels // 5)


@pytest.mark.parametrize("kind", ["folders", "csv", "npz of Keras", "parquet"])
def test_import_of_exported_idx_files_gives_the_same_bytes(kind, digits, tmp_path):
    source = read_back(digits)
    data = Pictures(source[0], source[1].astype(np.uint8), source[2], source[3].astype(np.uint8))
    imported(SOURCES[kind][0](tmp_path / "source", data), tmp_path / "out", "--jobs=1")
    for path in digits.glob("*-ubyte"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("kind", ["both forms", "truncated", "stale", "no idx file"])
def test_import_of_idx_files_takes_the_form_that_training_reads(kind, drawn, tmp_path):
    """Raw files beside their archives, as reading leaves them, also in torchvision's folders."""
    source = tmp_path / "data" / "MNIST" / "raw"
    source.mkdir(parents=True)
    for name, array in zip(("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"), drawn,
                           strict=True):  # fmt: skip
        path = source / f"{name}-ubyte"
        write_idx(path, array)
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    raw = source / "train-images-idx3-ubyte"
    if kind == "truncated":
        os.truncate(raw, 1000)
    elif kind == "stale":
        write_idx(raw, drawn.test_images)
    elif kind == "no idx file":
        raw.write_bytes(b"hello")
    before = {path: path.read_bytes() for path in source.iterdir()}
    found = imported(tmp_path / "data", tmp_path / "out")
    assert_equal(read_back(tmp_path / "out"), drawn)
    assert before == {path: path.read_bytes() for path in source.iterdir()}
    assert [f"{raw} is {kind}" in note for note in found["notes"]] == [True] * (kind in ("truncated", "stale"))
    assert "also give train-labels-idx1-ubyte next to it" in refused(raw.with_name(f"{raw.name}.gz"),
                                                                           tmp_path / "pair")  # fmt: skip


def test_import_of_images_alone_advises_no_partner_that_does_not_exist(tmp_path):
    np.savez(tmp_path / "mine.npz", x_train=np.ones((4, 5, 5), np.uint8))
    said = refused(tmp_path / "mine.npz", tmp_path / "out")
    assert "train images lack labels" in said and "also give" not in said


def test_import_of_colours_can_be_learnt_and_predicted(coloured, tmp_path):
    imported(write_cifar(tmp_path / "cifar", coloured, NAMES), tmp_path / "colours")
    done = train_here(tmp_path / "colours", tmp_path / "run", *SMALL, "--batch-size=20", "--steps=100", "--lr=0.01")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["accuracy"] > 0.3  # by chance 0.1
    picture = tmp_path / "picture.png"
    picture.write_bytes(encoded(coloured.test_images[3]))
    done = dist_mnist("predict", picture, "--ckpt", tmp_path / "run", "--json")
    assert done.returncode == 0 and len(json.loads(done.stdout)[0]["probabilities"]) == 10, done.stderr


def test_import_with_any_number_of_jobs_gives_the_same_bytes(drawn, tmp_path):
    """And with files enough for worker processes."""
    images = np.concatenate([drawn.train_images] * 4)
    labels = np.concatenate([drawn.train_labels] * 4)
    write_pictures(tmp_path / "source", images, labels)
    for jobs in (1, 2, 3):
        imported(tmp_path / "source", tmp_path / f"out-{jobs}", f"--jobs={jobs}", "--test-fraction=0.2", "--size=20x24")
    for path in (tmp_path / "out-1").iterdir():
        for jobs in (2, 3):
            assert (tmp_path / f"out-{jobs}" / path.name).read_bytes() == path.read_bytes()


def test_import_names_files_and_labels_by_value_not_by_letters(tmp_path):
    """Folders 2 and 10, and files 9.png and 10.png; the order of files is that of their names, whatever their class."""
    images = np.arange(40, dtype=np.uint8)[:, None, None].repeat(5, 1).repeat(5, 2)
    for index, image in enumerate(images):
        path = tmp_path / "source" / ("train", "test")[index >= 30] / str(10 - 8 * (index % 2)) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(image))
    imported(tmp_path / "source", tmp_path / "out")
    found = read_back(tmp_path / "out")
    assert read_class_names(tmp_path / "out") == ("2", "10")
    assert found.train_images[:, 0, 0].tolist() == list(range(30)) and found.train_labels[:4].tolist() == [1, 0, 1, 0]


def test_import_maps_numbers_with_gaps_and_keeps_them_as_names(drawn, tmp_path):
    """As in sign language, whose letter J is a movement; and labels as floats that are whole."""
    labels = drawn.train_labels.astype(int) * 3 - 5
    write_csv(tmp_path / "in" / "a_train.csv", drawn.train_images, [f"{label}.0" for label in labels])
    write_csv(tmp_path / "in" / "a_test.csv", drawn.test_images, drawn.test_labels.astype(int) * 3 - 5)
    imported(tmp_path / "in", tmp_path / "out")
    assert read_class_names(tmp_path / "out") == tuple(str(label) for label in sorted(set(labels.tolist())))
    assert_equal(read_back(tmp_path / "out"), drawn)


def test_import_with_more_than_256_classes_writes_labels_of_int(tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (900, 4, 4), np.uint8), np.arange(900) % 300
    np.savez(tmp_path / "many.npz", images=images, labels=labels)
    imported(tmp_path / "many.npz", tmp_path / "out", "--test-fraction=0.25")
    assert open_idx(tmp_path / "out" / "train-labels-idx1-int").dtype == np.dtype(">i4")
    data = open_data(tmp_path / "out")
    assert data.num_classes == 300 and len(read_class_names(tmp_path / "out")) == 300


def test_import_test_fraction_is_stratified_and_follows_the_seed(drawn, tmp_path):
    np.savez(tmp_path / "a.npz", X=drawn.train_images, y=drawn.train_labels)
    found = imported(tmp_path / "a.npz", tmp_path / "a", "--test-fraction=0.25")
    assert found["test_images"] == 30 and found["training_images"] == 90
    for one, count in zip(found["classes"], np.bincount(drawn.train_labels), strict=True):
        assert abs(one["test"] - count / 4) < 1 and one["test"] + one["train"] == count
    for seed in (0, 1):
        imported(tmp_path / "a.npz", tmp_path / f"b{seed}", "--test-fraction=0.25", f"--seed={seed}")
    first, again, other = (read_back(tmp_path / name).test_images for name in ("a", "b0", "b1"))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_import_draws_the_test_part_of_the_pictures_that_are_usable(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    write_pictures(tmp_path / "source", rng.integers(0, 256, (60, 6, 6), np.uint8), labels)
    for number in range(12):
        (tmp_path / "source" / str(number % 6 // 5) / f"{number:06}-bad.png").write_bytes(b"bad")
    found = imported(tmp_path / "source", tmp_path / "out", "--test-fraction=0.2", "--skip-bad", "--jobs=1")
    assert found["unusable_pictures"] == 12 and [one["test"] for one in found["classes"]] == [6, 6]
    assert "held out 12 training pictures as the test split, by seed 0" in found["notes"]
    for path in (tmp_path / "source").glob("*/*-bad.png"):
        path.unlink()
    imported(tmp_path / "source", tmp_path / "good", "--test-fraction=0.2", "--jobs=1")
    assert_equal(read_back(tmp_path / "out"), read_back(tmp_path / "good"))


def test_import_with_a_test_fraction_of_0_makes_a_training_part_alone(drawn, tmp_path):
    for name, array in zip(("images-idx3", "labels-idx1"), drawn, strict=False):
        (tmp_path / "alone").mkdir(exist_ok=True)
        write_idx(tmp_path / "alone" / f"train-{name}-ubyte", array)
    done = dist_mnist("data", "export", tmp_path / "alone", "--to", "pictures", "--output", tmp_path / "exported")
    assert done.returncode == 0, done.stderr
    assert "no test split" in refused(tmp_path / "exported", tmp_path / "out")
    found = imported(tmp_path / "exported", tmp_path / "out", "--test-fraction=0")
    assert found["test_images"] == 0 and any("there is no test split" in note for note in found["notes"])
    assert sorted(path.name for path in (tmp_path / "out").glob("*-ubyte")) == [
        "train-images-idx3-ubyte", "train-labels-idx1-ubyte",
    ]  # fmt: skip
    for path in (tmp_path / "out").glob("*-ubyte"):
        assert path.read_bytes() == (tmp_path / "alone" / path.name).read_bytes()


def test_import_classes_chooses_and_orders_them(drawn, tmp_path):
    found = imported(write_npz(tmp_path / "a.npz", drawn), tmp_path / "out", "--classes=8,3")
    chosen = np.isin(drawn.train_labels, (3, 8))
    assert read_class_names(tmp_path / "out") == ("8", "3")
    back = read_back(tmp_path / "out")
    assert np.array_equal(back.train_images, drawn.train_images[chosen])
    assert np.array_equal(back.train_labels, (drawn.train_labels[chosen] == 3).astype(int))
    assert any("classes that --classes does not name" in note for note in found["notes"])


def test_import_limit_takes_some_of_every_class(drawn, tmp_path):
    found = imported(write_npz(tmp_path / "a.npz", drawn), tmp_path / "out", "--limit=20")
    assert (found["training_images"], found["test_images"]) == (20, 20)
    assert all(one["train"] and one["test"] for one in found["classes"])


@pytest.mark.parametrize("has_test", [True, False])
def test_import_says_what_becomes_of_a_validation_part(has_test, drawn, tmp_path):
    write_splits(tmp_path / "source", drawn)
    shutil.copytree(tmp_path / "source" / "test", tmp_path / "source" / "val")
    if not has_test:
        shutil.rmtree(tmp_path / "source" / "test")
    found = imported(tmp_path / "source", tmp_path / "out")
    said = "skipped the validation split (40 pictures)" if has_test else "(40 pictures) as the test split"
    assert any(said in note for note in found["notes"]) and (found["training_images"], found["test_images"]) == (
        120,
        40,
    )
    options = ["--merge-validation", *([] if has_test else ["--test-fraction=0.1"])]
    found = imported(tmp_path / "source", tmp_path / "merged", *options)
    assert found["training_images"] + (0 if has_test else found["test_images"]) == 160
    assert any("to the training split" in note for note in found["notes"])


@pytest.mark.parametrize("parts", [("train", "test"), ("training_set", "test_set")])
def test_import_leaves_out_what_lies_beside_train_and_test_folders_and_says_so(parts, drawn, tmp_path):
    write_splits(tmp_path / "source", drawn)
    for name, other in zip(("train", "test"), parts, strict=True):
        (tmp_path / "source" / name).rename(tmp_path / "source" / other)
    (tmp_path / "source" / "single_prediction").mkdir()
    (tmp_path / "source" / "single_prediction" / "1.png").write_bytes(encoded(drawn.train_images[0]))
    found = imported(tmp_path / "source", tmp_path / "out")
    assert_equal(read_back(tmp_path / "out"), drawn)
    assert f"skipped the folder 'single_prediction' next to {parts[1]}/, {parts[0]}/" in found["notes"]


def test_import_takes_classes_that_are_called_like_splits(drawn, tmp_path):
    write_pictures(tmp_path / "source", drawn.train_images, [("train", "test tube", "bus")[n % 3] for n in range(120)])
    imported(tmp_path / "source", tmp_path / "out", "--test-fraction=0.2")
    assert read_class_names(tmp_path / "out") == ("bus", "test tube", "train")


def test_import_into_its_source_is_refused(drawn, tmp_path):
    write_splits(tmp_path / "source", drawn)
    assert "is inside the source" in refused(tmp_path / "source", tmp_path / "source" / "out")
    assert "is inside the so" in refused(tmp_path / "source", tmp_path / "source" / ".." / "source" / "train" / "new")


def test_import_counts_duplicates_blanks_and_unusable_files(drawn, tmp_path):
    images, labels = drawn.train_images.copy(), drawn.train_labels
    images[1] = images[0]
    images[2:5] = 7
    write_pictures(tmp_path / "source" / "train", images, labels)
    write_pictures(tmp_path / "source" / "test", np.concatenate([images[:1], drawn.test_images[1:]]), drawn.test_labels)
    for name in ("a note.txt", "Thumbs.JSON"):
        (tmp_path / "source" / "train" / "3" / name).write_text("hello")
    bad = tmp_path / "source" / "train" / "3" / "a note"
    bad.write_text("hello")
    cut = tmp_path / "source" / "train" / "4" / "cut.png"
    cut.write_bytes(encoded(images[0])[:150])
    moving = tmp_path / "source" / "test" / "4" / "moving.gif"
    frames = [Image.fromarray(image) for image in images[10:13]]
    frames[0].save(moving, save_all=True, append_images=frames[1:])
    (tmp_path / "source" / "train" / "4" / ".DS_Store").write_bytes(b"x")
    sentence = refused(tmp_path / "source", tmp_path / "out")
    assert "3 of 163 pictures are unusable (--skip-bad skips them)" in sentence
    for path, why in ((bad, "not a picture in a known format"), (cut, "damaged"), (moving, "several frames")):
        assert f"{path}: " in sentence and why in sentence
    found = imported(tmp_path / "source", tmp_path / "out", "--skip-bad")
    same = [*labels[:2], drawn.test_labels[0]], labels[2:5]
    expected = {
        "unusable_pictures": 3, "duplicates_in_training": 3, "duplicates_in_test": 0, "test_images_in_training": 1,
        "blank_images": 3, "duplicates_of_other_classes": 3 * sum(len(set(some)) > 1 for some in same),
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected and len(found["unusable"]) == 3
    assert (found["training_images"], found["test_images"]) == (120, 40)
    assert "skipped 2 text files in class folders" in found["notes"]
    page = dist_mnist("data", "import", tmp_path / "source", "--to", tmp_path / "again", "--skip-bad").stdout
    for line in ("1 test images are also among the training images", "3 images are blank", "contact sheet: "):
        assert line in page


def modes() -> dict[str, tuple[Image.Image, dict, np.ndarray]]:
    """Pictures in many modes, how to save each, and what it shows: (H, W) or (H, W, 3)."""
    gray = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    colour = np.stack([gray, 255 - gray, gray // 2], -1)
    clear = np.dstack([colour, np.where(gray > 100, 255, 0).astype(np.uint8)])
    on_white = np.where(clear[..., 3:] > 0, colour, 255).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "gray": (Image.fromarray(gray), {}, gray),
        "16 bits": (Image.fromarray(gray.astype(np.uint16) * 257), {}, gray),
        "1 bit": (Image.fromarray(gray > 100), {}, np.where(gray > 100, 255, 0)),
        "gray with alpha": (
            Image.merge("LA", [Image.fromarray(gray), Image.fromarray(clear[..., 3])]), {},
            np.where(clear[..., 3] > 0, gray, 255),
        ),
        "palette of grays": (Image.fromarray(gray).convert("P"), {}, gray),
        "colours": (Image.fromarray(colour), {}, colour),
        "palette": (Image.fromarray(colour).quantize(256), {}, None),
        "alpha": (Image.fromarray(clear), {}, on_white),
        "CMYK": (Image.fromarray(colour).convert("CMYK"), {"format": "TIFF"}, colour),
        "turned by EXIF": (Image.fromarray(np.rot90(colour)), {"exif": exif}, colour),
        "gray as colours": (Image.fromarray(np.dstack([gray] * 3)), {}, np.dstack([gray] * 3)),
    }  # fmt: skip


@pytest.mark.parametrize("mode", modes())
def test_import_any_mode_shows_what_the_picture_shows(mode, tmp_path):
    picture, options, expected = modes()[mode]
    for name in ("train/a", "train/b", "test/a", "test/b"):
        path = tmp_path / "source" / name / "picture.png"
        path.parent.mkdir(parents=True)
        picture.save(path, **{"format": "PNG", **options})
    imported(tmp_path / "source", tmp_path / "out")
    [found, _] = read_back(tmp_path / "out").train_images
    expected = np.asarray(picture.convert("RGB")) if expected is None else expected
    assert found.shape == expected.shape and np.abs(found.astype(int) - expected).max() <= 1


def test_import_size_gray_colour_and_invert_make_pictures_one(tmp_path):
    wide = np.zeros((10, 20, 3), np.uint8)
    wide[:, 10:] = (255, 0, 0)
    for name in ("train/a/1.png", "train/b/1.png", "test/a/1.png", "test/b/1.png"):
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(wide if name[-7] == "a" else wide[:, :, 0]))
    sentence = refused(tmp_path / "source", tmp_path / "out")
    assert "some pictures are gray, some RGB (2 gray, such as" in sentence and "add --gray or --color" in sentence
    imported(tmp_path / "source", tmp_path / "out", "--gray", "--size=20x20", "--invert")
    found = read_back(tmp_path / "out").train_images
    assert found.shape == (2, 20, 20) and (found[0, 10, 4], found[0, 10, 15], found[1, 10, 15]) == (255, 179, 0)
    imported(tmp_path / "source", tmp_path / "coloured", "--color")
    found = read_back(tmp_path / "coloured").train_images
    assert found.shape == (2, 10, 20, 3) and found[0, 0, 15].tolist() == [255, 0, 0] and (found[1, 0, 15] == 255).all()
    (tmp_path / "source/train/a/2.png").write_bytes(encoded(wide[:, :15]))
    sentence = refused(tmp_path / "source", tmp_path / "sizes", "--gray")
    assert "pictures have different sizes (10x20: 4, such as" in sentence and "add --size HxW" in sentence
    page = dist_mnist("data", "import", tmp_path / "source", "--to", tmp_path / "page", "--gray", "--size=9x9").stdout
    assert "sizes of the pictures: 10x20 (4), 10x15 (1)" in page


@pytest.mark.parametrize(("values", "expected"), [
    (lambda pixels: pixels / np.float32(255), lambda pixels: pixels),
    (lambda pixels: pixels.astype(np.float64), lambda pixels: pixels),
    (lambda pixels: pixels.astype(np.int64), lambda pixels: pixels),
    (lambda pixels: pixels.astype(">u2") * 257, lambda pixels: pixels),
    (lambda pixels: pixels > 99, lambda pixels: np.where(pixels > 99, 255, 0)),
    (lambda pixels: (pixels > 99).astype(np.uint8), lambda pixels: np.where(pixels > 99, 255, 0)),
    (lambda pixels: pixels / 255 * 1.0001, lambda pixels: pixels),
    (lambda pixels: pixels.reshape(len(pixels), -1), lambda pixels: pixels),
    (lambda pixels: pixels[..., None], lambda pixels: pixels),
    (lambda pixels: pixels[:, None], lambda pixels: pixels),
    (np.asfortranarray, lambda pixels: pixels),
], ids=["0 to 1", "float", "int", "16 bits", "bool", "0 or 1", "about 1", "flat", "NHW1", "N1HW",
        "Fortran"])  # fmt: skip
def test_import_arrays_of_any_dtype_and_shape(values, expected, drawn, tmp_path):
    data = Pictures(values(drawn.train_images), drawn.train_labels, values(drawn.test_images), drawn.test_labels)
    imported(write_npz(tmp_path / "a.npz", data), tmp_path / "out")
    assert np.array_equal(read_back(tmp_path / "out").train_images, expected(drawn.train_images))


def test_import_colours_first_are_recognised_or_asked_for(coloured, tmp_path):
    first = Pictures(
        coloured[0].transpose(0, 3, 1, 2), coloured[1], coloured[2].transpose(0, 3, 1, 2), coloured[3]
    )  # fmt: skip
    imported(write_npz(tmp_path / "a.npz", first), tmp_path / "out")
    assert_equal(read_back(tmp_path / "out"), coloured)
    flat = Pictures(first[0].reshape(60, -1), first[1], first[2].reshape(20, -1), first[3])
    sentence = refused(write_npz(tmp_path / "flat.npz", flat), tmp_path / "flat")
    assert "3072 values per picture are 32 x 32 RGB pixels; add --layout chw" in sentence
    imported(tmp_path / "flat.npz", tmp_path / "flat", "--layout=chw")
    assert_equal(read_back(tmp_path / "flat"), coloured)


def test_import_one_hot_labels_and_flat_pictures_that_are_no_squares(tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (30, 6, 4), np.uint8), np.arange(30) % 3
    np.save(tmp_path / "a.npy", images.reshape(30, -1))
    np.save(tmp_path / "images.npy", images.reshape(30, -1))
    np.save(tmp_path / "labels.npy", np.eye(3)[labels])
    (tmp_path / "a.npy").unlink()
    pair = [tmp_path / "images.npy", tmp_path / "labels.npy"]
    imported(pair, tmp_path / "out", "--size=6x4", "--test-fraction=0.2")
    found = read_back(tmp_path / "out")
    assert found.train_images.shape == (24, 6, 4) and np.isin(
        found.train_images[0].tobytes(), [i.tobytes() for i in images]
    )


def with_images(data: Pictures, change: Callable[[np.ndarray], np.ndarray]) -> Pictures:
    return Pictures(change(data.train_images), data.train_labels, change(data.test_images), data.test_labels)


def as_16_bits(folder: Path, data: Pictures) -> Path:
    write_pictures(folder / "train", data.train_images.astype(np.uint16), data.train_labels)
    return write_pictures(folder / "test", data.test_images.astype(np.uint16), data.test_labels).parent


@pytest.mark.parametrize(("kind", "most"), [
    ("folders", 16), ("folders", 4095), ("csv", 16), ("npz of Keras", 16), ("npz of Keras", 4095), ("parquet", 16),
])  # fmt: skip
def test_import_pixel_max_is_white_in_any_source(kind, most, drawn, tmp_path):
    """As in scikit-learn's digits, up to 16, and in pictures of 12 bits."""
    dim = with_images(drawn, lambda images: np.rint(images / 255 * most).astype(np.uint16 if most > 255 else np.uint8))
    dim.train_images[0, 0, 0] = most
    source = as_16_bits(tmp_path / "source", dim) if (kind, most) == ("folders", 4095) else SOURCES[kind][0](
        tmp_path / "source", dim)  # fmt: skip
    found = imported(source, tmp_path / "out", f"--pixel-max={most}")
    expected = with_images(dim, lambda images: np.rint(images * (255 / most)).astype(np.uint8))
    assert_equal(read_back(tmp_path / "out"), expected)
    assert not any("brightest" in note for note in found["notes"])
    assert f"expected 0 to {most - 1}" in refused(source, tmp_path / "more", f"--pixel-max={most - 1}")
    if kind == "npz of Keras":  # without it they are taken as they are, and the remedy is named
        found = imported(source, tmp_path / "dim")
        said = "up to 4095, to 8 bits" if most > 255 else "is 16 of 255; --pixel-max 16 makes the source's value 16"
        assert any(said in note for note in found["notes"])
        assert_equal(read_back(tmp_path / "dim"), with_images(dim, lambda images: images // (257 if most > 255 else 1)))


@pytest.mark.parametrize("kind", ["csv", "npz of Keras"])
def test_import_of_parts_on_different_scales_is_refused(kind, drawn, tmp_path):
    data = Pictures(drawn.train_images, drawn.train_labels, drawn.test_images / 255, drawn.test_labels)
    sentence = refused(SOURCES[kind][0](tmp_path / "source", data), tmp_path / "out")
    assert "its pixels have a maximum of 1, but pixels of" in sentence and "bring both to the same scale" in sentence


def test_import_size_scales_flat_pictures_that_are_squares_and_says_so(drawn, tmp_path):
    source = as_csv(tmp_path / "source", drawn)
    found = imported(source, tmp_path / "out", "--size=14x56")
    assert "the label column is 0 (from 0)" in found["notes"]
    assert "read 784 values per picture as 28 x 28 pixels" in found["notes"]
    assert "scaled pictures of other sizes to fit 14 x 56" in found["notes"]
    expected = np.asarray(Image.fromarray(drawn.train_images[0]).resize((14, 14), Image.Resampling.BICUBIC))
    assert np.array_equal(read_back(tmp_path / "out").train_images[0][:, 21:35], expected)


def test_import_parquet_of_names_without_metadata(drawn, tmp_path):
    names = [("one", "Two", "three")[label % 3] for label in drawn.train_labels]
    write_parquet(tmp_path / "all.parquet", drawn.train_images, names)
    found = imported(tmp_path / "all.parquet", tmp_path / "out", "--test-fraction=0.1")
    assert "the label column is label" in found["notes"]
    assert read_class_names(tmp_path / "out") == ("Two", "one", "three")


def test_import_csv_with_quotes_names_and_other_delimiters(drawn, tmp_path):
    lines = ['"id";"pixels 0";"kind, of";"class"']
    lines += [f'"{number}";{number % 200};{number % 7};"a; {number % 2}"' for number in range(40)]
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n\r\n")
    imported(tmp_path / "a.csv", tmp_path / "out", "--size=1x2", "--test-fraction=0.5")
    assert read_class_names(tmp_path / "out") == ("a; 0", "a; 1")
    found = read_back(tmp_path / "out")
    pairs = found.train_images.reshape(-1, 2).tolist() + found.test_images.reshape(-1, 2).tolist()
    assert sorted(pairs) == sorted([number % 200, number % 7] for number in range(40))


def test_import_into_a_folder_with_something_in_it_is_refused(drawn, tmp_path):
    source = write_npz(tmp_path / "a.npz", drawn)
    (tmp_path / "out").mkdir()
    imported(source, tmp_path / "out")  # an empty one is taken
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert "already exists and is not an empty folder" in refused(source, tmp_path / "out")
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    done = dist_mnist("data", "import", tmp_path / "missing", "--to", tmp_path / "some" / "other" / "place")
    assert done.returncode == 2 and not (tmp_path / "some").exists()


@pytest.mark.parametrize("kind", ["folders", "npz"])
def test_import_names_that_are_whole_numbers_with_a_point(kind, drawn, tmp_path):
    names = [f"{label}.0" for label in drawn.train_labels]
    if kind == "folders":
        write_pictures(tmp_path / "source", drawn.train_images, names)
    else:
        np.savez(tmp_path / "source.npz", x=drawn.train_images, y=names)
    source = tmp_path / ("source" if kind == "folders" else "source.npz")
    imported(source, tmp_path / "out", "--test-fraction=0.2")
    assert read_class_names(tmp_path / "out") == tuple(f"{number}.0" for number in range(10))


def exif(*entries: bytes) -> bytes:
    """EXIF data of some tags."""
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)


TURNED = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)


@pytest.mark.parametrize(("data", "turns"), [
    (exif(TURNED), True),
    (exif(TURNED, struct.pack("<HHII", 0x0131, 5, 1, 7)), True),  # the name of a program, as a fraction
    (exif(struct.pack("<HHI4s", 0x0112, 2, 4, b"abc")), False),
    (exif(struct.pack("<HHIHH", 0x0112, 3, 1, 99, 0)), False),
    (b"Exif\0\0this is no EXIF", False),
    (b"nor is this", False),
], ids=["turned", "an odd tag", "words for a number", "a number beyond", "none", "nothing like it"])  # fmt: skip
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_import_of_pictures_with_damaged_exif_data_shows_them(form, data, turns, drawn, tmp_path):
    for name, image in zip(("train/a", "train/b", "test/a", "test/b"), drawn.train_images, strict=False):
        path = tmp_path / "source" / name / "1"
        path.parent.mkdir(parents=True)
        plain, content = encoded(image, form), encoded(image, form, exif=data)
        path.write_bytes(content)
        (tmp_path / "plain" / name).mkdir(parents=True)
        (tmp_path / "plain" / name / "1").write_bytes(plain)
    imported(tmp_path / "source", tmp_path / "out")
    imported(tmp_path / "plain", tmp_path / "expected")
    found, expected = (read_back(tmp_path / name).train_images for name in ("out", "expected"))
    assert np.array_equal(found, np.rot90(expected, -1, (1, 2)) if turns else expected)


@pytest.mark.parametrize(("head", "column"), [
    ("", "0"), ("numbers", "0"), ("numbers", "first"), ("\n \nlabel", None), ("index", "0"),
])  # fmt: skip
def test_import_csv_finds_the_header_and_a_column_by_its_number(head, column, drawn, tmp_path):
    """Also where a row without header has that number among its pixels; pandas numbers columns, and rows, too."""
    for split, (images, labels) in {"train": drawn[:2], "test": drawn[2:]}.items():
        rows = [[label, *image.reshape(-1)] for image, label in zip(images, labels, strict=True)]
        if head == "index":
            rows = [[number, *row] for number, row in enumerate(rows)]
        lines = [",".join(map(str, row)) for row in rows]
        numbers = ",".join(map(str, range(785)))
        first = {"numbers": numbers, "index": f",{numbers}", "": None}.get(head, f"{head},{numbers[2:]}")
        path = tmp_path / "source" / f"{split}.csv"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(lines if first is None else [first, *lines]))
    imported(tmp_path / "source", tmp_path / "out", *([f"--label-column={column}"] if column else []))
    assert_equal(read_back(tmp_path / "out"), drawn)


@pytest.mark.parametrize("kind", ["csv", "idx"])
def test_import_tells_gzip_by_the_bytes_not_by_the_name(kind, drawn, tmp_path):
    source = as_csv(tmp_path / "s", drawn) if kind == "csv" else as_idx(tmp_path / "s", drawn)
    for path in [path for path in source.iterdir() if "submission" not in path.name]:
        content = path.read_bytes()
        if path.suffix == ".gz":
            path.rename(path.with_suffix(""))  # packed, without the suffix
        elif "train" in path.name:
            path.unlink()
            path.with_name(f"{path.name}.gz").write_bytes(content)  # not packed, with it
        else:
            path.write_bytes(gzip.compress(content))
    imported(source, tmp_path / "out")
    assert_equal(read_back(tmp_path / "out"), drawn)


def test_import_npy_of_a_later_version(drawn, tmp_path):
    files = {tmp_path / "x.npy": drawn.train_images, tmp_path / "y.npy": drawn.train_labels}
    for path, array in files.items():
        with open(path, "wb") as file:
            np.lib.format.write_array(file, array, version=(3, 0), allow_pickle=False)
    found = imported([*files], tmp_path / "out", "--test-fraction=0.25")
    assert found["training_images"] == 90


def test_import_parquet_leaves_out_what_is_no_shard_and_finds_columns_by_their_whole_names(drawn, tmp_path):
    """A pipe, hidden files, a folder; and a column `a.b` beside the field `b` of a column `a`."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    images = [encoded(image) for image in drawn.train_images]
    columns = {"set": [{"label": 5}] * 120, "image": images, "set.label": drawn.train_labels}
    (tmp_path / "source" / "data" / "a.parquet").mkdir(parents=True)
    (tmp_path / "source" / ".cache").mkdir()
    for name in ("data/._train-0.parquet", ".cache/train-0.parquet"):
        (tmp_path / "source" / name).write_bytes(b"hello")
    os.mkfifo(tmp_path / "source" / "data" / "train-1.parquet")
    parquet.write_table(pa.table(columns), tmp_path / "source" / "data" / "train-0.parquet")
    found = imported(tmp_path / "source", tmp_path / "out", "--test-fraction=0.25", "--label-column=set.label")
    assert [one["train"] + one["test"] for one in found["classes"]] == np.bincount(drawn.train_labels).tolist()
