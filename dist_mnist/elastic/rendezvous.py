"""Runs over several machines: who takes part, where they meet, and what each does when it is cut off.

Each machine runs an agent of torchrun. What torchrun leaves to its user then, is set here: how soon a lost machine is
noticed, by which network ranks reach each other, and that an agent without the others ends.
"""

import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from dist_mnist.elastic.net import answers, is_known, route_to, split_endpoint
from dist_mnist.utils.errors import UserError

# Of a machine that is lost nothing is heard for 5 s, by clocks that may differ by as much; those that are left go on
# when no other has come for 5 s. By torchrun's own settings it would be 15 and 30. When the meeting place does not
# answer for 30 s, or the stall timeout if that is shorter, it is lost; torchrun would wait for TCP: 15 minutes.
RENDEZVOUS = {"keep_alive_interval": 1, "keep_alive_max_attempt": 5, "last_call_timeout": 5, "read_timeout": 30}
NNODES = re.compile("[1-9][0-9]*(:[1-9][0-9]*)?")
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
        if not NNODES.fullmatch(self.nnodes) or self.least > self.most:
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

    def options(self, name: str, stall_timeout_s: float) -> list[str]:
        """As options of torchrun; `name` tells this run from others that meet at the same place."""
        if not self.several:
            return ["--standalone"]
        run_id = self.run_id or f"{name}@{self.endpoint}"
        meeting = [f"--rdzv-endpoint={self.endpoint}", f"--rdzv-id={run_id}"]
        patience = [f"--rdzv-conf=read_timeout={min(RENDEZVOUS['read_timeout'], round(stall_timeout_s))}"]
        return [f"--nnodes={self.nnodes}", "--rdzv-backend=c10d", *meeting, *patience]


def keep_meeting_place(port: int) -> None:
    """Serve torchrun's rendezvous on `port` (0: any that is free) until a signal comes; prints HOST:PORT once it does.

    Raises:
        UserError: the port is taken.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    from torch.distributed import DistError, TCPStore

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
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
    settings = {name: str(value) for name, value in RENDEZVOUS.items()} | _given(arguments)
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


def _given(arguments: Any) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in arguments.rdzv_conf.split(",") if "=" in pair)


def _wait_for(host: str, port: int) -> None:
    began, told = time.monotonic(), False
    while not answers(host, port):
        waited = time.monotonic() - began
        if waited > WAIT_FOR_FIRST_S:
            sys.exit(f"error: nothing answers at {host}:{port}: start the run there too, or correct --rdzv-endpoint")
        if waited > SPEAK_UP_AFTER_S and not told:
            told = True
            why = "" if is_known(host) else f", but knows no machine of the name {host}"
            print(f"{socket.gethostname()} waits for {host}:{port} to answer{why}", file=sys.stderr, flush=True)
        time.sleep(0.2)


def watch_meeting_place(arguments: Any, ranks: Callable[[], Collection[int]], leave: Callable[[], None]) -> None:
    """Watch it from a thread; when it has gone, or this machine is cut off from it, end this machine's part.

    `ranks` gives this machine's, `leave` ends them; the process ends with exit code 1, whatever its main thread waits
    for.
    """
    threading.Thread(target=_watch, args=(arguments, ranks, leave), name="meeting place", daemon=True).start()


def _watch(arguments: Any, ranks: Callable[[], Collection[int]], leave: Callable[[], None]) -> None:
    host, port = split_endpoint(arguments.rdzv_endpoint)
    patience_s, answered_at = float(_given(arguments)["read_timeout"]), time.monotonic()
    alone_since: float | None = answered_at
    while time.monotonic() - answered_at < patience_s:
        time.sleep(patience_s / 10)
        if ranks():
            alone_since = None
        elif alone_since and time.monotonic() - alone_since > SPEAK_UP_AFTER_S:
            alone_since, run_id = None, arguments.rdzv_id
            print(f"{socket.gethostname()} waits for other machines (run {run_id})", file=sys.stderr, flush=True)
        if answers(host, port):
            answered_at = time.monotonic()
    print(
        f"error: {socket.gethostname()} ends: {arguments.rdzv_endpoint}, where the machines meet, has not answered for "
        f"{patience_s:.0f} s; it is lost, or this machine is cut off",
        file=sys.stderr,
        flush=True,
    )
    leave()
    shutil.rmtree(arguments.log_dir, ignore_errors=True)
    os._exit(1)


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
