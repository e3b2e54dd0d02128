"""Faster imports of large packages, and settings that must be made before torch is imported."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """Pause the garbage collector for a `with` block of imports: torch, for example, imports in 4/5 of the time.

    All objects created so far are then exempt from later collections (gc.freeze).
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def let_threads_sleep() -> None:
    """Let waiting OpenMP threads spin for about 0.1 ms, then sleep; call before torch is imported.

    By default libgomp's threads spin for milliseconds. Where other work uses one of their cores, that takes most of
    the time.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
