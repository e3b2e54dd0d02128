"""Starting torchrun on this machine, so that signals reach the ranks and a failure is one sentence.

torchrun by itself answers a signal by ending with a traceback and exit code 1, and dies of SIGUSR1. Here the agent
passes requests to stop on to its ranks, which save and leave in order; then it leaves in order as well. Of several
machines (see `machines`) each has an agent.
"""

import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from dist_mnist.elastic.rendezvous import end_for_all, join_others, watch_meeting_place
from dist_mnist.utils.errors import MISTAKE, STALLED

# Of a rank's end by a signal, what is likely behind it.
CAUSES = {
    "SIGBUS": " (a data file became shorter while it was read, or its disk failed)",
    "SIGKILL": " (by somebody, or by the system for want of memory)",
}
REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
GRACE_S = 25.0  # from a request to the end of ranks that do not leave; they give up themselves a little before


def main() -> None:
    """`python -m dist_mnist.elastic.agent [torchrun's options] -m dist_mnist.train [options]`: torchrun, as above."""
    request = Request()
    for number in REQUESTS:
        signal.signal(number, request)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else the last to leave tells at length that others have
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
            logging.getLogger(name).addFilter(_is_news)
    if arguments.rdzv_endpoint and not arguments.standalone:
        join_others(arguments)
        watch_meeting_place(arguments, _children, request.and_wait)
    try:
        with tempfile.TemporaryDirectory(prefix="dist-mnist-logs-") as arguments.log_dir:
            run(arguments)
    except AttributeError as error:
        if error.name != "is_failed":
            raise
        # torchrun stumbles over its own missing result where a machine was kept in reserve and the run has ended.
        print(f"{socket.gethostname()} was not needed: the run has ended without it", file=sys.stderr)
    except ChildFailedError as error:
        if any(failure.exitcode == MISTAKE for failure in error.failures.values()):  # which was told
            sys.exit(MISTAKE)
        rank, failure = error.get_first_failure()
        sys.exit(f"error: the first to fail was rank {rank} (process {failure.pid}): {_reason(failure)}")
    except SignalException as end:
        if end.sigval == signal.SIGHUP:  # a rank says that restarts are of no use
            end_for_all(arguments)
            sys.exit(MISTAKE)
        sys.exit(1)
    except RendezvousClosedError:
        sys.exit(
            f"error: {socket.gethostname()} ends, because another machine ended the run; its messages say why. If that "
            "was an earlier run at the same place, start with another --rdzv-id, the same on all machines"
        )
    except (RendezvousError, DistError) as error:
        sys.exit(
            f"error: {socket.gethostname()} ends: the machines could not meet at {arguments.rdzv_endpoint}, or can "
            f"no longer ({str(error).splitlines()[0][:200]})"
        )


def _is_news(record: logging.LogRecord) -> bool:
    """Whether torchrun should report a rank's failure: not if its exit code means that it has told so itself."""
    return not (isinstance(record.args, tuple) and record.args[:1] in ((MISTAKE,), (STALLED,)))


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

    def and_wait(self) -> None:
        """Ask all ranks to stop, and wait until they have."""
        if _children():
            self(signal.SIGTERM, None)
        while _children():
            time.sleep(0.1)

    def _pass_on(self, number: int) -> None:
        told: set[int] = set()
        give_up_at = time.monotonic() + GRACE_S
        while True:
            for rank in filter(_listens, _children() - told):
                _send(rank, number)
                told.add(rank)
            if time.monotonic() > give_up_at:
                for rank in _children():
                    _send(rank, signal.SIGKILL)
            time.sleep(0.1)


def _children() -> set[int]:
    """Process ids of this process's children that have not ended."""
    tasks = Path("/proc/self/task").glob("*/children")
    children = {int(child) for task in tasks for child in task.read_text().split()}
    return {child for child in children if not _status(child).get("State", "Z").startswith("Z")}


def _listens(pid: int) -> bool:
    """Whether a process has a handler for SIGTERM; one that only just started has not."""
    return bool(int(_status(pid).get("SigCgt", "0"), 16) >> (signal.SIGTERM - 1) & 1)


def _status(pid: int) -> dict[str, str]:
    """What Linux tells of a process; nothing if it is gone."""
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return {}


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _reason(failure: Any) -> str:
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        return f"it was ended by {name}{CAUSES.get(name, '')}"
    message = failure.message if isinstance(failure.message, str) else failure.message.get("message", "")
    return f"exit code {failure.exitcode}; {message or 'see above'}"


if __name__ == "__main__":
    main()
