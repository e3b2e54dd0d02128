"""Class names from the data folder to wherever classes appear, and folders as people have them."""

import gzip
import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from msgspec.structs import replace
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dist_mnist.data.idx import open_idx, write_idx
from dist_mnist.data.sources.synthetic import write_digits
from dist_mnist.run.checkpoints.file import load_checkpoint, save_checkpoint
from helpers.runs import SMALL, dist_mnist, train_here, trained_here

pytestmark = pytest.mark.xdist_group("class names")  # what most of these need is made once

NAMES = [
    "zéro", "one [bold]", "two & <b>two</b>", "שלוש", "四", "five, with a name that goes on and on and on", "6", "7up",
    "8" + "\u0301" * 300, "nine",
]  # fmt: skip
LONG = "five, with a name that …"


def copied(digits: Path, folder: Path, names: list[str] | None = None) -> Path:
    shutil.copytree(digits, folder)
    if names:
        (folder / "classes.json").write_text(json.dumps(names, ensure_ascii=False, indent=1), "utf-8")
    return folder


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def data(digits, tmp_path_factory) -> Path:
    """Generated digits with names of all sorts."""
    return copied(digits, tmp_path_factory.mktemp("data") / "named", NAMES)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """A run of 20 steps on these, with TensorBoard."""
    return trained_here(data, tmp_path_factory.mktemp("runs") / "named", "--steps=20", "--tensorboard")


def said(*words: object, code: int = 0) -> str:
    done = dist_mnist(*words)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def test_train_records_the_names_in_checkpoint_result_and_config(trained):
    facts = json.loads(said("ckpt", "show", trained))["data"]
    assert facts["class_names"] == NAMES and "label_numbers" not in facts
    assert json.loads((trained / "result.json").read_text())["class_names"] == NAMES
    assert json.loads((trained / "config.json").read_text())["data"]["class_names"] == NAMES


