"""The fork server: a process that has imported what ranks import, and waits. Each rank is a fork of it.

So a rank begins to work at once, at the first start and after each failure, instead of importing torch, which takes
more than a second of a core. Beside the ranks, the server takes hardly any memory: what was imported is shared.

A process may be forked as long as it has one thread and has not initialised CUDA: imports do neither. Where an import
has started a thread all the same, the server starts ranks as new programs.

A rank becomes the agent's child, not the server's: the process between them ends, and the agent takes the orphan (as
a child subreaper). So exit codes, signals and the end of the agent reach whom they would have reached.
"""

import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from typing import Any

from dist_mnist.elastic.preemption import PR_SET_PDEATHSIG, SIGNALS, set_attribute
from dist_mnist.utils.clock import process_began_s
from dist_mnist.utils.imports import garbage_collection_paused, let_threads_sleep

PR_SET_CHILD_SUBREAPER = 36
POLL_S = 0.01
TIMEOUT_S = 60.0  # after which a server that does not answer is given up
HANDLED = (*SIGNALS, signal.SIGHUP)  # by the agent, so that a new program begins with their defaults, under nohup too
START = (sys.executable, "-u")  # of a rank, before its module


@contextmanager
def forked_ranks(command: Sequence[str]) -> Iterator[None]:
    """For a `with` block: where torchrun's API starts `python -u COMMAND`, it gets a fork of a server.

    Without Linux, or where no fork can be had, ranks are new processes.
    """
    if sys.platform != "linux":
        yield
        return
    with closing(ForkServer(command)) as server:
        with garbage_collection_paused():  # which imports torch, while the server does
            from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
        start_new = SubprocessHandler._popen

        def start(handler: SubprocessHandler, args: tuple[str, ...], env: dict[str, str]) -> Any:
            forked = server.fork(env) if args == (*START, *command) else None  # else numactl stands before it
            return forked or start_new(handler, args, env)

        SubprocessHandler._popen = start  # type: ignore[assignment]
        try:
            yield
        finally:
            SubprocessHandler._popen = start_new  # type: ignore[method-assign]


class ForkServer:
    """The agent's end of a fork server for `python -u COMMAND`, whose first words are `-m MODULE`."""

    def __init__(self, command: Sequence[str]):
        ours, theirs = socket.socketpair()
        ours.settimeout(TIMEOUT_S)
        with ours, theirs:
            own = ("-m", "dist_mnist.elastic.forkserver", str(theirs.fileno()), *command)
            # By itself numpy's OpenBLAS starts threads when it is imported; a rank's matrices are torch's.
            env = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
            self.process = subprocess.Popen([*START, *own], pass_fds=[theirs.fileno()], env=env)
            self.channel = ours.makefile("rw")

    def fork(self, env: Mapping[str, str]) -> "ForkedProcess | None":
        """A rank with the environment `env`; None if none can be had, now and later."""
        set_attribute(PR_SET_CHILD_SUBREAPER, 1)  # for this moment only: a rank's own orphans are none of the agent's
        try:
            print(json.dumps(dict(env)), file=self.channel, flush=True)
            return ForkedProcess(int(self.channel.readline()))
        except (OSError, ValueError):  # somebody has killed or stopped the server, or it is not the agent's child
            self.close()
            return None
        finally:
            set_attribute(PR_SET_CHILD_SUBREAPER, 0)

    def close(self) -> None:
        """End the server, which keeps nothing; its ranks do not notice."""
        with suppress(OSError):
            self.channel.close()
        self.process.kill()
        self.process.wait()


class ForkedProcess:
    """A child that this process did not start itself, with what torchrun's API asks of a `subprocess.Popen`."""

    def __init__(self, pid: int):
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative after a signal; None while it runs."""
        if self.returncode is None and (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.returncode = os.waitstatus_to_exitcode(ended[1])
        return self.returncode

    def wait(self, timeout: float) -> int:
        """The exit code, once it has ended.

        Raises:
            subprocess.TimeoutExpired: it has not within `timeout` seconds.
        """
        until = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(POLL_S)
        return code


def serve(descriptor: int, module: str) -> bool:
    """Fork a rank for each environment, a line of JSON, that the agent sends; returns in each rank alone, with that.

    Returns:
        Whether what a rank needs has been imported; if not, it has to begin as a new program.
    """
    agent = os.getppid()
    set_attribute(PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in HANDLED:
        signal.signal(number, signal.SIG_IGN)  # a terminal sends them to everybody; the server goes with its agent
    let_threads_sleep()
    process_began_s()  # a rank began when its imports did
    imported = False
    with garbage_collection_paused(), suppress(Exception):  # which ranks will meet, and tell
        importlib.import_module(module)
        imported = _can_be_forked()
    channel = socket.socket(fileno=descriptor).makefile("rw")
    for line in channel:
        if _fork_twice():
            for number in HANDLED:
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            os.environ.clear()
            os.environ.update(json.loads(line))
            set_attribute(PR_SET_PDEATHSIG, signal.SIGTERM)  # by which a rank of a training will save, once it listens
            adopted = os.getppid() == agent
            print(os.getpid() if adopted else "", file=channel, flush=True)
            if adopted:
                return imported
            break
    sys.exit()


def _can_be_forked() -> bool:
    """Whether this process has one thread, and has not begun to use a GPU."""
    torch = sys.modules.get("torch")
    return len(os.listdir("/proc/self/task")) == 1 and not (torch and torch.cuda.is_initialized())


def _fork_twice() -> bool:
    """Make a process that leads a session of its own, and whose parent has ended; whether this is it."""
    if between := os.fork():
        os.waitpid(between, 0)
        return False
    between = os.getpid()
    if os.fork():
        os._exit(0)
    os.setsid()
    while os.getppid() == between:
        time.sleep(0.0001)
    return True


def run_rank(command: Sequence[str], imported: bool) -> None:
    """Do what `python -u COMMAND` does."""
    _, module, *options = command
    if not imported:
        os.execv(sys.executable, [*START, *command])
    if not hasattr(sys.modules[module], "__path__"):
        del sys.modules[module]  # it is run anew, and what it has imported is there
    sys.argv = [module, *options]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    run_rank(sys.argv[2:], serve(int(sys.argv[1]), sys.argv[3]))
