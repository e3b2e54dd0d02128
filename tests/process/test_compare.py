"""`dist-mnist compare`: tables of real run directories."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_mnist.reporting.statistics import mcnemar, wilson
from helpers.runs import dist_mnist

pytestmark = pytest.mark.xdist_group("compare")  # what all of these need is made once


def test_compare_three_runs_lists_figures_and_differences(finished_runs):
    done = dist_mnist("compare", *finished_runs)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    for path in finished_runs:
        result = json.loads((path / "result.json").read_text())
        line, figures = [line for line in done.stdout.splitlines() if path.name in line]
        low, high = wilson(result["correct"], result["images"])
        assert f"{result['accuracy']:.2%} ({low:.2%} to {high:.2%})" in line and f"{result['loss']:.4f}" in line
        assert f"{result['parameters']:,}" in line
        assert f"{result['macro_f1']:.2%}" in figures and f"{result['calibrated_loss']:.4f}" in figures
    assert " seed: 0 | 1 | 0\n" in done.stdout and " lr: 0.1 | 0.1 | 0.02\n" in done.stdout
    assert "run_dir" not in done.stdout and "McNemar" not in done.stdout


def test_compare_two_runs_tests_them_on_the_same_images(finished_runs):
    done = dist_mnist("compare", *finished_runs[:2], "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    contest, accuracies = found["contest"], [row["accuracy"] for row in found["runs"]]
    counts = [contest[name] for name in ("both", "only_first", "only_second", "neither")]
    assert sum(counts) == 200
    assert accuracies == [(counts[0] + counts[1]) / 200, (counts[0] + counts[2]) / 200]
    assert contest["p_value"] == mcnemar(counts[1], counts[2])
    for row in found["runs"]:
        result = json.loads((Path(row["run"]) / "result.json").read_text())
        assert all(row[name] == result[name] for name in ("balanced_accuracy", "macro_f1", "auc", "brier", "ece"))
    for name, mean in (("loss_difference", "loss"), ("brier_difference", "brier")):
        first, second = (row[mean] for row in found["runs"])
        assert contest[name]["mean"] == pytest.approx(first - second, abs=1e-6)
        assert contest[name]["low"] < contest[name]["mean"] < contest[name]["high"]
    with_itself = json.loads(dist_mnist("compare", finished_runs[0], finished_runs[0], "--json").stdout)["contest"]
    assert (with_itself["only_first"], with_itself["only_second"], with_itself["p_value"]) == (0, 0, 1)
    done = dist_mnist("compare", *finished_runs[:2])
    assert "of 200 test images" in done.stdout.lower() and "Loss of the first minus" in " ".join(done.stdout.split())
    assert max(map(len, done.stdout.splitlines())) <= 80 and f"{found['runs'][0]['auc']:.5f}" in done.stdout


def test_compare_mean_averages_over_seeds(finished_runs):
    found = json.loads(dist_mnist("compare", *finished_runs, "--mean", "--json").stdout)
    both, single = found["means"]
    one, other, _ = (json.loads((path / "result.json").read_text())["accuracy"] for path in finished_runs)
    assert (both["runs"], both["settings"], single["runs"]) == (2, {"lr": 0.1}, 1)
    assert both["accuracy"] == pytest.approx((one + other) / 2)
    half = 12.706 * abs(one - other) / 2
    ends = [max(0, both["accuracy"] - half), min(1, both["accuracy"] + half)]
    assert both["interval"] == pytest.approx(ends)
    assert single["interval"] is None and single["deviation"] is None
    assert "lr=0.02" in dist_mnist("compare", *finished_runs, "--mean").stdout


def copy(run: Path, folder: Path, change: Callable[[dict], object] = dict, times: list[float] | None = None) -> Path:
    """A run under another name, of which the config is changed, and the lines of metrics have those times."""
    shutil.copytree(run, folder)
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    if times:
        lines = (folder / "metrics.jsonl").read_text().splitlines()[: len(times)]
        records = [json.loads(line) | {"elapsed_s": time} for line, time in zip(lines, times, strict=True)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.mark.parametrize(
    ("change", "groups"),
    [
        (lambda config: config["settings"].pop("flip"), [2]),  # as a version wrote it that did not have it
        (lambda config: config["settings"].update(log_every=7), [2]),
        (lambda config: config["settings"].update(validate_every=10), [1, 1]),  # another checkpoint may be the best
        (lambda config: config["data"].update(fingerprint="0" * 64), [1, 1]),
    ],
)
def test_compare_mean_groups_runs_that_differ_in_their_seed_alone(finished_runs, tmp_path, change, groups):
    other = copy(finished_runs[1], tmp_path / "other", change)
    found = json.loads(dist_mnist("compare", finished_runs[0], finished_runs[0], other, "--mean", "--json").stdout)
    assert [row["runs"] for row in found["means"]] == groups


def test_compare_different_data_lists_runs_without_a_test(finished_runs, tmp_path):
    other = copy(finished_runs[1], tmp_path / "other", lambda config: config["data"].update(fingerprint="0" * 64))
    done = dist_mnist("compare", finished_runs[0], other)
    assert done.returncode == 0 and " data: " in done.stdout, done.stderr
    said = " ".join(done.stdout.split())
    assert "cannot be compared on the same images" in said and "were trained on different data" in said


def test_compare_resumed_run_sums_the_time_of_its_starts(finished_runs, tmp_path):
    again = copy(finished_runs[0], tmp_path / "again", times=[1.0, 5.0, 2.0, 3.5])
    [row, _] = json.loads(dist_mnist("compare", again, finished_runs[0], "--json").stdout)["runs"]
    assert row["training_s"] == 8.5


def test_compare_unfinished_run_is_listed_as_such(finished_runs, tmp_path):
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json").write_text((finished_runs[0] / "config.json").read_text())
    done = dist_mnist("compare", finished_runs[0], tmp_path / "begun")
    assert done.returncode == 0 and "not finished" in done.stdout and "McNemar" not in done.stdout
    found = json.loads(dist_mnist("compare", finished_runs[0], tmp_path / "begun", "--mean", "--json").stdout)
    assert [row["runs"] for row in found["means"]] == [1]


def test_compare_folder_that_is_no_run_is_refused(finished_runs, tmp_path):
    done = dist_mnist("compare", finished_runs[0], tmp_path)
    assert done.returncode == 2 and f"{tmp_path} is not a run directory" in done.stderr
    (tmp_path / "config.json").write_text("{")
    done = dist_mnist("compare", finished_runs[0], tmp_path)
    assert done.returncode == 2 and "cannot be read" in done.stderr and "Traceback" not in done.stderr
