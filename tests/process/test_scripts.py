"""The shell scripts. Nothing is installed: pip is a stand-in that notes how it is called."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dist_mnist.data.sources.synthetic import write_digits
from helpers import HANGS_AFTER_S
from helpers.runs import wait_for

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SCRIPTS = sorted(
    path
    for pattern in ("launch/**/*.sh", "slurm/**/*.sh", "tests/**/*.sh", ".ci/run")
    for path in ROOT.glob(pattern)
    if path.is_file()
)
FROM_OUTSIDE = ("DIST_MNIST_", "PIP_", "CI")  # variables that would change what the scripts do
# Stands in for the environment's Python: an installation is noted, takes a moment and may fail; all else is real.
PYTHON = """#!/bin/sh
case "$*" in
    "-m pip --version") exit 0 ;;
    "-m pip "*) echo "$*" >>"{log}"; echo "$PIP_USER ${{PIP_TARGET-}}" >>"{log}.variables"
        sleep 0.5; echo "pip's own words"; exit "${{PIP_EXIT:-0}}" ;;
esac
exec "{python}" "$@"
"""
REAL_COMMAND = '#!/bin/sh\nexec "{python}" -m dist_mnist "$@"\n'
NOTED_COMMAND = '#!/bin/sh\necho "$*" >>"{log}"\n[ "$1" = train ] || exit "${{DOWNLOAD_EXIT:-0}}"\n'


def test_scripts_of_the_repository_are_all_found():
    names = {str(path.relative_to(ROOT)) for path in SCRIPTS}
    assert names >= {"launch/local.sh", "launch/multinode.sh", "launch/setup.sh", "launch/in_image.sh"}
    assert names >= {"tests/run.sh", "tests/lint.sh", ".ci/run"}
    assert names >= {"slurm/train.sh", "slurm/sweep.sh", "slurm/eval.sh"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_script_is_executable_and_stops_at_the_first_error(script: Path):
    subprocess.run(["bash", "-n", script], check=True, timeout=HANGS_AFTER_S)
    assert "set -euo pipefail" in script.read_text()
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_script_asked_for_help_says_how_it_is_used(script: Path, option: str, tmp_path: Path):
    done = subprocess.run(["bash", script, option], capture_output=True, text=True, timeout=HANGS_AFTER_S, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert any(("run.sh" if script.name == "run" else script.name) in line for line in lines[:4]) and any(
        "What you may adapt" in line for line in lines
    )
    assert not any(line.startswith(("#", "set ")) for line in lines)


@pytest.mark.parametrize(
    ("script", "words", "says"),
    [
        ("launch/multinode.sh", ["--hosts"], "--hosts needs a value"),
        ("launch/multinode.sh", ["--hosts="], "--hosts expects comma-separated names"),
        ("launch/multinode.sh", ["--hosts", "a,,b"], "--hosts expects comma-separated names"),
        ("launch/multinode.sh", ["--hosts=a", "--rdzv-endpoint=a:1"], "--hosts sets the rendezvous endpoint"),
        ("launch/multinode.sh", ["--epochs=1", "--nnodes"], "--nnodes needs a value"),
        ("launch/setup.sh", ["tests"], "got tests"),
        ("slurm/sweep.sh", [], "no settings to combine"),
        ("slurm/sweep.sh", ["seed=0", "seed=0"], "seed=0 is repeated"),
        ("slurm/sweep.sh", ["run-dir=a"], "each combination has its own run directory"),
        ("slurm/sweep.sh", ["seed=0", "--run-dir=x"], "each combination has its own run directory"),
        ("slurm/sweep.sh", ["seed=0", "--epochs=1", "lr=1"], "give all NAME=VALUE before"),
        ("slurm/train.sh", [], "this is a Slurm job"),
        ("slurm/eval.sh", [], "this is a Slurm job"),
        ("launch/in_image.sh", ["train"], "DIST_MNIST_IMAGE is not set"),
    ],
)
def test_script_given_a_mistake_says_so_in_a_sentence(copy: "Copy", script: str, words: list[str], says: str):
    shutil.copytree(ROOT / "slurm", copy.root / "slurm")
    copy.run("launch/setup.sh")
    done = copy.run(script, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert not copy.commands


@dataclass(frozen=True)
class Copy:
    """A copy of what the scripts need, in a folder with a space in its name, with stand-ins in its environment."""

    root: Path

    @property
    def venv(self) -> Path:
        return self.root / ".venv"

    @property
    def pip_calls(self) -> list[str]:
        """How pip was called."""
        return _lines(self.root / "pip.log")

    @property
    def installations(self) -> list[str]:
        """Those of them that install the project itself."""
        return [call for call in self.pip_calls if "--editable" in call]

    @property
    def commands(self) -> list[str]:
        return _lines(self.root / "command.log")

    def start(self, script: str, *arguments: str, cwd: Path | None = None, **variables: str) -> subprocess.Popen[str]:
        outside = {name: value for name, value in os.environ.items() if not name.startswith(FROM_OUTSIDE)}
        return subprocess.Popen(
            ["bash", self.root / script, *arguments],
            cwd=cwd or self.root.parent,
            env=outside | {"PYTHONPATH": str(ROOT)} | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, script: str, *arguments: str, **options) -> subprocess.CompletedProcess[str]:
        process = self.start(script, *arguments, **options)
        try:
            output = process.communicate(timeout=HANGS_AFTER_S)
        finally:
            process.terminate()  # torchrun ends its ranks then
        return subprocess.CompletedProcess(arguments, process.returncode, *output)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def make_copy(tmp_path: Path) -> Callable[[str], Copy]:
    def make(command: str) -> Copy:
        copy = Copy(tmp_path / "a copy")
        shutil.copytree(ROOT / "launch", copy.root / "launch")
        shutil.copy(ROOT / "pyproject.toml", copy.root)
        programs = {"python": (PYTHON, "pip.log"), "dist-mnist": (command, "command.log")}
        (copy.venv / "bin").mkdir(parents=True)
        for name, (text, log) in programs.items():
            program = copy.venv / "bin" / name
            program.write_text(text.format(python=sys.executable, log=copy.root / log))
            program.chmod(0o755)
        return copy

    return make


@pytest.fixture
def copy(make_copy: Callable[[str], Copy]) -> Copy:
    return make_copy(NOTED_COMMAND)


# launch/setup.sh


def test_setup_started_again_installs_once(copy: Copy):
    first = copy.run("launch/setup.sh", "test")
    assert first.returncode == 0, first.stderr
    assert first.stdout == f"{copy.venv}/bin/python\n"
    assert len(first.stderr.splitlines()) == 1 and "Installing into" in first.stderr
    verified, installation, *apart = copy.pip_calls
    assert "--require-hashes --no-deps" in verified and verified.endswith("/launch/hashes-test.txt")
    assert "--no-build-isolation" in installation and installation.endswith(
        f"--constraint {copy.root}/launch/constraints.txt --editable {copy.root}[test]"
    )
    for name, call in zip(("networks", "trackers"), apart, strict=True):
        assert f"--no-deps --upgrade --target {copy.venv}/{name} --require-hashes" in call
    for extra in ([], ["test"]):  # what the tests need serves training too
        again = copy.run("launch/setup.sh", *extra)
        assert (again.returncode, again.stdout, again.stderr) == (0, first.stdout, "")
    assert copy.pip_calls == [verified, installation, *apart]


def test_setup_where_pip_is_set_to_install_elsewhere_installs_into_the_environment(copy: Copy):
    done = copy.run("launch/setup.sh", "test", PIP_USER="1", PIP_TARGET="/elsewhere")
    assert done.returncode == 0, done.stderr
    assert set(_lines(copy.root / "pip.log.variables")) == {"no "}


def test_setup_without_hashes_installs_any_build(copy: Copy):
    assert copy.run("launch/setup.sh", DIST_MNIST_HASHES="no").returncode == 0
    (installation,) = copy.pip_calls
    assert "isolation" not in installation and installation.endswith(f"--editable {copy.root}")


def test_pins_but_torchs_have_hashes():
    """And what the tests need aside, the hashes are of what the project needs: no more is installed for its users."""
    names = ("constraints.txt", "hashes.txt", "hashes-test.txt", "hashes-networks.txt", "hashes-trackers.txt")
    pins, core, others, networks, trackers = (
        {_pin(line) for line in _lines(ROOT / "launch" / name) if "==" in line} for name in names
    )
    assert sorted({*core, *others, *networks, *trackers}) == sorted(pin for pin in pins if pin[0] != "torch")
    assert {name for name, _ in networks} == {"timm", "torchvision"} and {"mlflow", "wandb"} < {*dict(trackers)}
    for name in names[1:]:
        lines = [line for line in (ROOT / "launch" / name).read_text().splitlines() if not line.startswith("#")]
        assert all(re.fullmatch(r"[\w.-]+==\S+ \\|    --hash=sha256:[0-9a-f]{64}( \\)?", line) for line in lines)
    own = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    assert own - {name for name, _ in core} == {"torch"}


def _pin(line: str) -> tuple[str, str]:
    name, version = line.removesuffix(" \\").split("==")
    return canonicalize_name(name), version


def test_setup_after_a_change_installs_again(copy: Copy):
    copy.run("launch/setup.sh")
    copy.run("launch/setup.sh", "test")
    assert [line.endswith("[test]") for line in copy.installations] == [False, True]
    with open(copy.root / "launch/constraints.txt", "a") as file:
        file.write("# another\n")
    copy.run("launch/setup.sh")
    assert len(copy.installations) == 3


def test_setup_that_fails_shows_why_and_leaves_no_stamp(copy: Copy):
    failed = copy.run("launch/setup.sh", PIP_EXIT="3")
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert "pip's own words" in failed.stderr and failed.stderr.splitlines()[-1].startswith("error: ")
    assert copy.run("launch/setup.sh").returncode == 0
    assert len(copy.installations) == 1 and len(copy.pip_calls) == 3


def test_setup_that_is_interrupted_leaves_no_stamp(copy: Copy):
    copy.run("launch/setup.sh")
    with open(copy.root / "pyproject.toml", "a") as file:
        file.write("# another\n")
    process = copy.start("launch/setup.sh")
    wait_for(lambda: len(copy.installations) == 2, process)
    process.kill()
    process.communicate(timeout=HANGS_AFTER_S)
    assert copy.run("launch/setup.sh").returncode == 0
    assert len(copy.installations) == 3


@pytest.mark.skipif(not shutil.which("flock"), reason="flock is not installed")
def test_setup_twice_at_once_installs_once(copy: Copy):
    processes = [copy.start("launch/setup.sh") for _ in range(2)]
    outputs = [process.communicate(timeout=HANGS_AFTER_S)[0] for process in processes]
    assert outputs == [f"{copy.venv}/bin/python\n"] * 2
    assert len(copy.installations) == 1


def test_setup_without_a_python_says_so_in_a_sentence(copy: Copy, tmp_path: Path):
    done = copy.run("launch/setup.sh", DIST_MNIST_VENV=str(tmp_path / "new"), DIST_MNIST_PYTHON="no-such-python")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: Python 3.11 or newer is needed")


def test_setup_with_a_python_without_venv_says_so_in_a_sentence(copy: Copy, tmp_path: Path):
    bare = tmp_path / "python-without-venv"
    bare.write_text(f'#!/bin/sh\ncase "$*" in *ensurepip*) exit 1 ;; esac\nexec "{sys.executable}" "$@"\n')
    bare.chmod(0o755)
    done = copy.run("launch/setup.sh", DIST_MNIST_VENV=str(tmp_path / "new"), DIST_MNIST_PYTHON=str(bare))
    assert done.returncode == 1
    assert "apt-get install python3-venv" in done.stderr.splitlines()[-1]


# launch/local.sh


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--steps", "3", "--help"]], ids=" ".join)
def test_local_asked_for_help_installs_nothing(copy: Copy, arguments: list[str]):
    done = copy.run("launch/local.sh", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert "bash launch/local.sh [training options]" in done.stdout
    assert "dist-mnist train --help" in done.stdout and "DIST_MNIST_DATA" in done.stdout
    assert not copy.installations and not copy.commands


@pytest.mark.parametrize("arguments", [["--dataset", "kmnist"], ["--dataset=kmnist"], ["--data-dir=/a b"]])
def test_local_given_data_leaves_them_to_the_trainer(copy: Copy, arguments: list[str]):
    assert copy.run("launch/local.sh", *arguments, "--steps", "3").returncode == 0
    assert copy.commands == [f"train {' '.join(arguments)} --steps 3"]


def test_local_with_data_in_the_environment_leaves_them_to_the_trainer(copy: Copy):
    assert copy.run("launch/local.sh", DIST_MNIST_DATA="somewhere").returncode == 0
    assert copy.commands == ["train"]


@pytest.mark.parametrize("folder", ["data", "data/mnist"])
def test_local_with_data_in_the_repository_finds_them(copy: Copy, folder: str):
    write_digits(copy.root / folder, num_train=10, num_test=10)
    assert copy.run("launch/local.sh", "--steps", "3", DIST_MNIST_DATA="").returncode == 0
    assert copy.commands == ["train --steps 3"]


def test_local_without_data_downloads_them(copy: Copy):
    assert copy.run("launch/local.sh", "--steps", "3").returncode == 0
    assert copy.commands == ["data get mnist", "train --steps 3"]


def test_local_without_a_mirror_that_answers_generates_digits(copy: Copy):
    done = copy.run("launch/local.sh", "--steps", "3", DOWNLOAD_EXIT="2")
    assert done.returncode == 0
    assert "no mirror answered" in done.stderr and "not MNIST" in done.stderr
    assert copy.commands == ["data get mnist", "train --steps 3 --dataset synthetic"]


def test_local_given_paths_takes_them_from_where_the_user_stands(copy: Copy, tmp_path: Path):
    arguments = ["--run-dir", "a run", "--data-dir=data", "--lr", "0.1", "--config", "mine.toml", "--init=runs/other"]
    arguments += ["--model", "mine.py:Net", "--model=resnet", "--model", "timm:x", "--config=/a.toml"]
    assert copy.run("launch/local.sh", *arguments, cwd=tmp_path).returncode == 0
    assert copy.commands == [
        f"train --run-dir {tmp_path}/a run --data-dir={tmp_path}/data --lr 0.1 --config {tmp_path}/mine.toml "
        f"--init={tmp_path}/runs/other --model {tmp_path}/mine.py:Net --model=resnet --model timm:x --config=/a.toml"
    ]


def test_local_on_a_small_set_trains_and_evaluates(make_copy: Callable[[str], Copy], tmp_path: Path):
    write_digits(tmp_path / "a set", num_train=400, num_test=100)
    arguments = ["--data-dir", "a set", "--run-dir", "a run", "--steps", "3", "--batch-size", "64"]
    done = make_copy(REAL_COMMAND).run("launch/local.sh", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "a run/result.json").read_text())
    assert (result["split"], result["images"], result["step"]) == ("test", 100, 3)
    assert result["correct"] == sum(result["confusion_matrix"][label][label] for label in range(10))


# launch/in_image.sh


@pytest.fixture
def apptainer(tmp_path: Path) -> Path:
    """A folder with a stand-in that notes how it is called, for PATH."""
    program = tmp_path / "bin" / "apptainer"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "${{PYTHONPATH-none}} $*" >>"{tmp_path}/apptainer.log"\nexit 7\n')
    program.chmod(0o755)
    return program.parent


def test_in_image_runs_the_command_in_the_image(copy: Copy, apptainer: Path, tmp_path: Path):
    variables = {
        "DIST_MNIST_IMAGE": "an image.sif",
        "DIST_MNIST_DATA": "/data",
        "PATH": f"{apptainer}:{os.environ['PATH']}",
    }
    done = copy.run("launch/in_image.sh", "train", "--run-dir", "a run", cwd=tmp_path, **variables)
    assert done.returncode == 7, "the exit code is that of what runs there"
    (call,) = _lines(tmp_path / "apptainer.log")
    gpus = "--nv " if Path("/dev/nvidiactl").exists() else ""
    words = f"--bind {tmp_path} --bind /data {gpus}an image.sif dist-mnist train --run-dir a run"
    assert call == f"none exec {words}"


def test_in_image_mounts_a_relative_folder_and_refuses_one_that_apptainer_would_split(
    copy: Copy, apptainer: Path, tmp_path: Path
):
    variables = {"DIST_MNIST_IMAGE": "a.sif", "PATH": f"{apptainer}:{os.environ['PATH']}"}
    words = ("launch/in_image.sh", "train")
    assert copy.run(*words, cwd=tmp_path, DIST_MNIST_DATA="my data", **variables).returncode == 7
    assert f"--bind {tmp_path} --bind {tmp_path}/my data " in _lines(tmp_path / "apptainer.log")[0]
    (odd := tmp_path / "runs,2026:11").mkdir()
    for where in ({"cwd": odd}, {"cwd": tmp_path, "DIST_MNIST_DATA": "runs,2026:11"}):
        done = copy.run(*words, **where, **variables)  # type: ignore[arg-type]
        assert done.returncode == 2 and f"{odd} cannot be mounted into the image: the path has a colon" in done.stderr
    assert len(_lines(tmp_path / "apptainer.log")) == 1


def test_in_image_without_a_runtime_says_so(copy: Copy, tmp_path: Path):
    (tmp_path / "bash").symlink_to(shutil.which("bash") or "bash")
    done = copy.run("launch/in_image.sh", "train", PATH=str(tmp_path), DIST_MNIST_IMAGE="a.sif")
    assert done.returncode == 2 and "neither apptainer nor singularity is installed" in done.stderr


# A clone


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_scripts_of_a_clone_made_on_windows_have_no_carriage_returns(tmp_path: Path):
    def git(*words: object) -> None:
        subprocess.run(
            ["git", "-c", "core.autocrlf=true", *map(str, words)],
            check=True,
            capture_output=True,
            timeout=HANGS_AFTER_S,
        )

    origin = tmp_path / "origin"
    for name in ("launch", "slurm", ".ci"):
        shutil.copytree(ROOT / name, origin / name)
    shutil.copy(ROOT / ".gitattributes", origin)
    git("init", "--quiet", origin)
    git("-C", origin, "add", ".")
    git("-C", origin, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "all")
    git("clone", "--quiet", origin, tmp_path / "clone")
    files = [path for path in (tmp_path / "clone").rglob("*") if path.is_file() and ".git" not in path.parts]
    assert len(files) > 8 and not [path for path in files if b"\r" in path.read_bytes()]


# tests/run.sh


def test_run_bench_starts_the_comparison_in_its_short_form(copy: Copy):
    (copy.root / "tests" / "benchmarks").mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "run.sh", copy.root / "tests")
    (copy.root / "tests" / "benchmarks" / "against.py").write_text("import sys; print(*sys.argv[1:])")
    done = copy.run("tests/run.sh", "bench", "HEAD~3", "--steps=2")
    assert (done.returncode, done.stdout) == (0, "--rounds 3 --steps 45 HEAD~3 --steps=2\n"), done.stderr
    assert len(copy.installations) == 1 and "[test]" in copy.installations[0]
