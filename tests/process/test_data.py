"""The commands for data sets, from the server of a published set to predictions: `dist-mnist data ...`."""

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dist_mnist as dist_mnist_api
from dist_mnist.data.sources.catalog import CATALOG
from helpers import HANGS_AFTER_S
from helpers.published import mirror_of
from helpers.runs import dist_mnist, trained_here


def test_get_qmnist_train_and_evaluate_the_images_beyond_mnist_s(tmp_path, monkeypatch):
    with mirror_of("qmnist", monkeypatch) as (mirror, _):
        got = dist_mnist("data", "get", "qmnist", folder=tmp_path)
        again = dist_mnist("data", "get", "qmnist", folder=tmp_path)
    assert (got.returncode, got.stdout) == (again.returncode, again.stdout) == (0, "data/qmnist\n"), got.stderr
    assert "--split test50k" in got.stderr and mirror.requests.total() == 4
    run = trained_here(tmp_path / "data" / "qmnist", tmp_path / "run", "--epochs=2")
    for split, images in (("test", 10_000), ("test50k", 50)):
        done = dist_mnist("eval", f"--ckpt={run}", f"--split={split}", "--device=cpu", "--json")
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert (result["split"], result["images"]) == (split, images)
        assert np.sum(result["confusion_matrix"]) == images


def test_eval_test50k_of_another_set_says_which_has_it(finished_runs):
    done = dist_mnist("eval", f"--ckpt={finished_runs[0]}", "--split=test50k", "--device=cpu")
    assert (done.returncode, done.stdout) == (2, "")
    assert "has no test50k split" in done.stderr and "data get qmnist" in done.stderr


def test_get_damaged_folder_is_mended_and_the_command_says_so(tmp_path, monkeypatch):
    """What was: exit code 0, and nothing done."""
    with mirror_of("mnist", monkeypatch):
        assert dist_mnist("data", "get", "mnist", folder=tmp_path).returncode == 0
        path = tmp_path / "data" / "mnist" / "train-images-idx3-ubyte.gz"
        whole = path.read_bytes()
        path.write_bytes(whole[:100])
        done = dist_mnist("data", "get", "mnist", folder=tmp_path)
    assert (done.returncode, done.stdout) == (0, "data/mnist\n") and path.read_bytes() == whole
    assert done.stderr.startswith("warning: data/mnist/train-images-idx3-ubyte.gz: ")


def test_train_dataset_of_another_form_is_downloaded_and_converted_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = {"batch_size": 50, "conv_channels": (4, 4), "dense_units": (16,), "device": "cpu", "tensorboard": False}
    with mirror_of("bloodmnist", monkeypatch) as (mirror, _):
        run = dist_mnist_api.train(dataset="bloodmnist", run_dir=Path("run"), steps=4, threads=1, **small)
    assert run.result.images == 40 and len(run.result.confusion_matrix) == 8 and mirror.requests.total() == 1


@pytest.mark.parametrize("command", [("data", "get"), ("train", "--dataset")])
def test_names_of_known_sets_are_completed(command):
    """As the shells' completion scripts ask."""
    words = " ".join(("dist-mnist", *command, "emn"))
    environment = os.environ | {
        "_DIST_MNIST_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1),
    }  # fmt: skip
    code = "import sys; sys.argv[0] = 'dist-mnist'; from dist_mnist.cli.app import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=HANGS_AFTER_S
    )
    assert done.stdout.split() == [name for name in CATALOG if name.startswith("emn")], done.stderr


GET = """
import json, sys
from dataclasses import replace
from dist_mnist.cli.app import main
from dist_mnist.data.sources.catalog import CATALOG
from dist_mnist.data.sources.known.records import KnownFile
name, mirror, files, folder = sys.argv[1:]
files = tuple(KnownFile(**file) for file in json.loads(files))
CATALOG[name] = replace(CATALOG[name], mirrors=(mirror,), files=files)
sys.argv[1:] = ["data", "get", name, "--data-dir", folder]
main()
"""


def test_get_killed_in_the_middle_leaves_no_idx_file_and_the_same_command_goes_through(tmp_path, monkeypatch):
    with mirror_of("kuzushiji-49", monkeypatch) as (mirror, stand_in):
        asked, gate = threading.Event(), threading.Event()

        class Held(dict):  # the last file is not served before the gate is opened
            def get(self, name: str) -> bytes | None:
                if name == "k49-test-labels.npz" and not gate.is_set():
                    asked.set()
                    gate.wait(HANGS_AFTER_S)
                return stand_in.files.get(name)

        mirror.files = Held()
        files = json.dumps([asdict(file) for file in CATALOG["kuzushiji-49"].files])
        command = [sys.executable, "-c", GET, "kuzushiji-49", mirror.url, files, str(tmp_path / "set")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            try:
                assert asked.wait(HANGS_AFTER_S)
            finally:
                process.send_signal(signal.SIGKILL)
        gate.set()
        assert not [path for path in (tmp_path / "set").iterdir() if not path.name.startswith(".")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS_AFTER_S)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'set'}\n"), done.stderr
    assert mirror.requests["k49-train-imgs.npz"] == 1, "what was there whole is used"
    assert {path.name for path in (tmp_path / "set").iterdir() if path.is_dir()} == set()


