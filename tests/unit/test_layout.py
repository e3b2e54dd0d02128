"""The shape of the package: which way imports run, how full its folders are, and that imports do nothing else."""

import subprocess
import sys
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

from helpers import HANGS_AFTER_S

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "dist_mnist"
FOLDERS = [PACKAGE, *(path.parent for path in PACKAGE.glob("**/__init__.py") if path.parent != PACKAGE)]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if path.stem != "__main__"  # which is run, not imported
)
# What is checked before processes start must not wait for torch, whose import takes seconds.
LIGHT = ("cli", "config", "utils", "run.plan", "data.sources", "elastic.torchrun", "elastic.agent")

# All that importing could change; a parser of arguments would end the process at this one.
IMPORT = """
import importlib, os, signal, sys, threading
sys.argv = ["program", "--no-such-option"]
def state():
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    return handlers, dict(os.environ), os.getcwd(), os.listdir(), sys.argv[:], threading.enumerate()
before = state()
for name in {modules}:
    importlib.import_module(name)
assert state() == before, (before, state())
print("torch" in sys.modules)
"""


def import_alone(modules: list[str], folder: Path) -> str:
    """Import them all in a process of its own, which checks that nothing changes, and says whether torch came along."""
    command = [sys.executable, "-c", IMPORT.format(modules=modules)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS_AFTER_S, cwd=folder)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def test_imports_of_all_modules_keep_the_contract_of_layers(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert lint_imports(no_cache=True) == 0, capsys.readouterr().out


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_folder_of_the_package_holds_few_modules(folder):
    files = [path.name for path in folder.glob("*.py")]
    assert len(files) <= 5 if folder == PACKAGE else len(set(files) - {"__init__.py"}) <= 8, files


def test_import_of_every_module_has_no_effect(tmp_path):
    assert import_alone(MODULES, tmp_path) == "True\n"


def test_import_of_what_runs_before_processes_start_needs_no_torch(tmp_path):
    light = [name for name in MODULES if name.startswith(tuple(f"dist_mnist.{wing}" for wing in LIGHT))]
    assert len(light) > 25
    assert import_alone(light, tmp_path) == "False\n"
