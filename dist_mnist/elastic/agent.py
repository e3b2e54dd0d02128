"""The agent: it starts the ranks of a node through torchrun's launch API and reports the first failure in a sentence.

On a signal, torchrun ends with a traceback and exit code 1, and SIGUSR1 kills it. The agent instead forwards stop
requests to its ranks, waits until they have saved and exited, and shuts down gracefully as well. In a job of several
nodes (see `rendezvous`) each node has an agent.
"""

import logging
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from dist_mnist.elastic.forkserver import forked_ranks
from dist_mnist.elastic.net import route_to, split_endpoint
from dist_mnist.elastic.preemption import SIGNALS
from dist_mnist.elastic.rendezvous import (
    Nodes,
    close_rendezvous,
    end_start,
    find_endpoint,
    serve_this_node,
    watch_endpoint,
)
from dist_mnist.utils.errors import MISTAKE, STALLED, tell
from dist_mnist.utils.imports import garbage_collection_paused

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
    from torch.distributed.launcher.api import LaunchConfig

# Likely causes when a signal kills a rank.
CAUSES = {
    "SIGBUS": " (a data file became shorter while it was read, or its disk failed)",
    "SIGKILL": " (sent by a user, or by the kernel's OOM killer)",
}
GRACE_S = 25.0  # from a stop request until ranks that still run are killed; they give up a little earlier themselves


def run_agent(
    command: Sequence[str],
    nproc: int,
    nodes: Nodes,
    name: str,
    stall_timeout_s: float,
    max_restarts: int,
    ranks_listen: bool,
) -> None:
    """Run `python COMMAND` as `nproc` ranks on this node, jointly with the ranks of other nodes, until all have ended.

    Args:
        name: distinguishes this run from others at the same rendezvous endpoint.
        stall_timeout_s: seconds after which an endpoint that does not answer counts as lost.
        max_restarts: how many times all ranks are restarted after a failure.
        ranks_listen: whether ranks handle signals themselves; training ranks do, to save. Other ranks end with
            this process at once.

    Raises:
        SystemExit: a rank failed or the rendezvous failed (with an error message), or a signal came that ranks do not
            handle or before any rank had started.
    """
    requests = StopRequests(ranks_listen)
    for number in SIGNALS:
        signal.signal(number, requests)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else the last rank to exit logs at length that others did
    # Restarted ranks need a fresh store: the old one holds the addresses of the ranks before them.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    if nproc > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # each rank sets its thread count once it knows its settings
    with forked_ranks(command), tempfile.TemporaryDirectory(prefix="dist-mnist-logs-") as log_dir:
        with garbage_collection_paused():
            from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
            from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        _silence_torchrun()
        config = LaunchConfig(
            min_nodes=nodes.min_nodes,
            max_nodes=nodes.max_nodes,
            nproc_per_node=nproc,
            run_id=nodes.run_id or f"{name}@{nodes.endpoint or uuid.uuid4()}",
            rdzv_backend="c10d",
            rdzv_endpoint=nodes.endpoint or "",
            max_restarts=max_restarts,
            signals_to_handle="SIGHUP",  # the other signals are stop requests
            logs_specs=DefaultLogsSpecs(log_dir),
        )
        ended = None
        if nodes.endpoint:
            ended = find_endpoint(config, nodes.rank, stall_timeout_s)
            config.local_addr = _use_network_of(nodes.endpoint)
            watch_endpoint(config, lambda: bool(children()), lambda: requests.leave(log_dir))
        else:
            _store = serve_this_node(config)  # which serves until this function returns
        with _one_sentence(config, nodes, ended):
            elastic_launch(config, sys.executable)("-u", *command)


def _silence_torchrun() -> None:
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.ERROR)
            logging.getLogger(name).addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether torchrun should log a rank's failure: not if the exit code means that the rank reported it itself."""
    return not (isinstance(record.args, tuple) and record.args[:1] in ((MISTAKE,), (STALLED,)))


def _use_network_of(endpoint: str) -> str | None:
    """Make ranks use the network interface that leads to the endpoint; return the address of this node there.

    By default ranks exchange the address their host name resolves to, which may be a loopback address, and the name of
    rank 0's host, which other nodes may be unable to resolve.
    """
    interface, address = route_to(split_endpoint(endpoint)[0])
    if interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    return address


