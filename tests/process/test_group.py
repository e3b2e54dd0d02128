"""Collective parts of the package, each in a real gloo group of three ranks (see group_checks.py)."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import HANGS_AFTER_S

SCRIPT = Path(__file__).with_name("group_checks.py")
CHECKS = [*re.findall(r"^def check_(\w+)", SCRIPT.read_text(), re.MULTILINE), "no_thread_outlives_the_group"]
WORLD_SIZE = 3
pytestmark = [pytest.mark.quick, pytest.mark.xdist_group("group")]  # one group for all of them


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What each rank found, by check."""
    folder = tmp_path_factory.mktemp("group")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD_SIZE}"]
    command = [*torchrun, str(SCRIPT), str(folder)]
    done = subprocess.run(command, timeout=HANGS_AFTER_S, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(WORLD_SIZE)]


@pytest.mark.parametrize("check", CHECKS)
def test_collective_parts_in_a_group_of_three_pass_their_check(check: str, outcomes: list[dict[str, str]]) -> None:
    assert [outcome[check] for outcome in outcomes] == ["passed"] * WORLD_SIZE


def test_group_checks_are_all_run_on_every_rank(outcomes: list[dict[str, str]]) -> None:
    assert CHECKS
    assert all(set(outcome) == set(CHECKS) for outcome in outcomes)
