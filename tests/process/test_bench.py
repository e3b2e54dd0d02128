"""`dist-mnist bench` on small data: every part is measured, as ratios of one run, for people and for machines."""

import json

import pytest

from dist_mnist.tools import bench
from helpers.runs import SMALL, dist_mnist

pytestmark = pytest.mark.xdist_group("bench")  # what all of these need is made once


@pytest.fixture(scope="module", autouse=True)
def little_work():
    """Measurements so short that they prove what is measured and how it is told, not how fast it is."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"TRAINED_IMAGES": 100, "MATRIX": 64, "SCALING_STEPS": 2}.items():
            patch.setitem(getattr(bench, name), "cpu", value)
        patch.setattr(bench, "COPYING_S", 0.01)
        yield


@pytest.fixture(scope="module")
def result(digits) -> dict:
    done = dist_mnist("bench", f"--data-dir={digits}", *SMALL, "--rounds=1", "--json")
    assert done.returncode == 0, done.stderr
    assert all(line.startswith("measuring ") for line in done.stderr.splitlines()), done.stderr
    return json.loads(done.stdout)


def test_bench_measures_every_part_beside_its_limit(result):
    units = {figure["what"]: figure["unit"] for figure in result["figures"]}
    assert set(units.values()) == {"images/s", "ms"}
    for start in ("input, batch 100", "training, batch 256", "evaluation", "stall of a save", "start to first step"):
        assert any(what.startswith(start) for what in units), (start, units)
    for figure in result["figures"]:
        assert figure["limit"] and figure["ratio"] == figure["value"] / figure["limit_value"] > 0
    assert result["rounds"] == 1 and result["matrix_gflop_per_s"] > 0 and result["copied_gb_per_s"] > 0
    assert result["torch"] and result["recipe"] == "default"


def test_bench_scaling_measures_two_processes_where_there_are_two_cores(result):
    processes = [figure["what"] for figure in result["figures"] if "processes" in figure["what"]]
    assert processes[:1] == (["2 processes, batch 256"] if result["cores"] > 1 else [])


def test_bench_phases_add_up_to_a_whole_step(result):
    assert {"data", "forward", "backward", "optimizer"} == result["phases"].keys()
    assert sum(result["phases"].values()) == pytest.approx(1) and min(result["phases"].values()) > 0


def test_bench_some_parts_prints_a_page_of_these(digits):
    parts = ("--part=evaluation", "--part=phases", "--part=saving")
    done = dist_mnist("bench", f"--data-dir={digits}", *SMALL, "--rounds=1", *parts)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("evaluation") and "of bare inference" in line for line in lines), done.stdout
    assert any(line.startswith("stall of a save") and " ms" in line for line in lines)
    assert max(map(len, lines)) <= 100 and "training, batch" not in done.stdout


def test_bench_unknown_part_is_refused(digits):
    done = dist_mnist("bench", f"--data-dir={digits}", "--part=lop")
    assert done.returncode == 2 and "'lop'" in done.stderr and "loop" in done.stderr
