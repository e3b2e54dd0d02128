"""Collective parts of the package, each in a real gloo group of three ranks (see group_checks.py)."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("group_checks.py")
CHECKS = [*re.findall(r"^def check_(\w+)", SCRIPT.read_text(), re.MULTILINE), "no_thread_outlives_the_group"]
WORLD_SIZE = 3


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What each rank found, by check."""
    folder = tmp_path_factory.mktemp("group")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD_SIZE}"]
    subprocess.run([*torchrun, str(SCRIPT), str(folder)], timeout=110, check=True, capture_output=True)
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(WORLD_SIZE)]


@pytest.mark.parametrize("check", CHECKS)
def test_group(check: str, outcomes: list[dict[str, str]]) -> None:
    assert [outcome[check] for outcome in outcomes] == ["passed"] * WORLD_SIZE


def test_no_check_is_left_out(outcomes: list[dict[str, str]]) -> None:
    assert CHECKS
    assert all(set(outcome) == set(CHECKS) for outcome in outcomes)