@contextmanager
def _one_sentence(config: "LaunchConfig", nodes: Nodes, ended: int | None) -> Iterator[None]:
    """Context manager: turn exceptions of torchrun's API into an exit code and a one-sentence error.

    The run may then be started again, unless the user made a mistake: late nodes must find the rendezvous closed.
    """
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousError

    host = socket.gethostname()
    try:
        yield
        end_start(config, ended)
    except AttributeError as error:
        if error.name != "is_failed":
            raise
        # torchrun stumbles over its own missing result where a node was kept in reserve and the run has ended.
        tell(f"{host} was not needed: the run has ended without it")
    except ChildFailedError as error:
        if any(failure.exitcode == MISTAKE for failure in error.failures.values()):  # the rank has reported it
            sys.exit(MISTAKE)
        end_start(config, ended)
        rank, failure = error.get_first_failure()
        sys.exit(f"error: the first rank to fail was rank {rank} (process {failure.pid}): {_reason(failure)}")
    except SignalException:  # SIGHUP: a rank found that restarts cannot help
        if nodes.endpoint:
            close_rendezvous(config)
        sys.exit(MISTAKE)
    except RendezvousClosedError:
        sys.exit(
            f"error: {host} ends, because another node ended the run; see that node's messages. After fixing the "
            "cause, start with a new --rdzv-id, the same on all nodes"
        )
    except (RendezvousError, DistError) as error:
        sys.exit(
            f"error: {host} ends: the rendezvous of the nodes at {config.rdzv_endpoint} failed, or the connection was "
            f"lost ({str(error).splitlines()[0][:200]})"
        )


def _reason(failure: "ProcessFailure") -> str:
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        return f"killed by {name}{CAUSES.get(name, '')}"
    message = failure.message if isinstance(failure.message, str) else failure.message.get("message", "")
    return f"exit code {failure.exitcode}; {message or 'see above'}"


class StopRequests:
    """A signal handler that forwards the signal to all ranks, including those that torchrun starts later."""

    def __init__(self, ranks_listen: bool) -> None:
        self.made, self.ranks_listen = False, ranks_listen

    def __call__(self, number: int, _: object) -> None:
        if not self.ranks_listen or not children():
            sys.exit(128 + number)  # torchrun then ends its ranks; or there are none yet
        if not self.made:
            self.made = True
            threading.Thread(target=self._pass_on, args=(number,), daemon=True).start()

    def leave(self, log_dir: str) -> None:
        """Send all ranks a stop request, wait until they have exited, and remove their logs."""
        if children():
            self(signal.SIGTERM, None)
        while children():
            time.sleep(0.1)
        shutil.rmtree(log_dir, ignore_errors=True)

    def _pass_on(self, number: int) -> None:
        told: set[psutil.Process] = set()
        give_up_at = time.monotonic() + GRACE_S
        while True:
            for rank in filter(_listens, children() - told):
                _send(rank, number)
                told.add(rank)
            if time.monotonic() > give_up_at:
                for rank in children():
                    _send(rank, signal.SIGKILL)
            time.sleep(0.1)


def children(pid: int | None = None) -> set[psutil.Process]:
    """Return the live ranks of the agent with process id `pid` (default: this process); empty if the agent has ended.

    Ranks are the child processes that are session leaders, as torchrun makes them.
    """
    with suppress(psutil.NoSuchProcess):
        return set(filter(_is_rank, psutil.Process(pid).children()))
    return set()


def _is_rank(child: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess, ProcessLookupError):
        return os.getsid(child.pid) == child.pid and child.status() != psutil.STATUS_ZOMBIE
    return False


def _listens(rank: psutil.Process) -> bool:
    """Whether a rank has installed its SIGTERM handler; a signal before that would kill it.

    Read from /proc, as psutil does not expose it; asking the rank would require a channel to it.
    """
    with suppress(OSError):
        [caught] = re.findall(r"SigCgt:\s*(\w+)", Path(f"/proc/{rank.pid}/status").read_text())
        return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)
    return False


def _send(rank: psutil.Process, number: int) -> None:
    with suppress(psutil.NoSuchProcess):
        rank.send_signal(number)
