"""Starting torchrun on this machine, so that signals reach the ranks and a failure is one sentence.

torchrun by itself answers a signal by ending with a traceback and exit code 1, and dies of SIGUSR1. Here the agent
passes requests to stop on to its ranks, which save and leave in order; then it leaves in order as well. Of several
machines each has an agent; what torchrun leaves to its user then, it sets (see `join_others`).
"""

import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from dist_mnist.config import option
from dist_mnist.errors import NO_GPU, UserError
from dist_mnist.network import answers, route_to, split_endpoint

CPU_PROCESSES = 2
REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
GRACE_S = 25.0  # from a request to the end of ranks that do not leave; they give up themselves a little before


# Of a machine that is lost nothing is heard for 5 s, by clocks that may differ by as much; those that are left go on
# when no other has come for 5 s. By torchrun's own settings it would be 15 and 30.
RENDEZVOUS = {"keep_alive_interval": 1, "keep_alive_max_attempt": 5, "last_call_timeout": 5, "read_timeout": 30}
WAIT_FOR_FIRST_S = 600.0  # for the machine that the others meet at
SPEAK_UP_AFTER_S = 5.0
CLOSING_S = 3.0


@dataclass(frozen=True)
class Machines:
    """Which machines make up a run: how many, as torchrun's `2` or `1:4`, and where and by which name they meet."""

    nnodes: str = "1"
    endpoint: str | None = None
    run_id: str | None = None

    def __post_init__(self) -> None:
        parts = self.nnodes.split(":")
        if len(parts) > 2 or not all(part.isdigit() and int(part) for part in parts) or self.least > self.most:
            raise UserError(
                f"--nnodes takes a number of machines, or the least and most, such as 1:4; not {self.nnodes}"
            )
        if self.several and not self.endpoint:
            raise UserError(
                "several machines need a place to meet: give --rdzv-endpoint HOST:PORT, the same on each, with the "
                "name of one of them (or of one where `dist-mnist rendezvous` runs)"
            )
        if self.endpoint:
            split_endpoint(self.endpoint)

    @property
    def least(self) -> int:
        """The number of machines below which a run waits."""
        return int(self.nnodes.split(":")[0])

    @property
    def most(self) -> int:
        """The number of machines beyond which others are left waiting."""
        return int(self.nnodes.split(":")[-1])

    @property
    def several(self) -> bool:
        """Whether there may be others than this one."""
        return self.most > 1 or self.endpoint is not None

    def options(self, name: str) -> list[str]:
        """As options of torchrun; `name` tells this run from others that meet at the same place."""
        if not self.several:
            return ["--standalone"]
        run_id = self.run_id or f"{name}@{self.endpoint}"
        meeting = [f"--rdzv-endpoint={self.endpoint}", f"--rdzv-id={run_id}"]
        return [f"--nnodes={self.nnodes}", "--rdzv-backend=c10d", *meeting]


def num_processes(device: str) -> int:
    """Processes that suit this machine: one for each GPU, or two on a CPU with two cores or more.

    Raises:
        UserError: GPUs are asked for, or Slurm has given them, and torch sees none.
    """
    if device != "cpu" and _may_have_gpus():
        import torch  # takes seconds, which a machine without GPUs need not spend

        if torch.cuda.is_available():
            return torch.cuda.device_count()
    if device == "cuda":
        raise UserError(NO_GPU)
    if device == "auto" and int(os.environ.get("SLURM_GPUS_ON_NODE") or 0):
        raise UserError(
            f"Slurm gave this job {os.environ['SLURM_GPUS_ON_NODE']} GPUs on {socket.gethostname()}, and torch sees "
            "none: install a torch that fits the driver (nvidia-smi shows it), or give --device cpu"
        )
    return min(CPU_PROCESSES, os.cpu_count() or 1)


def start_torchrun(
    module: str,
    given: Mapping[str, Any],
    nproc: int,
    max_restarts: int = 0,
    machines: Machines = Machines(),
    name: str = "",
) -> NoReturn:
    """Become an agent of torchrun with `nproc` processes of `module`; a single one without restarts needs none."""
    command = ["-m", module, *_as_options(given)]
    if nproc > 1 or max_restarts > 0 or machines.several:
        options = [*machines.options(name), f"--nproc-per-node={nproc}", f"--max-restarts={max_restarts}"]
        command = ["-m", "dist_mnist.launch", *options, *command]
    # The warning that torchrun sets OMP_NUM_THREADS is not for users: the trainer shares the cores out itself.
    environment = {"OMP_NUM_THREADS": "1"} | dict(os.environ) if nproc > 1 else dict(os.environ)
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *command], environment)


