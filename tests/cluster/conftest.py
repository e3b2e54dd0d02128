"""One cluster for all tests of this folder, and a copy of the repository's scripts to submit from."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import slurm as cluster
from helpers.slurm import Login, Slurm

ROOT = Path(__file__).resolve().parents[2]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests of this folder, as they wait most of the time."""
    here = [item for item in items if item.path.is_relative_to(Path(__file__).parent)]
    items.sort(key=lambda item: item not in here)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory) -> Iterator[Slurm]:
    """The cluster, where there can be one."""
    if reason := cluster.why_not():
        pytest.skip(f"Slurm: {reason}")
    with cluster.cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture
def login(slurm, tmp_path) -> Iterator[Login]:
    """A user, whose jobs are gone after the test."""
    root = tmp_path / "repository"
    for name in ("slurm", "launch"):
        shutil.copytree(ROOT / name, root / name)
    (root / "launch" / "setup.sh").write_text(f"echo {sys.executable}\n")  # the set-up that these tests run in
    user = Login(slurm, root)
    yield user
    user.logout()
