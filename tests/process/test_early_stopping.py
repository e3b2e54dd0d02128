"""Runs that end before their length: by patience at the same step in any restart, by their time in order."""

import json
import shutil
from dataclasses import dataclass

import pytest

from dist_mnist.run.directory import RunDirectory
from dist_mnist.run.early_stopping import EarlyStopping
from dist_mnist.run.records import EarlyStoppingState, Ended
from helpers.runs import SMALL, digest, records, train_here, trained_here

LENGTH = 40
PATIENT = (f"--steps={LENGTH}", "--validate-every=2", "--patience=2", "--lr=0.2", "--keep=100", "--log-every=10")


def ended(run_dir) -> str:
    return json.loads((run_dir / "result.json").read_text())["ended"]


def end_by_patience(accuracies: list[float], patience: int) -> int:
    """How many validations a run makes that ends by patience."""
    best, since = -1.0, 0
    for count, accuracy in enumerate(accuracies, start=1):
        best, since = (accuracy, 0) if accuracy > best else (best, since + 1)
        if since == patience:
            return count
    raise AssertionError("it does not end by patience")


@pytest.fixture(scope="module")
def patient(digits, tmp_path_factory):
    return trained_here(digits, tmp_path_factory.mktemp("runs") / "patient", *PATIENT)


def test_patience_ends_a_run_at_the_validation_that_the_scores_say_and_keeps_the_best(patient):
    validations = records(patient, "validation")
    assert len(validations) == end_by_patience([one["accuracy"] for one in validations], 2) < LENGTH / 2
    best = max(validations, key=lambda one: (one["accuracy"], one["step"]))
    result = json.loads((patient / "result.json").read_text())
    assert (result["ended"], result["step"]) == ("patience", best["step"])


def test_patience_of_a_run_resumed_from_any_checkpoint_ends_at_the_same_step_with_the_same_bits(
    patient, digits, tmp_path
):
    whole = RunDirectory(patient)
    for path in whole.checkpoints.paths()[:-1]:
        copy = shutil.copytree(patient, tmp_path / path.stem)
        for later in RunDirectory(copy).checkpoints.paths():
            if later.name > path.name:
                later.unlink()
        (copy / "result.json").unlink()
        resumed = RunDirectory(trained_here(digits, copy, *PATIENT))
        assert [one.name for one in resumed.checkpoints.paths()] == [one.name for one in whole.checkpoints.paths()]
        assert (digest(resumed), ended(copy)) == (digest(whole), "patience")


def test_run_that_ended_by_patience_is_only_evaluated_again_until_patience_is_raised(patient, digits, tmp_path):
    copy = shutil.copytree(patient, tmp_path / "run")
    before = digest(RunDirectory(copy))
    done = train_here(digits, copy, *SMALL, *PATIENT)
    assert "finished  this run ended early" in done.stdout and "by --patience 2: 2 validations" in done.stdout
    assert (digest(RunDirectory(copy)), ended(copy)) == (before, "patience")
    trained_here(digits, copy, *PATIENT, "--patience=0")
    whole = trained_here(digits, tmp_path / "whole", *PATIENT, "--patience=0")
    assert digest(RunDirectory(copy)) == digest(RunDirectory(whole)) and ended(copy) == ended(whole) == "length"


def test_max_time_ends_a_run_in_order_with_a_validation_and_a_result(digits, tmp_path):
    options = ("--steps=4", "--max-time=0.001s")
    copy = trained_here(digits, tmp_path / "run", *options)
    assert [one["step"] for one in records(copy, "validation")] == [1] and ended(copy) == "max_time"
    assert RunDirectory(copy).checkpoints.newest_info().early_stopping.training_s > 0.001
    done = train_here(digits, copy, *SMALL, *options)
    assert "ended     after step 1, by --max-time 0.001s" in done.stdout, "its time is over for good"
    trained_here(digits, copy, "--max-time=1h")
    assert json.loads((copy / "result.json").read_text())["ended"] == "length"


@dataclass
class Told:
    """What early stopping knows of a plan."""

    patience: int = 0
    max_time: float = 0.0
    total_steps: int = 100

    @property
    def config(self) -> "Told":
        return self


def test_time_of_earlier_starts_counts_and_another_ranks_clock_does_not():
    before = {"training_s": 50.0}
    clock = [9.0]
    early = EarlyStopping(Told(max_time=60.0), before, lambda: clock[0])
    assert not early.out_of_time() and early.state() == EarlyStoppingState(training_s=59.0)
    clock[0] = 10.0
    assert early.out_of_time() and early.reason is None, "the ranks have to agree first"
    early.time_is_up = True
    assert early.reason is Ended.MAX_TIME and early.conclude(7, stopping=False) is Ended.MAX_TIME
    assert early.conclude(7, stopping=True) is None and early.conclude(100, stopping=False) is Ended.LENGTH
    other = EarlyStopping(Told(max_time=60.0), before, None)
    assert not other.out_of_time() and other.state() == EarlyStoppingState(training_s=50.0)
    assert EarlyStopping(Told(max_time=40.0), before, None).reason is Ended.MAX_TIME


def test_patience_without_validation_images_is_refused(digits, tmp_path):
    done = train_here(digits, tmp_path / "run", *SMALL, "--patience=2", "--validation-fraction=0")
    assert (
        done.returncode == 2
        and "--patience needs a validation split, and --validation-fraction 0 gives it no images" in done.stderr
    )
