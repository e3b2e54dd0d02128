"""Initialisation and shutdown of the process group."""

import gc
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import count

import torch.distributed as dist

from dist_mnist.distributed.world import World

_groups = count()  # number of groups that this process has formed, the same on all ranks


@contextmanager
def process_group(world: World, timeout_s: float, store: dist.Store | None = None) -> Iterator[dist.Store | None]:
    """Initialise the process group of all ranks for a `with` block, and yield its store. Collective.

    The rendezvous uses `store`, or by default torchrun's MASTER_ADDR and MASTER_PORT. A world of one process needs no
    group; None is yielded. The block ends with a barrier. After an exception a rank destroys its group at once, and the
    next collective of the other ranks raises an error.

    Args:
        timeout_s: seconds after which the rendezvous or a collective fails.

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> from dist_mnist import World, process_group, use_device
        >>> world = use_device(World.from_environment(), "cpu")
        >>> with process_group(world, timeout_s=600):
        ...     rank = torch.tensor([world.rank])
        ...     if world.size > 1:
        ...         dist.all_reduce(rank)
        >>> rank
        tensor([0])
    """
    if world.size == 1:
        yield None
        return
    # Import this module, which DDP imports later, before any group exists: its functions use the group of the moment
    # of import as a default argument, which would keep that group and gloo's threads alive forever.
    importlib.import_module("torch.distributed.nn.functional")
    if world.backend == "gloo":
        _let_threads_take_turns()
    device_id = world.device if world.device.type == "cuda" else None
    timeout = timedelta(seconds=timeout_s)
    if store is None:
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore(f"group-{next(_groups)}", store)
    if not world.spans_nodes:
        # Processes that torchrun has restarted use the same store as their predecessors, whose addresses are still in
        # it. On one node the restart count separates them; for several nodes see `agent.run_agent`.
        store = dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(
        world.backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout, device_id=device_id
    )
    try:
        yield store
        dist.barrier()
    finally:
        # Collect what the block has left (DDP's reducer), which keeps the group's threads alive: a gloo thread that
        # requests the GIL during interpreter shutdown aborts the process.
        gc.collect()
        dist.destroy_process_group()


def _let_threads_take_turns() -> None:
    """Give this process the scheduling policy SCHED_BATCH: a thread that wakes does not preempt a running one.

    gloo's event loop wakes while another thread still holds the lock of the event's connection, and spins until it gets
    it. If both share a core, as with one rank per core, the loop kept the holder from releasing the lock for a
    scheduler tick: a collective took 1.9 ms instead of 0.25 (two ranks, two cores, Linux 6.18).
    """
    if hasattr(os, "sched_setscheduler") and os.sched_getscheduler(0) == os.SCHED_OTHER:
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
