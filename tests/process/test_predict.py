"""`dist-mnist predict`: pictures, idx files, folders and standard input through the real command."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_mnist.data.idx import open_idx, write_idx
from helpers.runs import dist_mnist, trained_here

pytestmark = pytest.mark.xdist_group("predict")  # what all of these need is made once


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory) -> list[Path]:
    """Two runs, of 60 steps each."""
    folder = tmp_path_factory.mktemp("runs")
    return [trained_here(digits, folder / f"seed-{seed}", f"--seed={seed}", "--steps=60") for seed in (0, 1)]


@pytest.fixture(scope="module")
def images(digits) -> np.ndarray:
    """The test images of the small generated set."""
    return np.array(open_idx(digits / "t10k-images-idx3-ubyte"))


def probabilities(*words: object, stdin: bytes = b"") -> np.ndarray:
    done = dist_mnist("predict", "--json", *words, stdin=stdin)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return np.array([one["probabilities"] for one in json.loads(done.stdout)])


def test_predict_idx_file_equals_evaluation(trained, digits):
    path = digits / "t10k-images-idx3-ubyte"
    done = dist_mnist("predict", path, "--ckpt", trained[0], "--json")
    found = json.loads(done.stdout)
    assert [one["index"] for one in found] == list(range(200)) and {one["file"] for one in found} == {str(path)}
    labels = np.array(open_idx(digits / "t10k-labels-idx1-ubyte"))
    correct = int(sum(one["class"] == label for one, label in zip(found, labels, strict=True)))
    assert correct == json.loads((trained[0] / "result.json").read_text())["correct"]
    for one in found:
        assert sum(one["probabilities"]) == pytest.approx(1) and len(one["probabilities"]) == 10
        assert one["class"] == np.argmax(one["probabilities"])


def test_predict_same_images_by_any_way_are_equal(trained, digits, images, tmp_path):
    """The same images in all the ways in which they may come."""
    expected = probabilities(digits / "t10k-images-idx3-ubyte", "--ckpt", trained[0])[:3]
    folder = tmp_path / "my pictures" / "more"
    folder.mkdir(parents=True)
    for number in range(3):
        Image.fromarray(255 - images[number]).save(folder / f"{number} ü.PNG")
    (folder / "notes.txt").write_text("not a picture")
    (folder / "._0 ü.PNG").write_bytes(b"\0\5\x16\7 of macOS")
    packed = tmp_path / "some-idx3-ubyte.gz"
    write_idx(tmp_path / "some-idx3-ubyte", images[:3])
    packed.write_bytes(gzip.compress((tmp_path / "some-idx3-ubyte").read_bytes()))
    ways = {
        "pictures": probabilities(*sorted(folder.glob("[0-9]*.PNG")), "--ckpt", trained[0]),
        "folder": probabilities(folder.parent, "--ckpt", trained[0]),
        "packed": probabilities(packed, "--ckpt", trained[0]),
        "packed stdin": probabilities("-", "--ckpt", trained[0], stdin=packed.read_bytes()),
    }
    for way, found in ways.items():
        assert np.allclose(found, expected, atol=1e-6), way
    picture = sorted(folder.glob("[0-9]*.PNG"))[0].read_bytes()
    assert np.allclose(probabilities("-", "--ckpt", trained[0], stdin=picture), expected[:1], atol=1e-6)


def test_predict_several_networks_are_averaged(trained, digits):
    path = digits / "t10k-images-idx3-ubyte"
    one, other = (probabilities(path, "--ckpt", run) for run in trained)
    both = probabilities(path, "--ckpt", trained[0], "--ckpt", trained[1])
    assert np.allclose(both, (one + other) / 2, atol=1e-6)


def test_predict_several_views_equal_evaluation(trained, digits):
    path = digits / "t10k-images-idx3-ubyte"
    found = probabilities(path, "--ckpt", trained[0], "--views=5").argmax(1)
    expected = json.loads(dist_mnist("eval", "--ckpt", trained[0], "--views=5", "--json").stdout)["confusion_matrix"]
    labels = np.array(open_idx(digits / "t10k-labels-idx1-ubyte"))
    assert np.histogram2d(labels, found, bins=10, range=[[0, 10]] * 2)[0].tolist() == expected


def test_predict_idx_images_of_another_size_are_scaled(trained, images, tmp_path):
    large = np.stack([np.pad(image.repeat(2, 0).repeat(2, 1), ((0, 40), (9, 0))) for image in images[:5]])
    write_idx(tmp_path / "large", large)
    assert probabilities(tmp_path / "large", "--ckpt", trained[0]).shape == (5, 10)


def test_predict_folder_prints_lines_and_draws_inputs(trained, images, tmp_path):
    for number in range(12):
        Image.fromarray(images[number]).resize((90, 90)).save(tmp_path / f"{number:02}.jpg")
    done = dist_mnist("predict", tmp_path, "--ckpt", trained[0], "--seen", tmp_path / "seen.png")
    assert done.returncode == 0 and not done.stderr, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 12
    for number, line in enumerate(lines):
        name, _, classes = line.partition(": ")
        assert (
            name == str(tmp_path / f"{number:02}.jpg") and classes[0].isdigit() and classes[1:3] == " (" and "%" in line
        )
    assert Image.open(tmp_path / "seen.png").width > 10 * 28 * 4


def test_predict_unreadable_sources_leave_the_rest(trained, images, tmp_path):
    Image.fromarray(images[0]).save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:100])
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty").mkdir()
    write_idx(tmp_path / "labels", np.arange(5, dtype=np.uint8))
    write_idx(tmp_path / "floats", np.zeros((5, 20, 20), ">f4"))
    names = ("cut.png", "missing.png", "text.png", "empty", "labels", "good.png", "floats")
    done = dist_mnist("predict", *(tmp_path / name for name in names), "--ckpt", trained[0], "--json")
    assert done.returncode == 2 and len(json.loads(done.stdout)) == 1
    errors = done.stderr.splitlines()
    sentences = {
        "cut.png": "the picture is damaged", "missing.png": "cannot be read (No such file or directory)",
        "text.png": "the file is not a picture in a known format", "empty": "the folder has no pictures",
        "labels": "an idx file of images has 3 or 4 dimensions; this one has 1",
        "floats": "its images are float32 (1, 20, 20), but this network's input is (1, 28, 28)",
    }  # fmt: skip
    assert len(errors) == len(sentences)
    for name, sentence in sentences.items():
        assert any(line.startswith(f"error: {tmp_path / name}: {sentence}") for line in errors), (name, errors)


@pytest.mark.parametrize(("words", "sentence"), [
    (["--fit=digits"], "'digits' is not one of 'auto', 'digit', 'whole'."),
    (["--device=gpu"], "'gpu' is not one of 'auto', 'cuda', 'cpu'."),
    (["--seen=/no/such/folder/seen.png"], "error: /no/such/folder/seen.png: cannot be written"),
])  # fmt: skip
def test_predict_invalid_option_is_refused(trained, images, tmp_path, words, sentence):
    Image.fromarray(images[0]).save(tmp_path / "good.png")
    done = dist_mnist("predict", tmp_path / "good.png", "--ckpt", trained[0], *words)
    said = " ".join(done.stderr.replace("│", " ").split())
    assert done.returncode == 2 and sentence in said, done.stderr


def test_predict_networks_of_other_images_are_refused(trained, tmp_path, write_set):
    small = np.random.default_rng(0).integers(0, 256, (60, 12, 12), np.uint8)
    folder = write_set(small, np.arange(60, dtype=np.uint8) % 3)
    trained_here(folder, tmp_path / "other", "--steps=2")
    Image.fromarray(small[0]).save(tmp_path / "good.png")
    done = dist_mnist("predict", tmp_path / "good.png", "--ckpt", trained[0], "--ckpt", tmp_path / "other")
    assert done.returncode == 2 and "they cannot be used together" in done.stderr
    done = dist_mnist("eval", "--ckpt", trained[0], "--ckpt", tmp_path / "other")
    assert done.returncode == 2 and "they cannot be used together" in done.stderr


@pytest.mark.parametrize("pixels", ["standard", "unit"])
def test_predict_network_of_dark_on_light_sees_pictures_as_it_was_trained(trained, digits, images, tmp_path, pixels):
    """And pictures that are light on dark as their negative, as others do with those that are dark on light."""
    for path in digits.iterdir():
        stored = np.array(open_idx(path))
        (tmp_path / "light").mkdir(exist_ok=True)
        write_idx(tmp_path / "light" / path.name, 255 - stored if stored.ndim == 3 else stored)
    run = trained_here(tmp_path / "light", tmp_path / "run", "--steps=10", f"--pixels={pixels}")
    assert json.loads((run / "config.json").read_text())["data"]["light_ground"] is True
    assert "light_ground" not in json.loads((trained[0] / "config.json").read_text())["data"]
    expected = probabilities(tmp_path / "light" / "t10k-images-idx3-ubyte", "--ckpt", run)[:3]
    for number in range(3):
        Image.fromarray(255 - images[number]).save(tmp_path / f"light-{number}.png")
        Image.fromarray(images[number]).save(tmp_path / f"dark-{number}.png")
    for ground in ("light", "dark"):
        found = probabilities(*(tmp_path / f"{ground}-{number}.png" for number in range(3)), "--ckpt", run)
        np.testing.assert_allclose(found, expected, rtol=1e-4)
    done = dist_mnist("predict", tmp_path / "light-0.png", "--ckpt", run, "--ckpt", trained[0])
    assert done.returncode == 2 and "that are dark on light, " in done.stderr and "be used together" in done.stderr
