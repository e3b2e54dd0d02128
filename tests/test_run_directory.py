"""The run directory: which checkpoint is the best, which are kept, and what happens to damaged ones."""

import json

import numpy as np
import pytest

from dist_mnist.checkpoint import CheckpointError, RunDirectory, find_checkpoint, read_info, save_checkpoint
from dist_mnist.errors import UserError


@pytest.fixture
def run(tmp_path):
    """A run directory that we own, with a method `save(step, accuracy)`."""
    run = RunDirectory(tmp_path / "run")

    def save(step, accuracy=None):
        info = {"step": step, "epoch": step / 10, "validation": None if accuracy is None else {"accuracy": accuracy}}
        save_checkpoint(run.checkpoint_path(step), {"w": np.full(3, step, np.float32)}, info)

    run.save = save
    with run.owned():
        yield run


def steps(run) -> list[int]:
    return [read_info(path)["step"] for path in run.checkpoints()]


@pytest.mark.parametrize(
    ("accuracies", "best"),
    [([None, None], 20), ([0.9, 0.8, 0.7], 10), ([0.7, 0.9, 0.9, 0.8], 30), ([None, 0.0, None], 20), ([0.5, None], 10)],
)
def test_the_best_checkpoint(run, accuracies, best):
    for i, accuracy in enumerate(accuracies):
        run.save(10 * (i + 1), accuracy)
    assert run.best() == run.checkpoint_path(best) == find_checkpoint(run.path)
    assert [row["step"] for row in run.summary() if row["best"]] == [best]
    assert [row["validation_accuracy"] for row in run.summary()] == accuracies
    assert find_checkpoint(run.checkpoint_path(10)) == run.checkpoint_path(10)


def test_no_checkpoint(run, tmp_path):
    assert run.newest(pytest.fail) is None
    for path, message in ((run.path, "there is no checkpoint"), (tmp_path / "absent", "no such checkpoint or run")):
        with pytest.raises(CheckpointError, match=message):
            find_checkpoint(path)


@pytest.mark.parametrize(("keep", "left"), [(1, [20, 50]), (2, [20, 40, 50]), (5, [10, 20, 30, 40, 50])])
def test_the_newest_and_the_best_are_kept(run, keep, left):
    for step, accuracy in ((10, 0.5), (20, 0.9), (30, 0.6), (40, 0.7), (50, 0.8)):
        run.save(step, accuracy)
    run.prune(keep)
    assert steps(run) == left


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: content[:-1] + b"~", lambda _: b""])
def test_a_damaged_newest_one_is_set_aside(run, damage):
    for step in (9, 10, 100):
        run.save(step)
    path, warnings = run.checkpoint_path(100), []
    path.write_bytes(damage(path.read_bytes()))
    arrays, info = run.newest(warnings.append)
    assert info["step"] == 10 and arrays["w"].tolist() == [10] * 3
    assert len(warnings) == 1 and str(path) in warnings[0] and "step-00000100.damaged" in warnings[0]
    assert steps(run) == [9, 10] and (path.with_suffix(".damaged")).exists()


def test_an_old_damaged_checkpoint_does_not_stop_the_run(run):
    for step in (10, 20, 30):
        run.save(step, step / 100)
    path = run.checkpoint_path(10)
    path.write_bytes(path.read_bytes()[:-1])
    assert run.newest(pytest.fail)[1]["step"] == 30
    run.prune(5)  # as after the next save
    assert run.best() == run.checkpoint_path(30)


def test_json_files(run):
    assert run.read_config() is None
    config = {"settings": {"lr": 0.1, "steps": None}, "data": {"fingerprint": "ab"}}
    run.write_json(run.config_path, config)
    assert run.read_config() == config == json.loads(run.config_path.read_text())
    run.config_path.write_text("{")
    with pytest.raises(UserError, match=r"config.json cannot be read .*give another --run-dir"):
        run.read_config()


def test_one_run_at_a_time_owns_the_folder(run):
    with pytest.raises(UserError, match=f"{run.path}: another run is at work"), RunDirectory(run.path).owned():
        pass
    other = RunDirectory(run.path.parent / "other")
    for _ in range(2):  # and gives it back
        with other.owned():
            assert other.checkpoints_path.is_dir()


def test_a_run_directory_below_a_file(tmp_path):
    (tmp_path / "file").touch()
    run = RunDirectory(tmp_path / "file" / "run")
    with pytest.raises(UserError, match="run directory cannot be written"), run.owned():
        pass
