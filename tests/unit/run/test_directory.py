"""The run directory: which checkpoint is the best, which are kept, and what happens to damaged ones."""

import json
import math
import os
import random
import shutil
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings, strategies
from msgspec.structs import replace

from dist_mnist.run.checkpoints.file import CheckpointError, read_info, save_checkpoint
from dist_mnist.run.checkpoints.store import SPARSER, kept, load_best, verify
from dist_mnist.run.directory import RunDirectory
from dist_mnist.run.records import ValidationScore
from dist_mnist.utils.errors import UserError
from helpers.checkpoints import INFO


@pytest.fixture
def run(tmp_path):
    """A run directory that we own, with a method `save(step, accuracy)`."""
    run = RunDirectory(tmp_path / "run")

    def save(step, accuracy=None):
        validation = None if accuracy is None else ValidationScore(accuracy=accuracy, loss=0.5)
        info = replace(INFO, step=step, epoch=step / 10, validation=validation)
        save_checkpoint(run.checkpoints.path(step), {"w": np.full(3, step, np.float32)}, info)

    run.save = save
    with run.owned():
        yield run


def steps(run) -> list[int]:
    return [read_info(path).step for path in run.checkpoints.paths()]


@pytest.mark.parametrize(
    ("accuracies", "best"),
    [([None, None], 20), ([0.9, 0.8, 0.7], 10), ([0.7, 0.9, 0.9, 0.8], 30), ([None, 0.0, None], 20), ([0.5, None], 10)],
)
def test_best_by_accuracy_then_age_is_found(run, accuracies, best):
    for i, accuracy in enumerate(accuracies):
        run.save(10 * (i + 1), accuracy)
    found = run.checkpoints.best(pytest.fail)
    assert found.path == run.checkpoints.path(best) == load_best(run.path, pytest.fail).path
    assert found.arrays["w"].tolist() == [best] * 3 and found.info.step == best
    assert [row.step for row in run.checkpoints.summary() if row.best] == [best]
    assert [row.validation_accuracy for row in run.checkpoints.summary()] == accuracies
    assert load_best(run.checkpoints.path(10), pytest.fail).info.step == 10


def test_store_without_checkpoints_has_none(run, tmp_path):
    assert run.checkpoints.newest(pytest.fail) is None
    assert run.checkpoints.newest_info() is None
    for path, message in ((run.path, "there is no valid checkpoint"), (tmp_path / "absent", "no such checkpoint or")):
        with pytest.raises(UserError, match=message):
            load_best(path, pytest.fail)
    for path, message in ((run, "there is no checkpoint in"), (RunDirectory(tmp_path / "absent"), "no such run dir")):
        with pytest.raises(CheckpointError, match=message):
            path.checkpoints.summary()


@pytest.mark.parametrize(
    ("keep", "left"),
    [(1, [10, 30, 60, 70, 80]), (3, [10, 30, 60, 70, 80]), (4, [10, 30, 50, 60, 70, 80]), (9, list(range(10, 90, 10)))],
)
def test_prune_keeps_newest_best_and_few_others(run, keep, left):
    for step, accuracy in zip(range(10, 90, 10), (0.5, 0.6, 0.9, 0.6, 0.7, 0.8, 0.7, 0.8), strict=True):
        run.save(step, accuracy)
    copy = shutil.copy(run.checkpoints.path(20), run.checkpoints.folder / "step-00000020-copy.safetensors")
    for _ in range(2):
        run.checkpoints.prune(keep)
        assert copy.exists(), "it is the user's"
        assert [path for path in run.checkpoints.paths() if path != copy] == [run.checkpoints.path(n) for n in left]


@given(strategies.data())
@settings(max_examples=200, deadline=None)
def test_kept_after_each_save_covers_the_whole_run_with_few(data):
    """A run of any intervals between saves, with checkpoints judged now and then, pruned after each save."""
    keep = data.draw(strategies.integers(1, 6))
    intervals = strategies.one_of(strategies.integers(1, 3), strategies.integers(1, 1000))
    saved, left, best = [0], {0}, 0
    for interval in data.draw(strategies.lists(intervals, min_size=1, max_size=300)):
        saved.append(saved[-1] + interval)
        best = data.draw(strategies.sampled_from([best, best, saved[-1]]))
        before = left | {saved[-1]}
        left = kept(before, keep, {best})
        assert left == kept(left, keep, {best}) <= before, "done twice, it is as done once"
        assert {*saved[-keep:], best, saved[0]} <= left
    age = {step: saved[-1] - step for step in saved}
    ordered = sorted(left)
    for older, newer in pairwise(ordered):
        between = any(older < step < newer for step in saved)
        assert not between or age[older] <= SPARSER * age[newer], "there is a gap where there was a checkpoint"
    old = [step for step in ordered[1:-keep] if step != best]
    assert len(old) <= 3 + math.log2(max(1, age[saved[0]] / max(1, age[saved[-keep:][0]])))


def test_kept_of_regular_saves_is_about_one_for_each_doubling():
    left = set()
    for number in range(1, 5_000):
        left = kept(left | {100 * number}, 5, ())
        assert len(left) <= 5 + 3 + math.log2(number)
    ages = sorted(4_999 - step // 100 for step in left)
    assert ages[:5] == [0, 1, 2, 3, 4] and ages[-1] == 4_998
    assert all(older <= SPARSER * newer for newer, older in pairwise(ages[1:]))


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: content[:-1] + b"~", lambda _: b""])
def test_newest_damaged_is_set_aside(run, damage):
    for step in (9, 10, 100):
        run.save(step)
    path, warnings = run.checkpoints.path(100), []
    path.write_bytes(damage(path.read_bytes()))
    found = run.checkpoints.newest(warnings.append)
    assert found.info.step == 10 and found.arrays["w"].tolist() == [10] * 3
    assert len(warnings) == 1 and str(path) in warnings[0] and "step-00000100.damaged" in warnings[0]
    assert steps(run) == [9, 10] and (path.with_suffix(".damaged")).exists()


