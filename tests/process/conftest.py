"""Real processes for the tests of this folder: none outlives its test."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dist_mnist.elastic.agent import children
from helpers import HANGS_AFTER_S
from helpers.runs import end, start

Launcher = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def ranks_of() -> Callable[[int], list[int]]:
    """`ranks_of(pid)`: the processes that torchrun, or `dist-mnist train`, has started as ranks."""
    return lambda pid: [rank.pid for rank in children(pid)]


@pytest.fixture
def launch() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`launch(nproc, *arguments)` starts torchrun (or, with nproc 1, python) and returns at once."""
    started = []

    def launch(nproc: int, *arguments: object, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"] if nproc > 1 else []
        started.append(start(sys.executable, *torchrun, *map(str, arguments), env=env))
        return started[-1]

    yield launch
    for process in started:
        if process.poll() is None:
            end(process)


@pytest.fixture
def run(launch: Callable[..., subprocess.Popen[str]]) -> Launcher:
    """`run(nproc, *arguments)` is `launch`, waited for; `.stdout`, `.stderr` and `.returncode` tell what came of it."""

    def run(nproc: int, *arguments: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        process = launch(nproc, *arguments, env=env)
        out, err = process.communicate(timeout=HANGS_AFTER_S)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return run


@pytest.fixture
def train(run: Launcher, digits: Path) -> Launcher:
    """`train(nproc, run_dir, *options)` trains on the small generated set, and fails the test if that fails."""

    def train(nproc: int, run_dir: Path, *options: object) -> subprocess.CompletedProcess[str]:
        settings = (f"--data-dir={digits}", f"--run-dir={run_dir}", "--device=cpu", "--no-tensorboard", *options)
        done = run(nproc, "-m", "dist_mnist.train", *settings)
        assert done.returncode == 0, done.stderr
        return done

    return train
