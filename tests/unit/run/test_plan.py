"""Preparing a run: its length, its calendar, and what is refused before any process group is formed."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from dist_mnist.run.checkpoints.file import save_checkpoint
from dist_mnist.run.plan import prepare
from dist_mnist.utils.errors import UserError
from helpers.checkpoints import INFO


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def plan(folder: Path, world_size: int = 1, **given):
    return prepare({"data_dir": folder, "batch_size": 5, "validation_fraction": 0.1, **given}, world_size)


def begin(plan, step: int = 1) -> None:
    """Leave a checkpoint as a run does."""
    with plan.run.owned():
        info = replace(INFO, settings=plan.config.to_json(), data=plan.data_facts, step=step)
        save_checkpoint(plan.run.checkpoints.path(step), {}, info)


def test_prepare_writes_nothing(small_set):
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
def test_total_steps_follow_from_epochs_or_steps(small_set, given, total):
    """18 images in batches of 5 make 4 steps an epoch, or 3."""
    assert plan(small_set, **given).total_steps == total


def test_validation_split_random_or_last_holds_out_the_right_images(small_set):
    drawn, last = (plan(small_set, validation_split=split).data for split in ("random", "last"))
    rows = [dataset.rows_of(np.arange(len(dataset))).rows.tolist() for dataset in (last.train, last.validation)]
    assert rows == [list(range(18)), [18, 19]]
    assert set(drawn.validation.rows_of(np.arange(2)).rows) != {18, 19}


def test_plan_wants_log_validation_and_checkpoint_when_due(small_set):
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
        ({"batch_size": 3}, 4, "--batch-size 3 is the global batch size, less than .* 4 processes: give 4 or more"),
        ({"crop": 2}, 1, "--crop 2 does not fit images .* give a multiple of 4"),
        ({"crop": 400}, 1, "--crop 400 does not fit images .* that leaves at least 4 pixels"),
        ({"batch_size": 19}, 1, "--batch-size 19 is more than the 18 training images"),
        ({"validation_fraction": 0.01}, 1, "--validation-fraction 0.01 of 20 images"),
        ({"data_dir": Path("absent")}, 1, "absent: the folder of idx files does not exist"),
        ({"init": Path("absent")}, 1, "--init absent: there is no such file or run directory"),
    ],
    ids=str,
)
def test_prepare_with_a_mistake_is_refused_in_a_sentence(small_set, given, world, message):
    with pytest.raises(UserError, match=message):
        plan(small_set, world, **given)


def test_prepare_in_a_run_directory_takes_over_its_settings(small_set):
    first = plan(small_set, run_dir=Path("r"), lr=0.3)
    begin(first)
    again = prepare({"run_dir": Path("r")}, 1)
    assert again.config == first.config and again.folder == small_set
    assert prepare({"run_dir": Path("r"), "log_every": 3}, 1).config.log_every == 3
    with pytest.raises(UserError, match=r"started with other settings \(lr: 0.3 -> 0.4\)"):
        prepare({"run_dir": Path("r"), "lr": 0.4}, 1)


def test_prepare_with_fewer_steps_than_done_is_refused(small_set):
    length = {"epochs": None, "schedule": "constant", "warmup_fraction": 0.0, "run_dir": Path("r")}
    begin(plan(small_set, **length, steps=8), 8)
    assert plan(small_set, **length, steps=8)
    with pytest.raises(UserError, match="has already trained 8 steps, more than the requested 7"):
        plan(small_set, **length, steps=7)


def test_check_resumes_after_another_run_began_is_refused(small_set):
    late = plan(small_set, run_dir=Path("r"), lr=0.4)  # looks before there is anything
    begin(plan(small_set, run_dir=Path("r"), lr=0.3))
    with pytest.raises(UserError, match=r"started with other settings \(lr: 0.3 -> 0.4\)"):
        late.check_resumes(late.run.checkpoints.newest_info())


def test_prepare_with_other_data_than_the_runs_is_refused(small_set):
    begin(plan(small_set, run_dir=Path("r")))
    assert plan(small_set, run_dir=Path("r"))
    default = plan(small_set).run.path
    labels = small_set / "train-labels-idx1-ubyte"
    content = bytearray(labels.read_bytes())
    content[-1] = (content[-1] + 1) % 3
    labels.write_bytes(content)
    with pytest.raises(UserError, match="was started on other data"):
        plan(small_set, run_dir=Path("r"))
    assert plan(small_set).run.path != default


def test_prepare_after_a_start_without_checkpoint_may_differ(small_set):
    first = plan(small_set, run_dir=Path("r"))
    with first.run.owned():
        first.run.write_json(first.run.config_path, {"settings": first.config.to_json(), "data": first.data_facts})
    assert plan(small_set, run_dir=Path("r"), lr=0.7).config.lr == 0.7


def test_default_run_directory_of_other_data_is_another(small_set, write_set, tmp_path):
    images, labels = np.ones((20, 4, 5), np.uint8), np.arange(20, dtype=np.uint8) % 3
    other = write_set(images, labels, folder=tmp_path / "elsewhere" / small_set.name)
    assert plan(small_set).run.path != plan(other).run.path
    os.chdir(small_set)
    assert plan(Path(".")).run.path == plan(small_set).run.path


def test_identity_holds_image_shape_and_classes(write_set):
    images, labels = np.zeros((20, 6, 5, 3), np.uint8), np.arange(20, dtype=np.uint8) % 7
    data = plan(write_set(images, labels)).data_facts
    assert data.image_shape == (3, 6, 5) and data.num_classes == 7


def test_prepare_imports_no_torch():
    code = "import sys, dist_mnist.cli.app, dist_mnist.run.plan; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
