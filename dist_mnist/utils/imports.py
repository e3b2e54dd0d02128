"""Importing large packages in less time, and what has to be said before torch is imported."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """Import within a `with` block what makes many objects and hardly any garbage: torch, say, in 4/5 of the time.

    Those objects stay for ever, and are left out of later collections.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def let_threads_sleep() -> None:
    """Let OpenMP's threads wait for each other spinning for some 0.1 ms, and then asleep; before torch is imported.

    By default libgomp's spin for milliseconds. Where other work has one of their cores, that is most of the time.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
