"""What tests of whole runs share: settings that make them short; starting, waiting and ending; the digest of an end."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

from dist_mnist.cli import app as cli
from dist_mnist.elastic.progress import read_progress
from dist_mnist.run.checkpoint import arrays_digest, load_checkpoint
from dist_mnist.run.directory import RunDirectory

SMALL = (
    "--batch-size=50",
    "--conv-channels=4,4",
    "--dense-units=16",
    "--device=cpu",
    "--no-tensorboard",
    "--threads=1",
)
TIMEOUT_S = 60


def dist_mnist(*words: object, folder: Path | None = None, stdin: bytes = b"") -> subprocess.CompletedProcess[str]:
    """The command, to its end: training in processes of its own, all else here, where torch is imported already."""
    command = [sys.executable, "-m", "dist_mnist", *map(str, words)]
    if words[0] == "train":
        return subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=folder)
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err), chdir(folder or "."):
        patch.setattr("sys.argv", ["dist-mnist", *command[3:]])
        patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        threads = torch.get_num_threads()
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            torch.set_num_threads(threads)
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


def start(*command: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Start a command in a session of its own, so that it can be ended together with all its children."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )


def end(process: subprocess.Popen[str]) -> None:
    """End a command's whole session, and the sessions that torchrun gave its workers."""
    for pid in [*descendants(process.pid), process.pid]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.communicate()


def descendants(pid: int) -> list[int]:
    """All processes below `pid`, in any session."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [pid for child in children for pid in (*descendants(child), child)]


def wait_for(condition: Callable[[], object], *processes: subprocess.Popen, timeout_s: float = TIMEOUT_S) -> None:
    """Return as soon as the condition holds; an error if that takes too long, or one of the processes ends before."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert all(process.poll() is None for process in processes), "a process ended before"
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.002)


def reaches(run: RunDirectory, step: int) -> Callable[[], bool]:
    """Whether the run has come to a step, as a condition to wait for."""
    return lambda: (read_progress(run.progress_path) or (-1, ""))[0] >= step


def records(run_dir: Path, kind: str) -> list[dict]:
    """What a run has measured: its lines of a kind, `train` or `validation`."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def losses(run_dir: Path) -> list[float]:
    """The losses of a run's training at its log lines."""
    return [record["loss"] for record in records(run_dir, "train")]


def digest(run: RunDirectory) -> str:
    """The SHA-256 of all arrays of the run's last checkpoint."""
    return arrays_digest(load_checkpoint(run.checkpoints.paths()[-1])[0])
