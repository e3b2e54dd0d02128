"""The run into which faults are injected: `dist-mnist train` on a small set of generated digits."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

from dist_mnist.elastic.agent import children
from dist_mnist.run.checkpoints.file import arrays_digest, load_checkpoint
from dist_mnist.run.directory import RunDirectory
from dist_mnist.tools.drill.flipped import Flip
from dist_mnist.utils.errors import UserError
from dist_mnist.utils.files import to_json

STEPS = 60
NETWORK = ("--conv-channels=8,8", "--dense-units=64")
SETTINGS = (
    f"--steps={STEPS}", "--batch-size=50", "--ema-decay=0.9", "--checkpoint-every=5", "--log-every=5",
    "--stall-timeout=10", "--device=cpu", "--threads=1", "--precision=fp32", "--no-tensorboard",
)  # fmt: skip
TIMEOUT_S = 240.0
STARTS = 6  # maximum number of starts of a run


class DisturbedTraining:
    """A run into which faults are injected: its processes, run directory, and restarts until it has a result."""

    def __init__(self, folder: Path, data: Path, nproc: int, options: tuple[str, ...] = NETWORK):
        self.directory = RunDirectory(folder)
        self.log_path = folder.with_suffix(".log")
        self.nproc, self.options = nproc, (f"--data-dir={data}", f"--run-dir={folder}", *SETTINGS, *options)
        self.starts = 0
        self.began = time.monotonic()
        self.process: subprocess.Popen[bytes]

    def start(self, flip: Flip | None = None) -> None:
        """Start the run, with a flip of a bit in a rank's memory if given."""
        words = ["dist_mnist", "train", f"--nproc={self.nproc}"]
        if flip:  # compare digests at each step, to detect even a difference that disappears again
            words = ["dist_mnist.tools.drill.flipped", f"{self.nproc}", to_json(flip), "--check-ranks-every=1"]
        with open(self.log_path, "ab") as log:
            command = [sys.executable, "-m", *words, *self.options]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        self.starts += 1

    def ranks(self) -> list[int]:
        """Return the process ids of the live ranks, in order of their start."""
        return sorted(rank.pid for rank in children(self.process.pid))

    def end_all(self) -> None:
        """Kill torchrun and its ranks, and wait for torchrun to end."""
        for pid in (self.process.pid, *self.ranks()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def finish(self) -> None:
        """Wait until the run has a result, starting it again whenever it ends early.

        Raises:
            UserError: the run does not end in time, or has no result after the last start.
        """
        until = time.monotonic() + TIMEOUT_S
        while not self.directory.result_path.exists():
            try:
                self.process.wait(timeout=until - time.monotonic())
            except subprocess.TimeoutExpired:
                self.end_all()
                raise UserError(
                    f"the run {self.directory.path} has not ended within {TIMEOUT_S:.0f} s; see {self.log_path}"
                ) from None
            if self.directory.result_path.exists():
                break
            if self.starts == STARTS:
                raise UserError(f"{self.directory.path} has no result after {STARTS} starts; see {self.log_path}")
            self.start()
        self.process.wait(timeout=60)

    def digest(self) -> str:
        """Return the digest of all arrays in the last checkpoint, or a note if that is not the last step's."""
        last = load_checkpoint(self.directory.checkpoints.paths()[-1])
        return arrays_digest(last.arrays) if last.info.step == STEPS else f"ended at step {last.info.step}"

    def left(self) -> list[str]:
        """Return the live processes of this run, and its unfinished files."""
        option = f"--run-dir={self.directory.path}"
        processes = [p.pid for p in psutil.process_iter(["cmdline"]) if option in (p.info["cmdline"] or [])]
        files = [path for path in self.directory.path.rglob(".*") if path.name != ".lock"]
        return [f"process {pid}" for pid in processes] + list(map(str, files))

    def said(self, *beginnings: str) -> list[str]:
        """Return the log lines with one of these beginnings, over all starts."""
        return [line for line in self.log_path.read_text(errors="replace").splitlines() if line.startswith(beginnings)]

    def last_words(self) -> str:
        return (self.said("error: ", "warning: ", "stopped ") or [""])[-1]

    def resumed_after(self) -> list[int]:
        """Return the steps after which the run was resumed, one for each start that resumed."""
        return [int(step) for line in self.said("resume ") for step in re.findall(r"after step (\d+)", line)]