def test_newest_any_damage_leads_to_the_one_before(run):
    run.save(10)
    run.save(20)
    path, rng = run.checkpoints.path(20), random.Random(0)
    content = path.read_bytes()
    for number in range(1_000):
        damaged = bytearray(content)
        if number % 4:
            damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        else:
            del damaged[rng.randrange(len(content)) :]
        path.write_bytes(damaged)
        warnings: list[str] = []
        found = run.checkpoints.newest(warnings.append)
        assert found.info.step == 10 and found.arrays["w"].tolist() == [10] * 3 and len(warnings) == 1
        path.with_suffix(".damaged").unlink()


def test_newest_of_another_version_is_refused(run):
    for step in (10, 20):
        run.save(step)
        path = run.checkpoints.path(step)
        path.write_bytes(path.read_bytes().replace(b"dist_mnist/1", b"dist_mnist/2"))
    with pytest.raises(UserError, match="written by another version"):
        run.checkpoints.newest(pytest.fail)
    assert len(run.checkpoints.paths()) == 2
    run.save(5)  # then those above are damaged, for no run changes its version on the way
    assert run.checkpoints.newest(str).info.step == 5 and steps(run) == [5]


def test_prune_unreadable_checkpoint_deletes_nothing(run, monkeypatch):
    for step, accuracy in ((10, 0.9), (20, 0.6), (30, 0.7), (40, 0.7)):
        run.save(step, accuracy)

    def read(path):
        if path == run.checkpoints.path(10):
            raise UserError("a network's passing fault")
        return read_info(path)

    with monkeypatch.context() as patch:
        patch.setattr("dist_mnist.run.checkpoints.store.read_info", read)
        run.checkpoints.prune(1)
    assert steps(run) == [10, 20, 30, 40]
    run.checkpoints.prune(1)
    assert steps(run) == [10, 30, 40]


def test_best_old_damaged_checkpoint_is_passed_over(run):
    for step in (10, 20, 30):
        run.save(step, step / 100)
    path = run.checkpoints.path(10)
    path.write_bytes(path.read_bytes()[:-1])
    assert run.checkpoints.newest(pytest.fail).info.step == 30
    run.checkpoints.prune(5)  # as after the next save
    warnings: list[str] = []
    assert run.checkpoints.best(warnings.append).path == run.checkpoints.path(30)
    assert len(warnings) == 1 and str(path) in warnings[0]


@pytest.mark.parametrize("place", [b"accuracy", None], ids=["description", "weights"])
def test_best_damaged_is_replaced_by_next_best(run, place):
    for step, accuracy in ((10, 0.8), (20, 0.9), (30, 0.7)):
        run.save(step, accuracy)
    path, warnings = run.checkpoints.path(20), []
    content = bytearray(path.read_bytes())
    content[content.index(place) if place else -1] ^= 1
    path.write_bytes(content)
    assert load_best(run.path, warnings.append).info.step == 10
    assert path.exists(), "reading is no reason to rename"
    assert len(warnings) == 1 and str(path) in warnings[0]
    assert [row.damage is None for row in verify(run.path)] == [True, False, True]
    assert [row.step for row in run.checkpoints.summary()] == ([10, None, 30] if place else [10, 20, 30])
    assert run.checkpoints.newest_info().step == 30


def test_write_json_non_finite_numbers_become_null(run):
    run.write_json(run.result_path, {"loss": float("nan"), "list": [1, float("inf"), 0.1], "text": "nan"})
    assert json.loads(run.result_path.read_text()) == {"loss": None, "list": [1, None, 0.1], "text": "nan"}


def test_owned_second_owner_is_refused(run):
    with (
        pytest.raises(UserError, match=f"{run.path}: another run is using this folder .process {os.getpid()} on "),
        RunDirectory(run.path).owned(wait_s=0.1),
    ):
        pass
    other = RunDirectory(run.path.parent / "other")
    for _ in range(2):  # and gives it back
        with other.owned():
            assert other.checkpoints.folder.is_dir()
    assert [path.name for path in other.path.iterdir() if path.name != ".lock"] == ["checkpoints"]


def test_owned_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    run = RunDirectory(tmp_path / "file" / "run")
    with pytest.raises(UserError, match="run directory cannot be written"), run.owned():
        pass


def test_summary_settings_of_another_version_are_listed_and_kept(run):
    run.save(10, 0.9)
    run.save(20, 0.6)
    for step in (10, 20):
        settings = dict(INFO.settings) | {"unheard_of": 1}
        info = replace(read_info(run.checkpoints.path(step)), settings=settings)
        save_checkpoint(run.checkpoints.path(step), {"w": np.zeros(3, np.float32)}, info)
    assert [(row.step, row.best) for row in run.checkpoints.summary()] == [(10, True), (20, False)]
    run.checkpoints.prune(1)
    assert steps(run) == [10, 20] and [row.damage for row in verify(run.path)] == [None, None]
    with pytest.raises(UserError, match="unknown setting unheard_of: the file is from another version"):
        run.checkpoints.newest(pytest.fail).info.config(run.path)