@pytest.mark.parametrize("width", [80, 250])
def test_eval_table_has_the_names_shortened_in_whole_lines(trained, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    lines = said("eval", "--ckpt", trained).splitlines()
    table = {line.split("  ")[0].strip(): line for line in lines if "%" in line and not re.search("accuracy|ECE", line)}
    numbered = [f"{number} " if width == 80 else "" for number in range(10)]
    for number, name in ((0, "zéro"), (1, "one [bold]"), (2, "two & <b>two</b>"), (4, "四"), (5, LONG), (7, "7up")):
        assert numbered[number] + name in table, list(table)
    assert f"{numbered[3]}\u2068{NAMES[3]}\u2069" in table, "isolated: it turns nothing else"
    assert len(table) == 10 and "\u0301" * 100 not in "".join(table)
    heading = next(line for line in lines if line.strip().startswith("true ") and "accuracy" in line)
    assert ("7up" in heading) == (width == 250) and (" 7 " in heading) == (width == 80)


def test_eval_json_has_the_names_beside_the_accuracy_by_class(trained):
    result = json.loads(said("eval", "--ckpt", trained, "--json"))
    assert result["class_names"] == NAMES and len(result["per_class_accuracy"]) == 10 and result["held_out"] is None


def test_predict_without_the_data_shows_the_checkpoints_names(trained, data, tmp_path):
    images = shutil.copy(data / "t10k-images-idx3-ubyte", tmp_path)
    alone = shutil.copy(next((trained / "checkpoints").glob("*.safetensors")), tmp_path / "alone.safetensors")
    found = json.loads(said("predict", images, "--ckpt", alone, "--json"))
    assert all(one["name"] == NAMES[one["class"]] for one in found) and len({one["class"] for one in found}) > 3
    lines = said("predict", images, "--ckpt", alone).splitlines()
    assert all(line.split(" (")[0].split(": ", 1)[1] for line in lines) and any("zéro (" in line for line in lines)
    said("predict", images, "--ckpt", alone, "--seen", tmp_path / "seen.png")
    assert (tmp_path / "seen.png").stat().st_size > 10_000


def test_predict_of_a_checkpoint_without_names_shows_numbers(trained, data, tmp_path):
    """As earlier versions wrote them."""
    before = load_checkpoint(next((trained / "checkpoints").glob("*.safetensors")))
    facts = replace(before.info.data, class_names=None)
    save_checkpoint(tmp_path / "old.safetensors", before.arrays, replace(before.info, data=facts))
    images = data / "t10k-images-idx3-ubyte"
    found = json.loads(said("predict", images, "--ckpt", tmp_path / "old.safetensors", "--json"))
    assert all(one["name"] == str(one["class"]) for one in found)
    assert json.loads(said("eval", "--ckpt", tmp_path / "old.safetensors", "--json"))["class_names"] == NAMES


def test_names_of_a_forged_checkpoint_are_harmless_on_a_terminal(trained, data, tmp_path):
    before = load_checkpoint(next((trained / "checkpoints").glob("*.safetensors")))
    names = tuple(f"\x1b[2J\r\n[bold]\u202e{number}" for number in range(10))
    facts = replace(before.info.data, class_names=names)
    save_checkpoint(tmp_path / "forged.safetensors", before.arrays, replace(before.info, data=facts))
    for words in (("eval",), ("predict", data / "t10k-images-idx3-ubyte")):
        done = dist_mnist(*words, "--ckpt", tmp_path / "forged.safetensors")
        assert done.returncode == 0 and "[bold]" in done.stdout
        assert not set("\x1b\r\u202e") & set(done.stdout + done.stderr)


def test_report_has_the_names_as_text(trained, tmp_path):
    said("report", trained, "--output", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text("utf-8")
    assert page.count('alt="confusion matrix"') == page.count('alt="the misclassified images') == 1
    assert "<b>two" not in page and "two &amp; &lt;b&gt;two&lt;/b&gt;" in page
    assert '<td class="left">zéro</td>' in page and f'<td class="left">\u2068{NAMES[3]}\u2069</td>' in page


def test_tensorboard_has_the_names_in_curves_and_pictures(trained):
    events = EventAccumulator(str(trained / "tensorboard"), size_guidance={"images": 0, "tensors": 0}).Reload()
    assert {"confusion/validation", "confusion/test", "mistakes/test"} <= set(events.Tags()["images"])
    curves = {tag for tag in events.Tags()["tensors"] if tag.startswith("precision_recall/")}
    assert len(curves) == 10 and {"precision_recall/class_2_two_b_two_b_", "precision_recall/class_4_四"} <= curves


def test_export_writes_the_names_into_each_formats_metadata(trained, tmp_path):
    for kind in ("onnx", "safetensors", "torch-export"):
        said("export", "--ckpt", trained, "--format", kind, "--output", tmp_path / kind)
    with safe_open(tmp_path / "safetensors", "np") as file:
        assert json.loads(file.metadata()["class_names"]) == NAMES
    [entry] = [one for one in onnx.load(tmp_path / "onnx").metadata_props if one.key == "class_names"]
    assert json.loads(entry.value) == NAMES
    extra = {"class_names": ""}
    with (tmp_path / "torch-export").open("rb") as file:
        torch.export.load(file, extra_files=extra)
    assert json.loads(extra["class_names"]) == NAMES


def test_commands_leave_the_data_folder_as_it_was(trained, data, tmp_path):
    before = snapshot(data)
    trained_here(data, tmp_path / "run", "--steps=2")
    for words in (("eval",), ("export", "--format=safetensors", f"--output={tmp_path / 'x'}")):
        said(*words, "--ckpt", tmp_path / "run")
    said("report", tmp_path / "run")
    said("data", "info", data)
    assert snapshot(data) == before


def test_resume_with_other_names_goes_on_and_with_another_number_of_classes_is_refused(digits, tmp_path):
    data = copied(digits, tmp_path / "data", NAMES)
    run = trained_here(data, tmp_path / "run", "--steps=6", "--schedule=constant", "--warmup-fraction=0")
    (data / "classes.json").write_text(json.dumps([*NAMES[:9], "neun"]))
    trained_here(data, run, "--steps=8", "--schedule=constant", "--warmup-fraction=0")
    assert json.loads((run / "result.json").read_text())["class_names"][9] == "neun"
    (data / "classes.json").write_text(json.dumps([*NAMES, "ten"]))
    done = train_here(data, run, *SMALL, "--steps=10", "--schedule=constant", "--warmup-fraction=0")
    assert done.returncode == 2 and "was started with 10 classes, and classes.json" in done.stderr
    (data / "classes.json").unlink()
    assert said("eval", "--ckpt", run)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b'["a", "b"', "not a JSON list of strings"),
        (b'{"a": 1}', "not a JSON list of strings"),
        (b'["a", "a"]', "classes 0 and 1 are both named 'a'"),
        (b'["a", "b"]', "the file has 10 distinct labels up to 9, but classes.json has 2 names"),
        (b'["' + b"a" * 10_000_000 + b'"]', "exceeds 4 MiB"),
        (rb'["a", "\u001b]0;x\u0007"]', "has unprintable characters"),
        (None, "a link to nowhere.json"),
    ],
    ids=["not JSON", "no list", "duplicates", "too few", "10 MB", "control characters", "broken link"],
)
def test_train_malformed_class_names_are_a_sentence_and_begin_nothing(digits, tmp_path, content, sentence):
    data = copied(digits, tmp_path / "data")
    if content is None:
        (data / "classes.json").symlink_to("nowhere.json")
    else:
        (data / "classes.json").write_bytes(content)
    done = train_here(data, tmp_path / "run", *SMALL, "--steps=2")
    assert done.returncode == 2 and sentence in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert str(data / "classes.json") in done.stderr or "train-labels" in done.stderr
    assert not (tmp_path / "run").exists() and "\x1b" not in done.stderr


