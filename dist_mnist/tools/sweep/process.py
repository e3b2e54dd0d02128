"""Training runs as child processes (`dist-mnist train`), which do not outlive their parent."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import IO

from dist_mnist.elastic.preemption import PR_SET_PDEATHSIG, SIGNALS, set_attribute
from dist_mnist.run.directory import RunDirectory

LEAVING_S = 60.0  # from a stop request until a run has saved and exited


class Trainings:
    """Runs training one after the other. Stop requests to this process are forwarded to the current training."""

    def __init__(self) -> None:
        self.asked_to_stop = False
        self._running: subprocess.Popen | None = None

    def listen(self) -> None:
        """Handle stop requests from now on: the current training saves and exits, and no other should start."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def stop(self) -> None:
        """Send the current training a stop request: it saves and exits."""
        if self._running:
            self._running.send_signal(signal.SIGTERM)

    def train(
        self,
        run_dir: Path,
        options: Sequence[str],
        output: IO | int | None = None,
        look: Callable[[], None] | None = None,
        look_every_s: float | None = None,
    ) -> int:
        """Run a training and return its exit code, negative after a signal.

        Args:
            output: target of its standard output, and if it is a file, of its standard error.
            look: called every `look_every_s` seconds during the training.
        """
        command = [sys.executable, "-m", "dist_mnist", "train", f"--run-dir={run_dir}", *options]
        errors = None if output is None or isinstance(output, int) else subprocess.STDOUT
        # In its own process group, so that Ctrl-C reaches it once, forwarded by this process.
        with subprocess.Popen(
            command, stdout=output, stderr=errors, process_group=0, preexec_fn=partial(_stop_with, os.getpid())
        ) as self._running:
            while True:
                try:
                    return self._running.wait(look_every_s)
                except subprocess.TimeoutExpired:
                    if look:
                        look()

    def _on_signal(self, *_: object) -> None:
        self.asked_to_stop = True
        self.stop()


def wait_until_left(run_dir: Path) -> None:
    """Wait until no process trains in `run_dir`, after the death of the worker that started one.

    Raises:
        UserError: a process still trains there after the wait.
    """
    if run_dir.is_dir():
        with RunDirectory(run_dir).owned(LEAVING_S):
            pass


def _stop_with(parent: int) -> None:
    """Make any death of `parent` a stop request for this process. Called between fork and exec."""
    if sys.platform == "linux":
        set_attribute(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # the parent died before the call above, so no signal will come
        os.kill(os.getpid(), signal.SIGTERM)