@pytest.fixture
def odd_set(write_set) -> Path:
    """Classes with names; a training image that is there three times, once under another label; blanks; a leak."""
    rng = np.random.default_rng(3)
    train, test = rng.integers(0, 256, (12, 4, 5, 3), np.uint8), rng.integers(0, 256, (7, 4, 5, 3), np.uint8)
    train[3] = train[7] = train[0]
    train[5], train[6] = 9, [[[1, 2, 3]] * 5] * 4  # blank; and of one colour, which is not one value
    test[1] = test[4] = train[9]
    test[2] = 0
    labels = np.arange(12, dtype=np.uint8) % 3  # of 0, 3 and 7: 0, 0 and 1
    folder = write_set(train, labels, test, np.arange(7, dtype=np.uint8) % 3)
    (folder / "classes.json").write_text(json.dumps(["うし", "[red]cat", "T-shirt/top"]))
    return folder


def test_info_counts_duplicates_leaks_and_blanks_and_names_classes(odd_set, tmp_path):
    done = dist_mnist("data", "info", odd_set, "--seen", tmp_path / "seen.png", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["class names"] == ["うし", "[red]cat", "T-shirt/top"]
    assert facts["images per class (training)"] == [4, 4, 4] and facts["images per class (test)"] == [3, 2, 2]
    counts = {name: count for name, count in facts.items() if "duplicates" in name or "blank" in name or "too" in name}
    assert counts == {
        "duplicates (training)": 2,
        "duplicates (test)": 1,
        "test images that are in training, too": 2,
        "images that have another label, too": 3 + 3,  # train[9] has label 0, test[1] and test[4] have 1
        "blank images (training)": 1,
        "blank images (test)": 1,
    }
    with Image.open(tmp_path / "seen.png") as sheet:
        assert sheet.format == "PNG" and sheet.height == 6 + 3 * (48 + 6)
    table = dist_mnist("data", "info", odd_set)
    assert table.returncode == 0 and "[red]cat" in table.stdout and "blank images (test)" in table.stdout


def test_info_large_images_are_hashed_in_small_pieces(write_set):
    """As many as a megabyte holds: one, and then some."""
    images = np.zeros((5, 700, 800, 3), np.uint8)
    images[:, 0, 0, 0] = [1, 2, 1, 3, 0]
    folder = write_set(images, np.array([0, 1, 0, 1, 1], np.uint8))
    facts = json.loads(dist_mnist("data", "info", folder, "--json").stdout)
    assert (facts["duplicates (training)"], facts["blank images (training)"]) == (1, 1)
    assert facts["test images that are in training, too"] == 5


def test_info_without_names_counts_the_classes(digits, tmp_path):
    facts = json.loads(dist_mnist("data", "info", digits, "--json").stdout)
    assert facts["class names"] == list("0123456789") and facts["fingerprint"]
    done = dist_mnist("data", "info", digits, "--seen", tmp_path / "seen.jpg")
    assert done.returncode == 2 and "is a PNG file" in done.stderr and not (tmp_path / "seen.jpg").exists()
    done = dist_mnist("data", "info", digits, "--seen", tmp_path / "no" / "seen.png")
    assert done.returncode == 2 and "seen.png: cannot be written" in done.stderr


@pytest.mark.parametrize(("kind", "made"), [("pictures", "train/3/"), ("npz", "dataset.npz"), ("csv", "test.csv")])
def test_export_command_says_where_the_dataset_is(digits, tmp_path, kind, made):
    done = dist_mnist("data", "export", digits, "--to", kind, folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{digits.name}-{kind}\n", "")
    assert (tmp_path / f"{digits.name}-{kind}" / made).exists()
    again = dist_mnist("data", "export", digits, "--to", kind, "--output", tmp_path / f"{digits.name}-{kind}")
    assert again.returncode == 2 and "already exists" in again.stderr


def test_info_and_export_of_a_training_part_alone_are_of_what_is_there(odd_set, tmp_path):
    whole = json.loads(dist_mnist("data", "info", odd_set, "--json").stdout)
    for path in odd_set.glob("t10k-*"):
        path.unlink()
    found = dist_mnist("data", "info", odd_set, "--seen", tmp_path / "seen.png", "--json")
    assert (found.returncode, found.stderr) == (0, "")
    facts = json.loads(found.stdout)
    assert (facts["training images"], facts["test images"]) == (12, 0)
    assert facts["images per class (test)"] == [0, 0, 0] and facts["bytes"] == 12 * 4 * 5 * 3
    assert facts["duplicates (training)"] == whole["duplicates (training)"] == 2
    assert facts["test images that are in training, too"] == 0 and facts["images that have another label, too"] == 3
    for kind, names in (("pictures", {"train"}), ("npz", {"dataset.npz"}), ("csv", {"train.csv"})):
        done = dist_mnist("data", "export", odd_set, "--to", kind, "--output", tmp_path / kind)
        assert (done.returncode, done.stderr) == (0, "")
        assert {path.name for path in (tmp_path / kind).iterdir()} == {"classes.json", *names}
    with np.load(tmp_path / "npz" / "dataset.npz") as archive:
        assert archive.files == ["x_train", "y_train"]
    said = dist_mnist("data", "import", tmp_path / "pictures", "--to", tmp_path / "back", "--test-fraction=0.25")
    assert said.returncode == 0 and json.loads((tmp_path / "back" / "classes.json").read_text())[0] == "うし"


def test_names_of_classes_in_a_locale_without_letters_are_written_as_in_any_other(odd_set, tmp_path):
    """Folders in UTF-8, and escapes in tables; what was: a traceback."""
    ascii_only = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "dist_mnist", "data"]
    for words in (["info", odd_set], ["export", odd_set, "--to", "pictures", "--output", tmp_path / "out"]):
        done = subprocess.run(
            [*command, *map(str, words)], env=ascii_only, capture_output=True, text=True, timeout=HANGS_AFTER_S
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert {path.name for path in (tmp_path / "out" / "train").iterdir()} == {"うし", "[red]cat", "T-shirt%2Ftop"}
