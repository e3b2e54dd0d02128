"""`dist-mnist bench` on small data: every part is measured, as ratios of one run, for people and for machines."""

import json
import subprocess
import sys

import pytest

from dist_mnist.tools.bench import Figure
from helpers import HANGS_AFTER_S

SMALL = ("--conv-channels=4,4", "--dense-units=16", "--batch-size=50", "--device=cpu", "--threads=1")

pytestmark = pytest.mark.xdist_group("bench")  # what all of these need is made once


def bench(digits, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dist_mnist", "bench", f"--data-dir={digits}", *SMALL, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANGS_AFTER_S)


@pytest.fixture(scope="module")
def result(digits) -> dict:
    done = bench(digits, "--rounds=1", "--json")
    assert done.returncode == 0, done.stderr
    # A busy machine may hold up one of two ranks; that is said, as it is of any run.
    unexpected = [line for line in done.stderr.splitlines() if not line.startswith("measuring ")]
    assert all("times as long as the median rank" in line for line in unexpected), done.stderr
    return json.loads(done.stdout)


def test_every_part_is_measured_beside_its_limit(result):
    units = {figure["what"]: figure["unit"] for figure in result["figures"]}
    assert set(units.values()) == {"images/s", "ms"}
    for start in ("input, batch 100", "training, batch 256", "evaluation", "stall of a save", "start to first step"):
        assert any(what.startswith(start) for what in units), (start, units)
    for figure in result["figures"]:
        assert figure["limit"] and figure["ratio"] == figure["value"] / figure["limit_value"] > 0
    assert result["rounds"] == 1 and result["matrix_gflop_per_s"] > 0 and result["copied_gb_per_s"] > 0


def test_a_ratio_compares_what_was_measured_in_the_same_round():
    pairs = iter([(2.0, 4.0), (30.0, 40.0), (10.0, 40.0)])
    summary = Figure("work", "ms", "less work", lambda: next(pairs)).summary(3)
    assert (summary["ratio"], summary["lowest"], summary["highest"]) == (0.5, 0.25, 0.75)
    assert (summary["value"], summary["limit_value"]) == (10, 40)


def test_the_phases_of_a_step_make_up_the_whole(result):
    assert {"data", "forward", "backward", "optimizer"} == result["phases"].keys()
    assert sum(result["phases"].values()) == pytest.approx(1) and min(result["phases"].values()) > 0


def test_larger_clusters_need_larger_batches(result):
    clusters = result["model"]["clusters"]
    assert [row["gpus"] for row in clusters] == [8, 64, 512]
    for row in clusters:
        shares = list(row["efficiency"].values())
        assert 0 < shares[0] < shares[-1] <= 1
    needed = [row["batch_per_gpu_for_90_percent"] for row in clusters]
    assert needed == sorted(needed)


def test_a_page_that_fits_a_terminal(digits):
    done = bench(digits, "--rounds=1", "--part=evaluation", "--part=phases", "--part=saving")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("evaluation") and "of bare inference" in line for line in lines), done.stdout
    assert any(line.startswith("stall of a save") and " ms" in line for line in lines)
    assert max(map(len, lines)) <= 100 and "training, batch" not in done.stdout


def test_a_part_that_does_not_exist(digits):
    done = bench(digits, "--part=lop")
    assert done.returncode == 2 and "'lop' is not one of 'input'" in done.stderr
