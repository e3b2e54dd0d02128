"""`--profile`: a trace of some steps, what is said of them, and that nothing else changes."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from dist_mnist.run.directory import RunDirectory
from dist_mnist.training.profiler import Breakdown
from helpers.runs import SMALL, digest, dist_mnist


def train(digits: Path, run_dir: Path, option: str, nproc: int = 1) -> str:
    """Train 40 steps; what is printed."""
    where = (f"--data-dir={digits}", f"--run-dir={run_dir}", "--steps=40", option)
    done = dist_mnist("train", f"--nproc={nproc}", "--max-restarts=0", *where, *SMALL)
    # A busy machine may hold up one of two ranks; that is said, as it is of any run.
    unexpected = [line for line in done.stderr.splitlines() if "times as long as the median rank" not in line]
    assert done.returncode == 0 and not unexpected, done.stderr
    return done.stdout


@pytest.mark.parametrize(("nproc", "all_reduces"), [(1, False), (2, True)])
def test_profile_writes_a_trace_and_says_what_bounds_the_run(digits, tmp_path, nproc, all_reduces):
    printed = train(digits, tmp_path / "run", "--profile", nproc)
    found = Breakdown(**json.loads((tmp_path / "run" / "profile" / "summary.json").read_text()))
    assert f"profile   {found}" in printed.splitlines()
    parts = [found.input, found.communication, found.launch, found.computation]
    assert sum(parts) == pytest.approx(1) and min(parts) >= 0
    assert (found.communication > 0) == all_reduces
    with gzip.open(tmp_path / "run" / "profile" / "rank0.step-00000010.pt.trace.json.gz", "rt") as file:
        names = Counter(event.get("name", "") for event in json.load(file)["traceEvents"])
    phases = {"data", "forward", "backward, all-reduce" if all_reduces else "backward", "optimizer"}
    assert {name: names[name] for name in phases} == dict.fromkeys(phases, 5)
    assert names["aten::nll_loss_forward"] == 5
    assert (names["gloo:all_reduce"] > 0) == all_reduces
    if not all_reduces:
        train(digits, tmp_path / "without", "--no-profile")
        assert digest(RunDirectory(tmp_path / "run")) == digest(RunDirectory(tmp_path / "without"))
        assert not (tmp_path / "without" / "profile").exists()
