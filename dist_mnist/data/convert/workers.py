"""An ordered parallel map over worker processes, with only a few items in memory at a time."""

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
WAITING = 3  # items per worker that are in progress or waiting


def ordered_map(function: Callable[[T], R], items: Iterable[T], jobs: int) -> Generator[R, None, None]:
    """Yield the results of a picklable function in item order; with `jobs` > 1, computed by that many processes.

    The workers exit with the iterator, however it ends, and with this process.

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
            "a worker process was killed, perhaps by the kernel's OOM killer: run the command again, with a smaller "
            "--jobs if memory ran out"
        ) from None
    finally:
        ours.close()  # ends the workers, even while they are busy
        alive.close()
        pool.shutdown(cancel_futures=True)


def _begin(alive: Connection) -> None:
    """Initialise a worker: ignore terminal signals, and exit with the parent or when it closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(alive,), daemon=True).start()


def _end_with(alive: Connection) -> None:
    try:
        alive.poll(None)
    finally:
        os._exit(1)
