"""The rendezvous of a run's nodes: which nodes take part, their endpoint, and what a node does when it is cut off.

Each node runs an agent. This module configures what torchrun leaves to its user: how soon a lost node is detected,
which network connects the ranks, and that an agent cut off from the others ends.
"""

import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from dist_mnist.elastic.net import LOOPBACK, answers, is_known, split_endpoint
from dist_mnist.elastic.preemption import SIGNALS
from dist_mnist.utils.errors import UserError, tell

if TYPE_CHECKING:
    from torch.distributed import TCPStore
    from torch.distributed.launcher.api import LaunchConfig

# A node is lost when its heartbeat is missing for 5 s; clocks of nodes may differ by as much. The remaining nodes
# continue when no other has joined for 5 s. torchrun's defaults are 15 s and 30 s. The endpoint is lost when it has
# not answered for 30 s, or for the stall timeout if that is shorter; torchrun would wait for TCP: 15 minutes.
TIMES_S = {"keep_alive_interval": 1, "keep_alive_max_attempt": 5, "last_call_timeout": 5}
READ_TIMEOUT_S = 30
NNODES = re.compile("[1-9][0-9]*(:[1-9][0-9]*)?")
WAIT_FOR_FIRST_S = 600.0  # for the node that hosts the endpoint
SPEAK_UP_AFTER_S = 5.0
CLOSING_S = 3.0
STORE_TIMEOUT_S = 5.0  # for a store that has just answered
TORCHRUNS_PORT = "29500"  # torchrun's default if PET_MASTER_PORT is not set
STARTS = "dist-mnist starts of "  # prefix of the key, in the store of an endpoint, that counts a run's ended starts


@dataclass(frozen=True)
class Nodes:
    """The nodes of a run: their number as for torchrun, `2` or `1:4`, and endpoint and id of their rendezvous.

    `rank` is this node's number if a scheduler assigned one; node 0 then hosts the endpoint.
    """

    nnodes: str = "1"
    endpoint: str | None = None
    run_id: str | None = None
    rank: int | None = None

    @classmethod
    def given(cls, nnodes: str, endpoint: str | None, run_id: str | None) -> "Nodes":
        """Build from options; for several nodes without an endpoint, from PET_MASTER_ADDR and related variables.

        torchrun reads these variables in place of its options; Kubeflow Trainer sets them.

        Raises:
            UserError: the options are invalid or contradict each other, or PET_NODE_RANK is not the number of a node.
        """
        address, rank = os.environ.get("PET_MASTER_ADDR"), os.environ.get("PET_NODE_RANK") or None
        if endpoint or not address or nnodes == "1":
            return cls(nnodes, endpoint, run_id)
        host = f"[{address}]" if ":" in address else address
        endpoint = f"{host}:{os.environ.get('PET_MASTER_PORT') or TORCHRUNS_PORT}"
        if rank and not (rank.isascii() and rank.isdecimal() and int(rank) < cls(nnodes, endpoint).max_nodes):
            raise UserError(f"PET_NODE_RANK must be this node's number, from 0 to --nnodes - 1; got {rank!r}")
        return cls(nnodes, endpoint, run_id, int(rank) if rank else None)

    def __post_init__(self) -> None:
        if not NNODES.fullmatch(self.nnodes) or self.min_nodes > self.max_nodes:
            raise UserError(f"--nnodes expects a number of nodes, or MIN:MAX such as 1:4; got {self.nnodes}")
        if self.several and not self.endpoint:
            raise UserError(
                "several nodes need a rendezvous endpoint: give --rdzv-endpoint HOST:PORT, the same on every node. "
                "HOST is one of the nodes, or a host that runs `dist-mnist rendezvous`"
            )
        if self.endpoint:
            split_endpoint(self.endpoint)

    @property
    def min_nodes(self) -> int:
        """The minimum number of nodes; with fewer, a run waits."""
        return int(self.nnodes.split(":")[0])

    @property
    def max_nodes(self) -> int:
        """The maximum number of nodes; more are kept in reserve."""
        return int(self.nnodes.split(":")[-1])

    @property
    def several(self) -> bool:
        """Whether the run may have other nodes than this one."""
        return self.max_nodes > 1 or self.endpoint is not None


