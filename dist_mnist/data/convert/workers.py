"""Pieces of work for all cores: read by worker processes, given back in order, only a few at a time in memory."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import TypeVar

from dist_mnist.utils.errors import Shortage

T = TypeVar("T")
R = TypeVar("R")
WAITING = 3  # pieces for each worker that are read, or wait to be read or written


def ordered_map(function: Callable[[T], R], items: Iterable[T], jobs: int) -> Generator[R, None, None]:
    """The results of a picklable function, in the items' order; with more than one job, by so many worker processes.

    The workers end with the iterator, however it ends, and with this process.

    Raises:
        Shortage: a worker was killed.
    """
    if jobs == 1:
        yield from map(function, items)
        return
    context = multiprocessing.get_context("spawn")
    alive, ours = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(jobs, context, _begin, (alive,))
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= WAITING * jobs:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
        pool.shutdown()
    except BrokenProcessPool:
        raise Shortage(
            "a worker process was killed, by the kernel's OOM killer or by somebody: start it again, with a smaller "
            "--jobs if memory ran out"
        ) from None
    finally:
        ours.close()  # ends the workers, also in the middle of their work
        alive.close()
        pool.shutdown(cancel_futures=True)


def _begin(alive: Connection) -> None:
    """In a worker: leave the signals of a terminal to the parent, and end with it, or when it closes its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(alive,), daemon=True).start()


def _end_with(alive: Connection) -> None:
    try:
        alive.poll(None)
    finally:
        os._exit(1)