def main() -> None:
    """`python -m dist_mnist.launch [torchrun's options] -m dist_mnist.train [options]`: torchrun, as above."""
    request = Request()
    for number in REQUESTS:
        signal.signal(number, request)
    os.environ.setdefault(
        "TORCH_CPP_LOG_LEVEL", "ERROR"
    )  # else the last to leave tells at length that others have left
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousError
    from torch.distributed.run import parse_args, run

    # Started again, ranks are to meet in a store of their own, not in one that holds their forerunners' addresses.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    arguments = parse_args(sys.argv[1:])
    arguments.signals_to_handle = "SIGHUP"  # the others are requests
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.ERROR)
    if arguments.rdzv_endpoint and not arguments.standalone:
        join_others(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="dist-mnist-logs-") as arguments.log_dir:
            run(arguments)
    except ChildFailedError as error:
        if any(failure.exitcode == 2 for failure in error.failures.values()):  # a user's mistake, which was told
            sys.exit(2)
        rank, failure = error.get_first_failure()
        sys.exit(f"error: the first to fail was rank {rank} (process {failure.pid}): {_reason(failure)}")
    except SignalException as end:
        if end.sigval == signal.SIGHUP:  # a rank says that restarts are of no use
            end_for_all(arguments)
            sys.exit(2)
        sys.exit(1)
    except RendezvousClosedError:
        sys.exit(f"error: {socket.gethostname()} ends, because another machine ended the run; its messages say why")
    except (RendezvousError, DistError) as error:
        sys.exit(
            f"error: {socket.gethostname()} ends: the machines could not meet at {arguments.rdzv_endpoint}, or can "
            f"no longer ({str(error).splitlines()[0][:200]})"
        )


def keep_meeting_place(port: int) -> None:
    """Serve torchrun's rendezvous on `port` (0: any that is free) until a signal comes; prints HOST:PORT once it does.

    Raises:
        UserError: the port is taken.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    from torch.distributed import DistError, TCPStore

    for number in REQUESTS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: sys.exit(0))
    try:
        store = TCPStore(socket.gethostname(), port, is_master=True, wait_for_workers=False)
    except DistError:
        raise UserError(f"port {port} of {socket.gethostname()} is taken: give another --port, or 0") from None
    print(f"{socket.gethostname()}:{store.port}", flush=True)
    threading.Event().wait()


def join_others(arguments: Any) -> None:
    """Complete torchrun's `arguments` for a run on several machines, and wait until their meeting place answers.

    Raises:
        SystemExit: it does not, in ten minutes.
    """
    from torch.distributed.elastic.rendezvous.utils import _matches_machine_hostname

    host, port = split_endpoint(arguments.rdzv_endpoint)
    given = dict(pair.split("=", 1) for pair in arguments.rdzv_conf.split(",") if "=" in pair)
    settings = {name: str(value) for name, value in RENDEZVOUS.items()} | given
    if answers(host, port):
        settings.setdefault("is_host", "0")  # as `dist-mnist rendezvous` does, on this machine or another
    elif settings.get("is_host", "0") == "0" and not _matches_machine_hostname(host):
        _wait_for(host, port)
    arguments.rdzv_conf = ",".join(f"{name}={value}" for name, value in settings.items())
    # By default ranks give each other the addresses that their machine's name stands for, which may be a loopback
    # one, and the name of rank 0's machine, which others may not know.
    interface, address = route_to(host)
    if interface and address:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        arguments.local_addr = arguments.local_addr or address


def _wait_for(host: str, port: int) -> None:
    began, told = time.monotonic(), False
    while not answers(host, port):
        waited = time.monotonic() - began
        if waited > WAIT_FOR_FIRST_S:
            sys.exit(f"error: nothing answers at {host}:{port}: start the run there too, or correct --rdzv-endpoint")
        if waited > SPEAK_UP_AFTER_S and not told:
            told = True
            print(f"{socket.gethostname()} waits for {host}:{port} to answer", file=sys.stderr, flush=True)
        time.sleep(0.2)


def end_for_all(arguments: Any) -> None:
    """Let the other machines end too, instead of waiting for this one."""
    from torch.distributed.elastic.rendezvous import RendezvousParameters
    from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler
    from torch.distributed.run import config_from_args

    if not arguments.rdzv_endpoint or arguments.standalone:
        return
    config = config_from_args(arguments)[0]
    parameters = RendezvousParameters(
        config.rdzv_backend, config.rdzv_endpoint, config.run_id, config.min_nodes, config.max_nodes,
        **{**config.rdzv_configs, "is_host": "0"},
    )  # fmt: skip
    with suppress(Exception):  # the meeting place may have gone already
        get_rendezvous_handler(parameters).shutdown()
        time.sleep(CLOSING_S)  # if it is in this process, the others are to see that it is closed


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
