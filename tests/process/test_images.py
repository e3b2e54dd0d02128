"""The recipes of images. None is built: what they copy is there, and suffices for the set-up that they run."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from dist_mnist.utils.versions import __version__
from helpers import HANGS_AFTER_S

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "launch" / "Dockerfile").read_text()
DEFINITION = (ROOT / "launch" / "apptainer.def").read_text()
OF_DOCKER = [words.split() for words in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE)]
OF_APPTAINER = [line.split() for line in DEFINITION.split("%files")[1].split("\n\n")[0].strip().splitlines()]


@pytest.mark.parametrize("copied", [OF_DOCKER[:-1], OF_APPTAINER], ids=["Docker", "Apptainer"])
def test_files_of_the_image_suffice_to_install_the_project(copied, tmp_path):
    allowed = [line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"]
    for *sources, target in copied:
        there = tmp_path / target.removeprefix("/opt/dist-mnist/")
        for source in (path for pattern in sources for path in ROOT.glob(pattern)):
            assert str(source.relative_to(ROOT)).startswith(tuple(allowed)), f"{source} is kept from builds"
            ignored = shutil.ignore_patterns("__pycache__")
            if source.is_dir():
                shutil.copytree(source, there, ignore=ignored)
            else:
                folder = there if target.endswith("/") else there.parent
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, folder)
    assert {path.name for path in (tmp_path / "launch").iterdir()} >= {"setup.sh", "constraints.txt", "hashes.txt"}
    build = "from setuptools import build_meta; print(build_meta.prepare_metadata_for_build_editable('.'))"
    done = subprocess.run(
        [sys.executable, "-c", build], capture_output=True, text=True, timeout=HANGS_AFTER_S, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert f"\nVersion: {__version__}\n" in (tmp_path / done.stdout.split()[-1] / "METADATA").read_text()


def test_extras_that_images_have_are_the_projects():
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r"EXTRAS=([\w,]+)", DOCKERFILE + DEFINITION)
    assert len(named) == 4 and {extra for one in named for extra in one.split(",")} <= known.keys()


def test_image_runs_as_no_particular_user_and_holds_no_secret():
    users = re.findall(r"^USER (.*)$", DOCKERFILE, re.MULTILINE)
    assert users == ["1000:1000"], "a number, by which Kubernetes can tell that it is not root"
    assert "type=secret" in DOCKERFILE and not re.search(r"(?i)password|token|://[^/\s]*@", DOCKERFILE + DEFINITION)
