"""Fault injection into every system call of a save: can the run directory always be resumed from?

    python tests/sweeps/save_faults.py          (needs strace, and Linux)

A process whose run directory has a valid checkpoint saves the next one and prunes. strace lists its system calls on
files from there on. Then, in one run for each call and fault, the call fails with EIO or ENOSPC, or the process is
killed at it. Afterwards the newest valid checkpoint must be the old or the new one, whole; the new one, if the process
reported the save as done; no file may be damaged; and the next start must leave no temporary file.
"""

import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from msgspec.structs import replace

from dist_mnist.run.checkpoints.file import save_checkpoint
from dist_mnist.run.directory import RunDirectory
from dist_mnist.utils.files import to_json

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/
from helpers.checkpoints import INFO

FAULTS = ("error=EIO", "error=ENOSPC", "signal=KILL")
OLD, NEW = np.ones(3), np.arange(300_000, dtype=np.float32)
NOT_SAVED, NOT_PRUNED = 7, 8  # exit codes
SAVE = f"""
import sys, numpy as np
from pathlib import Path
from dist_mnist.run.checkpoints.file import save_checkpoint
from dist_mnist.run.directory import RunDirectory
from dist_mnist.run.records import CheckpointInfo
from dist_mnist.utils.schema import parse
run = RunDirectory(Path(sys.argv[1]))
arrays = {{"w": np.arange(300_000, dtype=np.float32)}}
try:
    save_checkpoint(run.checkpoints.path(20), arrays, parse(sys.argv[2], CheckpointInfo))
except OSError:
    sys.exit({NOT_SAVED})
try:
    run.checkpoints.prune(1)
except OSError:
    sys.exit({NOT_PRUNED})
"""


def prepare(folder: Path) -> RunDirectory:
    """Return a run directory with a checkpoint of step 10 and older ones, one of which the next save prunes."""
    run = RunDirectory(folder)
    with run.owned():
        for step in (2, 6, 10):
            save_checkpoint(run.checkpoints.path(step), {"w": OLD}, replace(INFO, step=step))
    return run


def save(run: RunDirectory, *strace: str) -> int:
    """Save in a process under strace; return its exit code, negative after a signal."""
    command = [
        "strace",
        "-f",
        "-qq",
        *strace,
        sys.executable,
        "-c",
        SAVE,
        str(run.path),
        to_json(replace(INFO, step=20)),
    ]
    return subprocess.run(command, capture_output=True, timeout=120, check=False).returncode


def calls_of_a_save(folder: Path) -> list[tuple[str, int]]:
    """Return a save's system calls on files as (name, nth call of that name), from the first on the run directory."""
    run, trace = prepare(folder / "run"), folder / "trace"
    assert save(run, "-o", str(trace), "-e", "trace=%file,%desc") == 0
    counts: Counter[str] = Counter()
    calls = []
    for line in trace.read_text().splitlines():
        if not (match := re.match(r"\d+ +(\w+)\(", line)):
            continue
        counts[match[1]] += 1
        if calls or ("/checkpoints/" in line and "tmp" in line):
            calls.append((match[1], counts[match[1]]))
    return calls


def check(run: RunDirectory, code: int) -> int:
    """Return the step to resume from; AssertionError if there is none, or something was lost, damaged or left."""
    assert not list(run.checkpoints.folder.glob(".*")) or code < 0, "a temporary file is left"
    warnings: list[str] = []
    found = run.checkpoints.newest(warnings.append)
    assert found is not None and not warnings, f"no checkpoint, or a damaged one: {warnings}"
    step = found.info.step
    assert np.array_equal(found.arrays["w"], NEW if step == 20 else OLD)
    assert step == 20 or code not in (0, NOT_PRUNED), "it was said to be saved, and is lost"
    with run.owned():
        run.begin_attempt()
    assert not list(run.checkpoints.folder.glob(".*")), "a temporary file is left after the next start"
    return step


def sweep(every: int = 1) -> Counter[tuple[str, int, int]]:
    """Count outcomes (fault, exit code, step to resume from) over every `every`-th combination of call and fault."""
    outcomes: Counter[tuple[str, int, int]] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "dry").mkdir()
        calls = calls_of_a_save(Path(scratch) / "dry")
        cases = [(call, number, fault) for call, number in calls for fault in FAULTS]
        for at, (call, number, fault) in enumerate(cases[::every]):
            run = prepare(Path(scratch) / f"run-{at}")
            code = save(run, "-o", "/dev/null", "-e", f"inject={call}:{fault}:when={number}")
            try:
                outcomes[fault, code, check(run, code)] += 1
            except AssertionError as error:
                raise AssertionError(f"{fault} at {call} number {number}, exit code {code}: {error}") from None
    return outcomes


if __name__ == "__main__":
    for (fault, code, step), count in sorted(sweep().items()):
        print(f"{fault:13} exit code {code:3}  resumes from step {step}: {count} times")
