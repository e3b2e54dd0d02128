"""`--profile`: a trace of some steps, what is said of them, and that nothing else changes."""

import gzip
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from dist_mnist.run.directory import RunDirectory
from dist_mnist.training.profiler import Spans, covered, sentence, shares
from helpers.runs import SMALL, digest


def train(digits: Path, run_dir: Path, *options: str, nproc: int = 1) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "dist_mnist",
        "train",
        f"--nproc={nproc}",
        "--max-restarts=0",
        f"--data-dir={digits}",
    ]
    return subprocess.run(
        [*command, f"--run-dir={run_dir}", *SMALL, *options], capture_output=True, text=True, timeout=100
    )


@pytest.mark.parametrize(("nproc", "all_reduces"), [(1, False), (2, True)])
def test_a_trace_and_a_sentence(digits, tmp_path, nproc, all_reduces):
    done = train(digits, tmp_path / "run", "--steps=40", "--profile", nproc=nproc)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    [said] = [line for line in done.stdout.splitlines() if line.startswith("profile")]
    found = json.loads((tmp_path / "run" / "profile" / "summary.json").read_text())
    assert sentence(found) in said
    parts = [found[name] for name in ("input", "communication", "launch", "computation")]
    assert sum(parts) == pytest.approx(1) and min(parts) >= 0
    assert (found["communication"] > 0) == all_reduces
    with gzip.open(tmp_path / "run" / "profile" / "rank0.step-00000010.pt.trace.json.gz", "rt") as file:
        names = Counter(event.get("name", "") for event in json.load(file)["traceEvents"])
    phases = {"data", "forward", "backward, all-reduce" if all_reduces else "backward", "optimizer"}
    assert {name: names[name] for name in phases} == dict.fromkeys(phases, 5)
    assert names["aten::nll_loss_forward"] == 5
    assert (names["gloo:all_reduce"] > 0) == all_reduces


def test_it_changes_nothing(digits, tmp_path):
    for name, option in (("with", "--profile"), ("without", "--no-profile")):
        assert train(digits, tmp_path / name, "--steps=40", option).returncode == 0
    assert digest(RunDirectory(tmp_path / "with")) == digest(RunDirectory(tmp_path / "without"))
    assert not (tmp_path / "without" / "profile").exists()


@pytest.mark.parametrize(("steps", "first"), [(3, 1), (9, 3)])
def test_short_runs_are_profiled_as_they_can(digits, tmp_path, steps, first):
    done = train(digits, tmp_path / "run", f"--steps={steps}", "--profile")
    assert done.returncode == 0 and "profile   this run is bound by" in done.stdout
    assert (tmp_path / "run" / "profile" / f"rank0.step-{first:08}.pt.trace.json.gz").exists()


def test_a_run_that_goes_on_is_profiled_again(digits, tmp_path):
    for steps in (40, 80):
        same_rate = ("--schedule=constant", "--warmup-fraction=0")
        done = train(digits, tmp_path / "run", f"--steps={steps}", "--profile", *same_rate)
        assert done.returncode == 0, done.stderr
    traces = sorted(path.name for path in (tmp_path / "run" / "profile").glob("*.gz"))
    assert traces == [f"rank0.step-{step:08}.pt.trace.json.gz" for step in (10, 50)]


def test_too_short_a_run_is_told(digits, tmp_path):
    done = train(digits, tmp_path / "run", "--steps=2", "--profile")
    assert done.returncode == 0 and "test accuracy" in done.stdout
    assert "--profile needs 3 steps, and this run has 2 to go" in done.stderr


def test_training_goes_on_where_no_profile_can_be_written(digits, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profile").write_text("in the way")
    done = train(digits, tmp_path / "run", "--steps=40", "--profile")
    assert done.returncode == 0 and "test accuracy" in done.stdout
    assert "the profile cannot be written" in done.stderr and "Traceback" not in done.stderr


def test_the_union_of_intervals():
    assert covered([]) == 0
    assert covered([(5, 7), (0, 2), (1, 3), (1, 2), (7, 8)]) == 6


SECONDS = Counter({"data": 1.0, "forward": 3.0, "backward": 5.0, "optimizer": 1.0})


@pytest.mark.parametrize(
    ("computing", "communicating", "seconds", "bound_by", "expected"),
    [
        ([(0, 50), (40, 95)], [], SECONDS, "computation", {"input": 0.05, "launch": 0, "communication": 0}),
        ([(0, 50)], [(40, 90)], SECONDS, "communication", {"input": 0.1, "launch": 0, "communication": 0.4}),
        ([(0, 10), (50, 80)], [], SECONDS, "launch", {"input": 0.1, "launch": 0.5, "communication": 0}),
        ([(0, 60)], [], SECONDS + Counter(data=10), "input", {"input": 0.4, "launch": 0, "communication": 0}),
    ],
)
def test_what_bounds_a_run_on_a_gpu(computing, communicating, seconds, bound_by, expected):
    """Kernels in recorded steps from 0 to 100; the host's seconds."""
    found = shares(Spans(computing, communicating, (0, 100)), seconds, on_gpu=True)
    assert found["bound_by"] == bound_by
    assert {name: found[name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("computing", "more", "bound_by", "expected"),
    [
        ([(0, 92)], {}, "computation", {"input": 0.1, "launch": 0, "communication": 0}),
        ([(0, 60)], {}, "launch", {"input": 0.1, "launch": 0.3, "communication": 0}),
        ([(0, 60)], {"waiting": 3.0}, "communication", {"input": 0.1, "launch": 0, "communication": 0.3}),
        ([(0, 60)], {"data": 10.0}, "input", {"input": 11 / 20, "launch": 0, "communication": 0}),
    ],
)
def test_what_bounds_a_run_on_a_cpu(computing, more, bound_by, expected):
    """Operators in recorded steps from 0 to 100; the host's seconds."""
    found = shares(Spans(computing, [], (0, 100)), SECONDS + Counter(more), on_gpu=False)
    assert found["bound_by"] == bound_by
    assert {name: found[name] for name in expected} == pytest.approx(expected)
