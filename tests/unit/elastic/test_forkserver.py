"""The fork server with a module that is no training: its forks, and what becomes of them."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from helpers.runs import are_gone, descendants, wait_for

AGENT = """
import os, sys, time
from dist_mnist.elastic.forkserver import ForkServer
rank = ForkServer(["-m", "http.server", "0", "--bind", "127.0.0.1"]).fork(os.environ)
print(rank.pid, file=sys.stderr, flush=True)  # the rank speaks on the other
time.sleep(600)
"""


@pytest.fixture
def agent() -> Iterator[Callable[[], tuple[subprocess.Popen[str], list[int]]]]:
    """`agent()` starts one with a rank that would serve for ever; it, and the processes below it, the rank first."""
    started: list[int] = []

    def start() -> tuple[subprocess.Popen[str], list[int]]:
        process = subprocess.Popen([sys.executable, "-c", AGENT], stderr=subprocess.PIPE, text=True)
        started.append(process.pid)
        assert process.stderr is not None
        rank = int(process.stderr.readline())
        started.extend(pids := [rank, *set(descendants(process.pid)) - {rank}])
        return process, pids

    yield start
    for pid in started:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_rank_that_does_not_listen_and_server_end_with_a_killed_agent(agent):
    process, (rank, server) = agent()
    assert os.getsid(rank) == rank
    process.kill()
    process.wait()
    wait_for(are_gone([rank, server]))
