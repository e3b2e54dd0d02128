"""Starting torchrun on this machine, so that signals reach the ranks and a failure is one sentence.

torchrun by itself answers a signal by ending with a traceback and exit code 1, and dies of SIGUSR1. Here the agent
passes requests to stop on to its ranks, which save and leave in order; then it leaves in order as well.
"""

import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from dist_mnist.config import option
from dist_mnist.errors import NO_GPU, UserError

CPU_PROCESSES = 2
REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
GRACE_S = 25.0  # from a request to the end of ranks that do not leave; they give up themselves a little before


def num_processes(device: str) -> int:
    """Processes that suit this machine: one for each GPU, or two on a CPU with two cores or more.

    Raises:
        UserError: GPUs are asked for, and there are none.
    """
    if device != "cpu" and _may_have_gpus():
        import torch  # takes seconds, which a machine without GPUs need not spend

        if torch.cuda.is_available():
            return torch.cuda.device_count()
    if device == "cuda":
        raise UserError(NO_GPU)
    return min(CPU_PROCESSES, os.cpu_count() or 1)


def start_torchrun(nproc: int, max_restarts: int, given: Mapping[str, Any]) -> NoReturn:
    """Become an agent of torchrun with `nproc` processes of `dist_mnist.train`; one without restarts needs none."""
    module = ["-m", "dist_mnist.train", *_as_options(given)]
    if nproc > 1 or max_restarts > 0:
        options = ["--standalone", f"--nproc-per-node={nproc}", f"--max-restarts={max_restarts}"]
        module = ["-m", "dist_mnist.launch", *options, *module]
    # The warning that torchrun sets OMP_NUM_THREADS is not for users: the trainer shares the cores out itself.
    environment = {"OMP_NUM_THREADS": "1"} | dict(os.environ) if nproc > 1 else dict(os.environ)
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *module], environment)


def main() -> None:
    """`python -m dist_mnist.launch [torchrun's options] -m dist_mnist.train [options]`: torchrun, as above."""
    request = Request()
    for number in REQUESTS:
        signal.signal(number, request)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    # Started again, ranks are to meet in a store of their own, not in one that holds their forerunners' addresses.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    arguments = parse_args(sys.argv[1:])
    arguments.signals_to_handle = "SIGHUP"  # the others are requests
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with tempfile.TemporaryDirectory(prefix="dist-mnist-logs-") as arguments.log_dir:
            run(arguments)
    except ChildFailedError as error:
        if any(failure.exitcode == 2 for failure in error.failures.values()):  # a user's mistake, which was told
            sys.exit(2)
        rank, failure = error.get_first_failure()
        sys.exit(f"error: the first to fail was rank {rank} (process {failure.pid}): {_reason(failure)}")
    except SignalException as end:
        sys.exit(2 if end.sigval == signal.SIGHUP else 1)  # a rank says that restarts are of no use


class Request:
    """A signal handler that passes the signal on to all ranks, and to those that torchrun still starts."""

    def __init__(self) -> None:
        self.made = False

    def __call__(self, number: int, _: object) -> None:
        if not _children():
            sys.exit(128 + number)  # nothing has begun
        if not self.made:
            self.made = True
            threading.Thread(target=self._pass_on, args=(number,), daemon=True).start()

    def _pass_on(self, number: int) -> None:
        give_up_at, told = time.monotonic() + GRACE_S, set()
        while True:
            for rank in filter(_listens, _children() - told):
                _send(rank, number)
                told.add(rank)
            if time.monotonic() > give_up_at:
                for rank in _children():
                    _send(rank, signal.SIGKILL)
            time.sleep(0.1)


def _children() -> set[int]:
    """Process ids of this process's children."""
    tasks = Path("/proc/self/task").glob("*/children")
    return {int(child) for task in tasks for child in task.read_text().split()}


def _listens(pid: int) -> bool:
    """Whether a process has a handler for SIGTERM; one that only just started has not."""
    with suppress(OSError, StopIteration):
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        caught = next(line for line in status if line.startswith("SigCgt:")).split()[1]
        return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)
    return False


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _reason(failure: Any) -> str:
    if failure.exitcode < 0:
        return f"it was ended by {signal.Signals(-failure.exitcode).name}"
    message = failure.message if isinstance(failure.message, str) else failure.message.get("message", "")
    return f"exit code {failure.exitcode}; {message or 'see above'}"


def _may_have_gpus() -> bool:
    """Whether a driver for NVIDIA (also under Windows' Linux) or AMD devices is loaded."""
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd"))


def _as_options(given: Mapping[str, Any]) -> list[str]:
    """Settings as command-line options."""
    return [argument for name, value in given.items() for argument in _as_option(name, value)]


def _as_option(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [option(name) if value else option("no_" + name)]
    return [f"{option(name)}={','.join(map(str, value)) if isinstance(value, tuple) else value}"]


if __name__ == "__main__":
    main()
