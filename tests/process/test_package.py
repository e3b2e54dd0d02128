"""The wheel: built from a copy of the sources, installed into an environment where the sources are not, and used."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from dist_mnist import __version__
from helpers import HANGS_AFTER_S

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.xdist_group("compare")  # with whose tests this shares its runs


def run(*command: object, folder: Path) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=HANGS_AFTER_S, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The `bin` of an environment with the wheel, and with what it needs, but without the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"
    shutil.copytree(ROOT / "dist_mnist", sources / "dist_mnist", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, sources, folder=folder)
    [wheel] = folder.glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", folder=folder)
    run(*pip, f"--python={folder}/venv/bin/python", "install", "--no-deps", "--no-index", wheel, folder=folder)
    [site_packages] = (folder / "venv").glob("lib/python*/site-packages")
    (site_packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "venv" / "bin"


def test_wheel_without_the_sources_makes_a_report(installed, finished_runs, tmp_path):
    where = run(installed / "python", "-c", "import dist_mnist; print(dist_mnist.__file__)", folder=tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parent)
    page = run(installed / "dist-mnist", "report", finished_runs[0], "--output", "page.html", folder=tmp_path)
    assert page == "page.html\n" and (tmp_path / "page.html").stat().st_size > 50_000
    [package] = installed.parent.glob("lib/python*/site-packages/dist_mnist")
    assert (package / "py.typed").exists()
    assert {path.name for path in (package / "serving" / "page").iterdir()} == {"page.html", "page.css", "page.js"}


def test_wheel_module_and_command_are_the_same(installed, tmp_path):
    by_name = run(installed / "dist-mnist", "recipes", "--json", folder=tmp_path)
    assert by_name == run(installed / "python", "-m", "dist_mnist", "recipes", "--json", folder=tmp_path)
    assert run(installed / "dist-mnist", "--version", folder=tmp_path).startswith(f"dist-mnist {__version__} (numpy ")
