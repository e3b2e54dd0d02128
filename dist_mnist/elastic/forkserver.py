"""The fork server: a process that has imported what ranks import. Each rank is a fork of it.

A rank thus starts work at once, at the first start and after each failure, instead of spending more than a second of
CPU time on importing torch. The server adds hardly any memory: forks share the imported modules.

A process can be forked safely while it has one thread and has not initialised CUDA; imports normally do neither. If
an import has started a thread, the server starts ranks as new programs.

A rank becomes a child of the agent, not of the server: the process between them exits, and the agent adopts the orphan
(as a child subreaper). Exit codes, signals and the death of the agent thus work as without the server.
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
TIMEOUT_S = 60.0  # after which a server that does not answer counts as lost
HANDLED = (*SIGNALS, signal.SIGHUP)  # the agent handles these, so a new program has their defaults, even under nohup
START = (sys.executable, "-u")  # start of a rank's command, before its module


@contextmanager
def forked_ranks(command: Sequence[str]) -> Iterator[None]:
    """Context manager: torchrun's API gets a fork of a fork server where it starts `python -u COMMAND`.

    On other systems than Linux, or if forking fails, ranks are new processes.
    """
    if sys.platform != "linux":
        yield
        return
    with closing(ForkServer(command)) as server:
        with garbage_collection_paused():  # this imports torch, at the same time as the server
            from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
        start_new = SubprocessHandler._popen

        def start(handler: SubprocessHandler, args: tuple[str, ...], env: dict[str, str]) -> Any:
            forked = server.fork(env) if args == (*START, *command) else None  # else the command starts with numactl
            return forked or start_new(handler, args, env)

        SubprocessHandler._popen = start  # type: ignore[assignment]
        try:
            yield
        finally:
            SubprocessHandler._popen = start_new  # type: ignore[method-assign]


class ForkServer:
    """The agent's handle on a fork server for `python -u COMMAND`; COMMAND begins with `-m MODULE`."""

    def __init__(self, command: Sequence[str]):
        ours, theirs = socket.socketpair()
        ours.settimeout(TIMEOUT_S)
        with ours, theirs:
            own = ("-m", "dist_mnist.elastic.forkserver", str(theirs.fileno()), *command)
            # numpy's OpenBLAS would start threads at import; ranks multiply matrices by torch.
            env = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
            self.process = subprocess.Popen([*START, *own], pass_fds=[theirs.fileno()], env=env)
            self.channel = ours.makefile("rw")

    def fork(self, env: Mapping[str, str]) -> "ForkedProcess | None":
        """Fork a rank with the environment `env`; return None if the server is lost, now and later."""
        set_attribute(PR_SET_CHILD_SUBREAPER, 1)  # only during the fork: the agent must not adopt a rank's own orphans
        try:
            print(json.dumps(dict(env)), file=self.channel, flush=True)
            return ForkedProcess(int(self.channel.readline()))
        except (OSError, ValueError):  # the server was killed or stopped, or the rank did not become the agent's child
            self.close()
            return None
        finally:
            set_attribute(PR_SET_CHILD_SUBREAPER, 0)

    def close(self) -> None:
        """Kill the server. It holds no state, and its ranks are not affected."""
        with suppress(OSError):
            self.channel.close()
        self.process.kill()
        self.process.wait()


class ForkedProcess:
    """An adopted child process, with the part of the interface of `subprocess.Popen` that torchrun's API uses."""

    def __init__(self, pid: int):
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, negative after a signal; None while the process runs."""
        if self.returncode is None and (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.returncode = os.waitstatus_to_exitcode(ended[1])
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Wait for the process to end and return its exit code.

        Raises:
            subprocess.TimeoutExpired: the process still runs after `timeout` seconds.
        """
        until = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(POLL_S)
        return code


def serve(descriptor: int, module: str) -> bool:
    """Fork a rank for each environment that the agent sends as a line of JSON. Returns only in the forked ranks.

    Returns:
        Whether the imports of a rank are in place; if not, the rank must start as a new program.
    """
    agent = os.getppid()
    set_attribute(PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in HANDLED:
        signal.signal(number, signal.SIG_IGN)  # a terminal signals all processes; the server ends with its agent
    let_threads_sleep()
    process_began_s()  # a rank's time counts from the start of its imports
    imported = False
    with garbage_collection_paused(), suppress(Exception):  # ranks will meet the same exception, and report it
        importlib.import_module(module)
        imported = _can_be_forked()
    channel = socket.socket(fileno=descriptor).makefile("rw")
    for line in channel:
        if _fork_twice():
            for number in HANDLED:
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            os.environ.clear()
            os.environ.update(json.loads(line))
            set_attribute(PR_SET_PDEATHSIG, signal.SIGTERM)  # a training rank with a handler saves on this signal
            adopted = os.getppid() == agent
            print(os.getpid() if adopted else "", file=channel, flush=True)
            if adopted:
                return imported
            break
    sys.exit()


def _can_be_forked() -> bool:
    """Whether this process has one thread and has not initialised CUDA."""
    torch = sys.modules.get("torch")
    return len(os.listdir("/proc/self/task")) == 1 and not (torch and torch.cuda.is_initialized())


def _fork_twice() -> bool:
    """Fork an orphan that leads its own session. Return True in the orphan, False in the caller."""
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
    """Run COMMAND as `python -u COMMAND` would."""
    _, module, *options = command
    if not imported:
        os.execv(sys.executable, [*START, *command])
    if not hasattr(sys.modules[module], "__path__"):
        del sys.modules[module]  # the module runs again as __main__; its imports stay loaded
    sys.argv = [module, *options]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    run_rank(sys.argv[2:], serve(int(sys.argv[1]), sys.argv[3]))
