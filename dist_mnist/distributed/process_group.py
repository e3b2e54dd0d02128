"""Ranks: who this process is, the process group's start and end, and agreement between its members."""

import gc
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import count

import torch.distributed as dist

from dist_mnist.distributed.world import World

_groups = count()  # that this process has formed, each a call of all ranks


@contextmanager
def process_group(world: World, timeout_s: float, store: dist.Store | None = None) -> Iterator[dist.Store | None]:
    """Initialise the process group of all ranks for a `with` block, and yield its store. Collective.

    The rendezvous is in `store`, or else at torchrun's MASTER_ADDR and MASTER_PORT. A world of one process needs no
    group, and gets None. At the end of the block the ranks wait for each other at a barrier; after an exception a rank
    destroys its group at once, and the others get an error from their next collective.

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
    # Its functions take the group that exists when it is first imported as their default, and so keep it, and gloo's
    # threads, alive for ever. DDP imports it in passing; so it has to be imported while there is no group yet.
    importlib.import_module("torch.distributed.nn.functional")
    if world.backend == "gloo":
        _let_threads_take_turns()
    device_id = world.device if world.device.type == "cuda" else None
    timeout = timedelta(seconds=timeout_s)
    if store is None:
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore(f"group-{next(_groups)}", store)
    if not world.spans_nodes:
        # Processes that torchrun started again meet in the same store as their forerunners, whose addresses are still
        # in it. On one machine the count of restarts tells them apart; of several nodes see `agent.run_agent`.
        store = dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(
        world.backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout, device_id=device_id
    )
    try:
        yield store
        dist.barrier()
    finally:
        # What the block has left behind (DDP's reducer) keeps the group's threads alive as well. A gloo thread that
        # wants Python's lock while the interpreter ends aborts the process, so none may be left.
        gc.collect()
        dist.destroy_process_group()


def _let_threads_take_turns() -> None:
    """Make this a batch process for the scheduler: none of its threads that wakes interrupts one that runs.

    gloo's event loop wakes while another thread still holds the lock of the connection that the event is of, and tries
    again until it gets it. Where both share a core, as with a rank on each, the loop kept the holder from letting go
    for a tick of the clock: a collective took 1.9 ms instead of 0.25 (two ranks, two cores, Linux 6.18).
    """
    if hasattr(os, "sched_setscheduler") and os.sched_getscheduler(0) == os.SCHED_OTHER:
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