@pytest.fixture(scope="module")
def training_part(tmp_path_factory) -> Path:
    """A folder as people have it: a training part alone, threes and eights, channels first, gzip without its suffix."""
    made, folder = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("data") / "part"
    write_digits(made, num_train=1200, num_test=1)
    images, labels = (
        np.array(open_idx(made / name)) for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
    )
    chosen = np.isin(labels, (3, 8))
    colour = np.stack([images, images // 2, 255 - images], 1)[chosen]
    folder.mkdir()
    write_idx(folder / "TRAIN-IMAGES.IDX4-UBYTE", colour)
    write_idx(folder / "TRAIN-LABELS.IDX1-UBYTE", labels[chosen][:, None])
    path = folder / "TRAIN-IMAGES.IDX4-UBYTE"
    path.write_bytes(gzip.compress(path.read_bytes()))
    (folder / "._TRAIN-IMAGES.IDX4-UBYTE").write_bytes(b"\0\5\x16\7 of macOS")
    return folder


@pytest.fixture(scope="module")
def held_out(training_part, tmp_path_factory) -> list[Path]:
    """Two runs on it, with other seeds, that hold a fifth out."""
    folder = tmp_path_factory.mktemp("runs")
    options = ("--steps=20", "--test-fraction=0.2")
    return [trained_here(training_part, folder / f"{seed}", f"--seed={seed}", *options) for seed in (0, 1)]


def test_train_on_a_training_part_alone_names_the_option(training_part, tmp_path):
    done = train_here(training_part, tmp_path / "run", *SMALL, "--steps=2")
    assert done.returncode == 2 and "no file found for test images, test labels" in done.stderr
    assert "hold out some training images by --test-fraction 0.1" in done.stderr


def test_train_test_fraction_is_refused_where_there_are_test_files(digits, tmp_path):
    done = train_here(digits, tmp_path / "run", *SMALL, "--steps=2", "--test-fraction=0.2")
    assert done.returncode == 2 and "has test images: omit the option" in done.stderr


def test_held_out_test_images_are_evaluated_and_said_so(held_out, training_part):
    before = snapshot(training_part)
    result = json.loads((held_out[0] / "result.json").read_text())
    assert result.pop("seconds")["since_start"] > 0 and result.pop("ended") == "length"
    total = len(open_idx(training_part / "TRAIN-LABELS.IDX1-UBYTE"))
    assert (result["images"], result["held_out"], result["class_names"]) == (int(0.2 * total), 0.2, ["3", "8"])
    assert json.loads(said("eval", "--ckpt", held_out[0], "--json")) == result
    printed = said("eval", "--ckpt", held_out[0])
    assert "20% of the training files held out" in " ".join(printed.split()) and " 3 " in printed and " 8 " in printed
    said("report", held_out[0])
    assert "20% of the training files held out" in (held_out[0] / "report.html").read_text()
    assert snapshot(training_part) == before


def test_held_out_images_that_another_run_trained_on_are_refused(held_out):
    done = dist_mnist("eval", "--ckpt", held_out[0], "--ckpt", held_out[1])
    assert done.returncode == 2 and "another test split would contain images that it was trained on" in done.stderr
    assert "was trained on" in said("eval", "--ckpt", held_out[0], "--test-fraction=0.4", code=2)
    printed = " ".join(said("compare", *held_out).split())
    assert "held out different test images" in printed


def test_eval_on_another_folder_reads_its_labels_as_the_run_did(held_out, training_part, tmp_path):
    """By their numbers: eights are eights where the folder holds only eights and nines, too."""
    other = tmp_path / "other"
    shutil.copytree(training_part, other)
    labels = np.array(open_idx(other / "TRAIN-LABELS.IDX1-UBYTE"))
    write_idx(other / "TRAIN-LABELS.IDX1-UBYTE", np.where(labels == 3, 9, labels))
    done = dist_mnist("eval", "--ckpt", held_out[0], "--data-dir", other)
    assert (
        done.returncode == 2 and "was trained on the classes 3, 8, but" in done.stderr and "holds 8, 9" in done.stderr
    )
    write_idx(other / "TRAIN-LABELS.IDX1-UBYTE", labels)
    for name in ("TRAIN-IMAGES.IDX4-UBYTE", "TRAIN-LABELS.IDX1-UBYTE"):
        shutil.copy(other / name, other / name.replace("TRAIN", "TEST"))
    result = json.loads(said("eval", "--ckpt", held_out[0], "--data-dir", other, "--json"))
    assert result["images"] == len(labels) and result["held_out"] is None


def test_eval_takes_the_import_of_its_data_and_the_other_way_round(held_out, training_part, tmp_path):
    """Labels 3 and 8, and 0 and 1 that classes.json calls so, are the same classes."""
    done = dist_mnist("data", "import", training_part, "--to", tmp_path / "imported", "--test-fraction=0.3")
    assert done.returncode == 0, done.stderr
    result = json.loads(said("eval", "--ckpt", held_out[0], "--data-dir", tmp_path / "imported", "--json"))
    assert result["class_names"] == ["3", "8"] and result["accuracy"] > 0.5
    run = trained_here(tmp_path / "imported", tmp_path / "run", "--steps=20")
    options = ("--data-dir", training_part, "--test-fraction=0.2", "--json")
    assert json.loads(said("eval", "--ckpt", run, *options))["class_names"] == ["3", "8"]
    (tmp_path / "imported" / "classes.json").write_text('["3", "9"]')
    done = dist_mnist("eval", "--ckpt", held_out[0], "--data-dir", tmp_path / "imported")
    assert done.returncode == 2 and "was trained on the classes 3, 8, but" in done.stderr, done.stderr


def test_predict_images_with_channels_first_as_the_model_was_trained_on(held_out, training_part):
    found = json.loads(said("predict", training_part / "TRAIN-IMAGES.IDX4-UBYTE", "--ckpt", held_out[0], "--json"))
    labels = np.array(open_idx(training_part / "TRAIN-LABELS.IDX1-UBYTE")).reshape(-1)
    assert {one["name"] for one in found} == {"3", "8"}
    assert np.mean([int(one["name"]) == label for one, label in zip(found, labels, strict=True)]) > 0.8


def test_train_says_what_it_made_of_the_folder(training_part, tmp_path):
    done = train_here(training_part, tmp_path / "run", *SMALL, "--steps=2", "--test-fraction=0.2")
    assert "2 classes: 3, 8" in done.stdout and "held out, 20% of the training images" in done.stdout
    assert "images of 3x28x28 are read as channels x height x width" in done.stderr
    assert "labels 3, 8 become classes 0 to 1, named 3, 8" in done.stderr
    assert "labels 3, 8 become classes 0 to 1" in dist_mnist("data", "info", training_part).stderr
