"""One training as a process, as `dist-mnist train` makes it, that does not outlive who started it."""

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

LEAVING_S = 60.0  # in which a run that was asked to stop has saved and left


class Trainings:
    """Trainings one after the other. A stop request of this process becomes one of the training that is at work."""

    def __init__(self) -> None:
        self.asked_to_stop = False
        self._running: subprocess.Popen | None = None

    def listen(self) -> None:
        """From here on a stop request ends this process's training, which saves, and none is to begin after it."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def stop(self) -> None:
        """Ask the training that is at work to save and leave."""
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
        """Train to the end; gives the exit code, negative for a signal.

        Args:
            output: where its standard output goes; of a file, its standard error as well.
            look: is called every `look_every_s` seconds meanwhile.
        """
        command = [sys.executable, "-m", "dist_mnist", "train", f"--run-dir={run_dir}", *options]
        errors = None if output is None or isinstance(output, int) else subprocess.STDOUT
        # In a group of its own: an interrupt from the keyboard comes to it once, from here.
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
    """Wait for a run that is about to leave its folder, as the one that began it has died.

    Raises:
        UserError: a run is at work there, and stays.
    """
    if run_dir.is_dir():
        with RunDirectory(run_dir).owned(LEAVING_S):
            pass


def _stop_with(parent: int) -> None:
    """Let the death of the `parent`, however it dies, be a stop request; between fork and exec."""
    if sys.platform == "linux":
        set_attribute(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before that line, so no signal will come
        os.kill(os.getpid(), signal.SIGTERM)
