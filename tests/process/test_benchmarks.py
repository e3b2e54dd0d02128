"""The commands that measure, in a form so small that it proves what they do, not how fast anything is."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import HANGS_AFTER_S
from helpers.runs import end, start, wait_for

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "tests" / "benchmarks"


def git(folder: Path, *words: object) -> str:
    names = ("-c", "user.name=x", "-c", "user.email=x@example.org")
    command = ["git", "-C", folder, *names, *map(str, words)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=HANGS_AFTER_S).stdout


@pytest.fixture
def repository(tmp_path) -> Path:
    """A repository of this package with two commits, of which the first has no recipe `best`."""
    folder = tmp_path / "a repository"
    for part in ("dist_mnist", "tests/benchmarks"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    recipes = folder / "dist_mnist" / "config" / "recipes.py"
    whole = recipes.read_text()
    git(folder.parent, "init", "--quiet", folder)
    for text in (whole.replace('"best": Recipe(', '"better": Recipe('), whole):
        recipes.write_text(text)
        git(folder, "add", ".")
        git(folder, "commit", "--quiet", "--message", f"{len(text)} characters")
    return folder


@pytest.fixture
def against(repository, digits) -> Iterator[subprocess.Popen[str]]:
    """The comparison of the two commits, started."""
    options = (f"--data-dir={digits}", "--rounds=1", "--steps=2")
    process = start(sys.executable, str(repository / "tests/benchmarks/against.py"), *options)
    yield process
    if process.poll() is None:
        end(process)


def worktrees(repository: Path) -> list[str]:
    return git(repository, "worktree", "list").splitlines()


def test_against_compares_with_the_commit_before_and_leaves_nothing(against, repository):
    out, err = against.communicate(timeout=HANGS_AFTER_S)
    assert against.returncode == 0, err
    first = git(repository, "log", "-1", "--format=%h", "HEAD~1").strip()
    assert out.startswith(f"baseline: {first} ")
    tables = [line for line in out.splitlines() if "medians of 1 rounds; ratio to 'baseline'" in line]
    default = "training, default, batch 250"
    for what in (f"{default}, images/s", f"{default}, two processes", "notebook", "first step", "loader, batch 100"):
        assert any(what in line for line in tables), (what, out)
    assert not any("best" in line for line in tables)  # which the first commit lacks
    assert out.count("this checkout") == len(tables)
    assert len(worktrees(repository)) == 1 and not list(Path(os.environ["TMPDIR"]).glob("*/baseline"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_against_that_is_interrupted_leaves_no_checkout(against, repository, number):
    wait_for(lambda: len(worktrees(repository)) == 2, against)
    assert against.stdout.readline().startswith("baseline: ")
    against.send_signal(number)
    _, err = against.communicate(timeout=HANGS_AFTER_S)
    assert against.returncode == 128 + number and "Traceback" not in err, err
    assert len(worktrees(repository)) == 1 and not list(Path(os.environ["TMPDIR"]).glob("*/baseline"))


def test_against_a_commit_that_is_none_is_a_sentence(repository, digits):
    command = [sys.executable, repository / "tests/benchmarks/against.py", "no-such-commit", f"--data-dir={digits}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS_AFTER_S)
    assert done.returncode == 1 and done.stderr.startswith("error: git ") and "no-such-commit" in done.stderr


def test_peers_tells_times_accuracies_and_where_a_run_spends_its_time(digits, tmp_path):
    options = [f"--data-dir={digits}", "--rounds=1", "--epochs=1", "--peers=conventional,fast", "--breakdown"]
    command = [sys.executable, BENCHMARKS / "peers.py", *options, f"--json={tmp_path / 'peers.json'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS_AFTER_S)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "peers.json").read_text())
    assert found["torch"] and found["cores"] and found["rounds"] == 1
    conventional, fast = found["peers"]
    assert (conventional["name"], conventional["times_as_fast"]["median"]) == ("conventional", 1)
    ratio = conventional["rounds"][0]["tested_s"] / fast["rounds"][0]["tested_s"]
    assert fast["times_as_fast"]["median"] == pytest.approx(ratio)
    for peer in (conventional, fast):
        assert 0 < peer["tested_s"]["median"] <= peer["whole_s"]["median"]
        assert peer["mean_accuracy"] == peer["rounds"][0]["accuracy"] and f"{peer['mean_accuracy']:.3%}" in done.stdout
    assert fast["rounds"][0]["told"]["since_start"] < fast["whole_s"]["median"]
    seconds = {part["name"]: part["seconds"]["median"] for part in fast["breakdown"]}
    whole = seconds.pop("whole process")
    assert list(seconds) == ["imports", "set-up", "training", "evaluation", "exit"]
    assert sum(seconds.values()) == pytest.approx(whole)
    limits = {part["name"]: part["limit"] for part in fast["breakdown"] if part["limit_seconds"]}
    assert limits == {
        "imports": "import torch", "training": "a bare loop", "evaluation": "bare inference",
        "exit": "exit after import torch",
    }  # fmt: skip


def gpu(digits: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, BENCHMARKS / "gpu.py", f"--data-dir={digits}", *options]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, timeout=HANGS_AFTER_S, env=hidden)


def test_gpu_on_a_cpu_goes_through_all_of_it(digits, tmp_path):
    options = ("--device=cpu", "--quick", "--recipes=fast", "--record=fast", f"--json={tmp_path / 'gpu.json'}")
    done = gpu(digits, *options)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    training, evaluation = found["figures"]["fast"]
    assert (training["what"], training["limit"]) == ("training, batch 50", "a bare loop")
    assert (evaluation["what"], evaluation["limit"]) == ("evaluation", "bare inference")
    assert training["ratio"] == training["value"] / training["limit_value"] > 0
    record = found["record"]
    low, high = record["interval"]
    assert len(record["accuracies"]) == 2 and low <= record["mean_accuracy"] == sum(record["accuracies"]) / 2 <= high
    order = ("training_s", "training_with_evaluation_s", "tested_s", "whole_s")
    assert sorted(order, key=record.__getitem__) == list(order) and record["training_s"] > 0
    assert "fast, training, batch 50: " in done.stdout and "fast, 2 seeds: training " in done.stdout


def test_gpu_without_one_says_so_in_a_sentence(digits):
    done = gpu(digits)
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.startswith("error: torch finds no GPU here")