def keep_endpoint(port: int) -> None:
    """Serve torchrun's rendezvous on `port` (0: any free port) until a signal comes. Prints HOST:PORT once it serves.

    Raises:
        UserError: the port is in use.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    from torch.distributed import DistError, TCPStore

    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: sys.exit(0))
    try:
        store = TCPStore(socket.gethostname(), port, is_master=True, wait_for_workers=False)
    except DistError:
        raise UserError(f"port {port} of {socket.gethostname()} is in use: give another --port, or 0") from None
    print(f"{socket.gethostname()}:{store.port}", flush=True)
    threading.Event().wait()


def serve_this_node(config: "LaunchConfig") -> "TCPStore":
    """Serve the rendezvous of a job of one node, until the returned store is freed, to processes of this node only.

    torchrun's own store listens on all network interfaces, and torchrun unpickles what is written there.
    """
    from torch.distributed import TCPStore

    listener = socket.create_server((LOOPBACK, 0))
    port = listener.getsockname()[1]
    config.rdzv_endpoint, config.local_addr = f"{LOOPBACK}:{port}", LOOPBACK
    config.rdzv_configs["is_host"] = 0
    return TCPStore(LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def find_endpoint(config: "LaunchConfig", node_rank: int | None, stall_timeout_s: float) -> int | None:
    """Wait until the endpoint answers, unless this node hosts it, and configure torchrun's rendezvous.

    Returns:
        The number of starts of the run that have ended at this endpoint; None if this node hosts it.

    Raises:
        SystemExit: the endpoint has not answered for ten minutes.
    """
    from torch.distributed.elastic.rendezvous.utils import _matches_machine_hostname

    host, port = split_endpoint(config.rdzv_endpoint)
    config.rdzv_configs |= {**TIMES_S, "read_timeout": min(READ_TIMEOUT_S, round(stall_timeout_s))}
    if node_rank == 0:
        config.rdzv_endpoint = f"localhost:{port}"  # this node's own name may not be in DNS yet
        config.rdzv_configs["is_host"] = 1
        return None
    if not answers(host, port):
        if node_rank is None and _matches_machine_hostname(host):
            return None  # torchrun decides by the same test whether to host the endpoint
        _wait_for(host, port)
    config.rdzv_configs["is_host"] = 0  # another node or `dist-mnist rendezvous` hosts it
    return _ended_starts(config)


def _ended_starts(config: "LaunchConfig") -> int:
    """Return the number of ended starts and put it into this start's run id: torchrun never reopens a rendezvous."""
    number = 0
    with suppress(Exception):  # the endpoint is lost again; torchrun will report it
        number = _store_of(config).add(STARTS + config.run_id, 0)
    config.run_id += f"#{number}" if number else ""
    return number


def end_start(config: "LaunchConfig", ended: int | None) -> None:
    """Let nodes that start from now on form another start of this run; `ended` was returned by `find_endpoint`."""
    if ended is not None and answers(*split_endpoint(config.rdzv_endpoint)):  # else the endpoint's host has ended
        run = config.run_id.removesuffix(f"#{ended}") if ended else config.run_id
        with suppress(Exception):  # the endpoint's host may end at this moment
            _store_of(config).compare_set(STARTS + run, str(ended), str(ended + 1))


def _store_of(config: "LaunchConfig") -> "TCPStore":
    from torch.distributed import TCPStore

    host, port = split_endpoint(config.rdzv_endpoint)
    return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=STORE_TIMEOUT_S))


def _wait_for(host: str, port: int) -> None:
    began, told = time.monotonic(), False
    while not answers(host, port):
        waited = time.monotonic() - began
        if waited > WAIT_FOR_FIRST_S:
            sys.exit(f"error: nothing answers at {host}:{port}: start the run there, too, or correct --rdzv-endpoint")
        if waited > SPEAK_UP_AFTER_S and not told:
            told = True
            why = "" if is_known(host) else f", but cannot resolve {host}"
            tell(f"{socket.gethostname()} waits for {host}:{port} to answer{why}")
        time.sleep(0.2)


def watch_endpoint(config: "LaunchConfig", has_ranks: Callable[[], bool], leave: Callable[[], None]) -> None:
    """Watch the endpoint in a thread; if it is lost, or this node is cut off from it, end this node's ranks and agent.

    `leave` ends the ranks; the process then exits with code 1, whatever its main thread is waiting for.
    """
    arguments = (config, has_ranks, leave)
    threading.Thread(target=_watch, args=arguments, name="rendezvous endpoint", daemon=True).start()


def _watch(config: "LaunchConfig", has_ranks: Callable[[], bool], leave: Callable[[], None]) -> None:
    host, port = split_endpoint(config.rdzv_endpoint)
    patience_s, answered_at = config.rdzv_configs["read_timeout"], time.monotonic()
    alone_since: float | None = answered_at
    while time.monotonic() - answered_at < patience_s:
        time.sleep(patience_s / 10)
        if has_ranks():
            alone_since = None
        elif alone_since and time.monotonic() - alone_since > SPEAK_UP_AFTER_S:
            alone_since = None
            tell(f"{socket.gethostname()} waits for other nodes (run {config.run_id})")
        if answers(host, port):
            answered_at = time.monotonic()
    tell(
        f"error: {socket.gethostname()} ends: the rendezvous endpoint {config.rdzv_endpoint} has not answered for "
        f"{patience_s} s; it is lost, or this node is cut off"
    )
    leave()
    os._exit(1)


def close_rendezvous(config: "LaunchConfig") -> None:
    """Close the rendezvous, so that the other nodes end as well instead of waiting for this one."""
    from torch.distributed.elastic.rendezvous import RendezvousParameters
    from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

    parameters = RendezvousParameters(
        config.rdzv_backend, config.rdzv_endpoint, config.run_id, config.min_nodes, config.max_nodes,
        **{**config.rdzv_configs, "is_host": 0},
    )  # fmt: skip
    with suppress(Exception):  # the endpoint may have gone already
        get_rendezvous_handler(parameters).shutdown()
        time.sleep(CLOSING_S)  # if this process hosts the endpoint, the other nodes need time to read that it is closed
