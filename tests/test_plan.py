"""Preparing a run: its length, its calendar, and what is refused before any process group is formed."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dist_mnist.errors import UserError
from dist_mnist.plan import prepare


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def plan(folder: Path, world_size: int = 1, **given):
    return prepare({"data_dir": folder, "batch_size": 5, "validation_fraction": 0.1, **given}, world_size)


def begin(plan) -> None:
    """Write config.json as a run does."""
    with plan.run.owned():
        plan.run.write_json(plan.run.config_path, json.loads(json.dumps(plan.identity())))


def test_nothing_is_written(small_set):
    run = plan(small_set).run.path
    assert run.parent == Path("runs") and run.name.startswith("default-set-")
    assert not Path("runs").exists()
    others = [plan(small_set, lr=0.3), plan(small_set, recipe="notebook"), plan(small_set, workers=2)]
    assert [other.run.path == run for other in others] == [False, False, True]


@pytest.mark.parametrize(
    ("given", "total"),
    [({"epochs": 3.0}, 12), ({"steps": 7}, 7), ({"epochs": 0.5}, 2), ({"epochs": 0.01}, 1), ({"drop_last": True}, 9)],
    ids=str,
)
def test_length(small_set, given, total):
    """18 images in batches of 5 make 4 steps an epoch, or 3."""
    assert plan(small_set, **given).total_steps == total


def test_calendar(small_set):
    own = {"steps": 10, "log_every": 3, "validate_every": 4, "checkpoint_every": 5}
    found = plan(small_set, **own)
    days = range(1, 11)
    assert [day for day in days if found.wants_log(day)] == [3, 6, 9, 10]
    assert [day for day in days if found.wants_validation(day)] == [4, 8, 10]
    assert [day for day in days if found.wants_checkpoint(day)] == [4, 5, 8, 10]
    assert [day for day in days if found.pauses(day)] == [3, 4, 5, 6, 8, 9, 10]
    assert [day for day in days if found.ends_epoch(day)] == [4, 8]
    default = plan(small_set, steps=10)
    assert [day for day in days if default.wants_validation(day)] == [4, 8, 10]
    without = plan(small_set, **own, validation_fraction=0.0)
    assert [day for day in days if without.wants_checkpoint(day)] == [5, 10]


@pytest.mark.parametrize(
    ("given", "world", "message"),
    [
        ({"batch_size": 3}, 4, "--batch-size 3 is the global batch, which 4 processes cannot share; give 4 or more"),
        ({"batch_size": 19}, 1, "--batch-size 19 is more than the 18 training images"),
        ({"validation_fraction": 0.01}, 1, "--validation-fraction 0.01 of 20 images"),
        ({"data_dir": Path("absent")}, 1, "absent: there is no such folder"),
        ({"run_dir": Path("file")}, 1, "file.*cannot be read|file.*cannot be written"),
    ],
    ids=str,
)
def test_what_is_refused(small_set, given, world, message):
    Path("file").touch()
    with pytest.raises(UserError, match=message):
        plan(small_set, world, **given)


def test_a_run_directory_remembers(small_set):
    first = plan(small_set, run_dir=Path("r"), lr=0.3)
    begin(first)
    again = prepare({"run_dir": Path("r")}, 1)
    assert again.config == first.config and again.folder == small_set
    assert prepare({"run_dir": Path("r"), "log_every": 3}, 1).config.log_every == 3
    with pytest.raises(UserError, match=r"started with other settings \(lr: 0.3 -> 0.4\)"):
        prepare({"run_dir": Path("r"), "lr": 0.4}, 1)


@pytest.mark.parametrize("run_dir", [None, Path("r")], ids=["default folder", "named folder"])
def test_a_run_does_not_go_on_with_other_data(small_set, run_dir):
    given = {} if run_dir is None else {"run_dir": run_dir}
    begin(plan(small_set, **given))
    assert plan(small_set, **given)
    labels = small_set / "train-labels-idx1-ubyte"
    content = bytearray(labels.read_bytes())
    content[-1] = (content[-1] + 1) % 3
    labels.write_bytes(content)
    with pytest.raises(UserError, match="was started on other data"):
        plan(small_set, **given)


@pytest.mark.parametrize("content", ["{}", "[]", '{"data": {}}', "{"])
def test_a_config_file_of_something_else(small_set, content):
    Path("r").mkdir()
    Path("r/config.json").write_text(content)
    with pytest.raises(UserError, match=r"^r/config\.json"):
        plan(small_set, run_dir=Path("r"))


def test_the_run_of_another_shape(write_set):
    images, labels = np.zeros((20, 6, 5, 3), np.uint8), np.arange(20, dtype=np.uint8) % 7
    data = plan(write_set(images, labels)).identity()["data"]
    assert data["image_shape"] == [3, 6, 5] and data["num_classes"] == 7


def test_preparing_needs_no_torch():
    code = "import sys, dist_mnist.cli, dist_mnist.plan; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
