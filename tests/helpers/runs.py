"""Helpers for tests of whole runs: short settings; starting, waiting and ending; the digest of the final state."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import pytest
import torch

from dist_mnist.cli import app
from dist_mnist.cli.options import run_as_rank
from dist_mnist.elastic.preemption import StopSignal
from dist_mnist.elastic.progress import read_progress
from dist_mnist.run.checkpoints.file import arrays_digest, load_checkpoint
from dist_mnist.run.directory import RunDirectory
from dist_mnist.train import run as train_as_rank
from helpers import HANGS_AFTER_S

SMALL = (
    "--batch-size=50",
    "--conv-channels=4,4",
    "--dense-units=16",
    "--device=cpu",
    "--no-tensorboard",
    "--threads=1",
)

Done = subprocess.CompletedProcess[str]


def train_here(data: Path, run_dir: Path, *options: object) -> Done:
    """Run `python -m dist_mnist.train` within this process, for tests that do not need a separate process."""
    with pytest.MonkeyPatch.context() as patch:
        # torchrun's `record` would replace pytest's fault handler.
        patch.setattr("torch.distributed.elastic.multiprocessing.errors.record", lambda function: function)
        main = partial(run_as_rank, train_as_rank, StopSignal())
        return _here(main, f"--data-dir={data}", f"--run-dir={run_dir}", "--device=cpu", "--no-tensorboard", *options)


def trained_here(data: Path, run_dir: Path, *options: object) -> Path:
    """Run `train_here` with a small network, assert success, and return the run directory."""
    done = train_here(data, run_dir, *SMALL, *options)
    assert done.returncode == 0, done.stderr
    return run_dir


def dist_mnist(*words: object, folder: Path | None = None, stdin: bytes = b"") -> Done:
    """Run the command: `train` in new processes, all others in this process, which has imported torch."""
    if words[0] != "train":
        return _here(app.main, *words, folder=folder, stdin=stdin)
    command = [sys.executable, "-m", "dist_mnist", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANGS_AFTER_S, cwd=folder)


def _here(main: Callable[[], object], *words: object, folder: Path | None = None, stdin: bytes = b"") -> Done:
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, _unchanged(), redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder or ".")
        patch.setattr("sys.argv", ["dist-mnist", *map(str, words)])
        patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


@contextmanager
def _unchanged() -> Iterator[None]:
    """Context manager: restore the process state that a program changes, torch's threads and the signal handlers."""
    threads, wakeup = torch.get_num_threads(), signal.set_wakeup_fd(-1)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)


def start(*command: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Start a command in a new session, so that it can be killed together with all its children."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )


def end(process: subprocess.Popen[str]) -> None:
    """Kill a command and all its descendants, including those in the sessions that torchrun makes for its workers."""
    for pid in [*descendants(process.pid), process.pid]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.communicate()


def descendants(pid: int) -> list[int]:
    """Return all descendants of `pid`, in any session."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [pid for child in children for pid in (*descendants(child), child)]


def wait_for(
    condition: Callable[[], object], *processes: subprocess.Popen, what: str = "it did not come to that"
) -> None:
    """Wait until the condition holds; fail if it never does, or a process ends first."""
    deadline = time.monotonic() + HANGS_AFTER_S
    while not condition():
        for process in processes:
            assert process.poll() is None, f"a process ended before: {_said(process)}"
        assert time.monotonic() < deadline, what
        time.sleep(0.002)


def _said(process: subprocess.Popen) -> str:
    return "\n".join(map(str, process.communicate())) if process.stderr else str(process.args)


def are_gone(pids: list[int]) -> Callable[[], bool]:
    """Return a condition for `wait_for`: all these processes have ended."""
    return lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids)


def reaches(run: RunDirectory, step: int) -> Callable[[], bool]:
    """Return a condition for `wait_for`: the run has reached a step."""
    return lambda: (read_progress(run.progress_path) or (-1, ""))[0] >= step


def enters(run: RunDirectory, phase: str) -> Callable[[], bool]:
    """Return a condition for `wait_for`: rank 0 is in a phase."""
    return lambda: (read_progress(run.progress_path) or (0, ""))[1] == phase


def records(run_dir: Path, kind: str) -> list[dict]:
    """Return a run's records of a kind, `train` or `validation`, without a last line that is still being written."""
    *lines, _ = (run_dir / "metrics.jsonl").read_text().split("\n")
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def losses(run_dir: Path) -> list[float]:
    """Return the training losses of a run's log lines."""
    return [record["loss"] for record in records(run_dir, "train")]


def digest(run: RunDirectory) -> str:
    """Return the SHA-256 of all arrays in the run's last checkpoint."""
    return arrays_digest(load_checkpoint(run.checkpoints.paths()[-1]).arrays)


def sweep(data: Path, parent: Path, *words: str) -> subprocess.Popen[str]:
    """Start `dist-mnist sweep` in a new process."""
    command = (sys.executable, "-m", "dist_mnist", "sweep", *words, f"--data-dir={data}", f"--run-dir={parent}")
    return start(*command, *SMALL, "--nproc=1")


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for the end; return exit code, standard output and standard error."""
    try:
        out, err = process.communicate(timeout=HANGS_AFTER_S)
    finally:
        end(process)
    return process.returncode, out, err
