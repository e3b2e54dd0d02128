"""The agent that starts the ranks of a node by torchrun's launch API, and names the first failure in one sentence.

torchrun by itself answers a signal by ending with a traceback and exit code 1, and dies of SIGUSR1. Here the agent
passes stop requests on to its ranks, which save and leave in order; then it leaves in order as well. Of several nodes
(see `rendezvous`) each has an agent.
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
from dist_mnist.elastic.rendezvous import Nodes, close_rendezvous, end_start, find_endpoint, watch_endpoint
from dist_mnist.utils.errors import MISTAKE, STALLED, tell
from dist_mnist.utils.imports import garbage_collection_paused

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
    from torch.distributed.launcher.api import LaunchConfig

# Of a rank's end by a signal, what is likely behind it.
CAUSES = {
    "SIGBUS": " (a data file became shorter while it was read, or its disk failed)",
    "SIGKILL": " (by somebody, or by the kernel's OOM killer)",
}
GRACE_S = 25.0  # from a request to the end of ranks that do not leave; they give up themselves a little before


def run_agent(
    command: Sequence[str],
    nproc: int,
    nodes: Nodes,
    name: str,
    stall_timeout_s: float,
    max_restarts: int,
    ranks_listen: bool,
) -> None:
    """Run `python COMMAND` as `nproc` ranks on this node, together with those of other nodes, until all have ended.

    Args:
        name: tells this run from others that meet at the same endpoint.
        stall_timeout_s: seconds after which an endpoint that does not answer is given up.
        max_restarts: how often all ranks are started again after one has failed.
        ranks_listen: whether ranks answer a signal themselves, as those of a training, which save. Others end with
            this process at once.

    Raises:
        SystemExit: a rank failed, or the nodes cannot meet (with a sentence), or a signal came that ranks do not answer
            or before any began.
    """
    requests = StopRequests(ranks_listen)
    for number in SIGNALS:
        signal.signal(number, requests)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else the last to leave tells at length that others have
    # Started again, ranks are to meet in a store of their own, not in one that holds their forerunners' addresses.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    if nproc > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # a rank divides the cores itself, once it knows its settings
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
            rdzv_endpoint=nodes.endpoint or "localhost:0",
            max_restarts=max_restarts,
            signals_to_handle="SIGHUP",  # the others are requests
            logs_specs=DefaultLogsSpecs(log_dir),
        )
        ended = None
        if nodes.endpoint:
            ended = find_endpoint(config, nodes.rank, stall_timeout_s)
            config.local_addr = _use_network_of(nodes.endpoint)
            watch_endpoint(config, lambda: bool(children()), lambda: requests.leave(log_dir))
        with _one_sentence(config, nodes, ended):
            elastic_launch(config, sys.executable)("-u", *command)


def _silence_torchrun() -> None:
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.ERROR)
            logging.getLogger(name).addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether torchrun should report a rank's failure: not if its exit code means that it has told so itself."""
    return not (isinstance(record.args, tuple) and record.args[:1] in ((MISTAKE,), (STALLED,)))


def _use_network_of(endpoint: str) -> str | None:
    """Let ranks use the interface that leads to the endpoint; its address, by which they are to reach this node.

    By default ranks give each other the addresses that their node's name stands for, which may be a loopback one, and
    the name of rank 0's node, which others may not know.
    """
    interface, address = route_to(split_endpoint(endpoint)[0])
    if interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    return address


@contextmanager
def _one_sentence(config: "LaunchConfig", nodes: Nodes, ended: int | None) -> Iterator[None]:
    """Turn what torchrun's API raises into an exit code and a sentence, for a `with` block.

    Unless it is a user's mistake, which the other nodes are to hear of when they come, the run may be started again.
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
        if any(failure.exitcode == MISTAKE for failure in error.failures.values()):  # which was told
            sys.exit(MISTAKE)
        end_start(config, ended)
        rank, failure = error.get_first_failure()
        sys.exit(f"error: the first to fail was rank {rank} (process {failure.pid}): {_reason(failure)}")
    except SignalException:  # SIGHUP, by which a rank says that restarts are of no use
        if nodes.endpoint:
            close_rendezvous(config)
        sys.exit(MISTAKE)
    except RendezvousClosedError:
        sys.exit(
            f"error: {host} ends, because another node ended the run; its messages say why. Once that is mended, "
            "start with another --rdzv-id, the same on all nodes"
        )
    except (RendezvousError, DistError) as error:
        sys.exit(
            f"error: {host} ends: the nodes could not meet at the rendezvous endpoint {config.rdzv_endpoint}, or can "
            f"no longer ({str(error).splitlines()[0][:200]})"
        )


def _reason(failure: "ProcessFailure") -> str:
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        return f"it was ended by {name}{CAUSES.get(name, '')}"
    message = failure.message if isinstance(failure.message, str) else failure.message.get("message", "")
    return f"exit code {failure.exitcode}; {message or 'see above'}"


class StopRequests:
    """A signal handler that passes the signal on to all ranks, and to those that torchrun still starts."""

    def __init__(self, ranks_listen: bool) -> None:
        self.made, self.ranks_listen = False, ranks_listen

    def __call__(self, number: int, _: object) -> None:
        if not self.ranks_listen or not children():
            sys.exit(128 + number)  # torchrun ends its ranks; or nothing has begun
        if not self.made:
            self.made = True
            threading.Thread(target=self._pass_on, args=(number,), daemon=True).start()

    def leave(self, log_dir: str) -> None:
        """Ask all ranks to stop, wait until they have, and remove their logs."""
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
    """The ranks of an agent, of this process without `pid`, that have not ended; none if it has itself.

    They are its children that lead a session of their own, as torchrun lets them.
    """
    with suppress(psutil.NoSuchProcess):
        return set(filter(_is_rank, psutil.Process(pid).children()))
    return set()


def _is_rank(child: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess, ProcessLookupError):
        return os.getsid(child.pid) == child.pid and child.status() != psutil.STATUS_ZOMBIE
    return False


def _listens(rank: psutil.Process) -> bool:
    """Whether a rank has a handler for SIGTERM; one that only just started has not, and a signal would kill it.

    Linux tells, and psutil does not pass it on. For a rank to tell would take a channel between the two.
    """
    with suppress(OSError):
        [caught] = re.findall(r"SigCgt:\s*(\w+)", Path(f"/proc/{rank.pid}/status").read_text())
        return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)
    return False


def _send(rank: psutil.Process, number: int) -> None:
    with suppress(psutil.NoSuchProcess):
        rank.send_signal(number)
