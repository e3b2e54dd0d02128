"""The consistency check at the start of each run: settings, data, software and run directory are alike on all ranks."""

import socket
import time
from collections.abc import Callable

import torch

from dist_mnist.distributed.collectives import broadcast_json, check_agreement, gather_json
from dist_mnist.distributed.world import World
from dist_mnist.run.plan import Plan
from dist_mnist.utils.errors import UserError
from dist_mnist.utils.versions import versions

SEEN_WITHIN_S = 10.0  # shared storage may show a new file late


def check_ranks(world: World, plan: Plan) -> None:
    """What every run checks at its start: the same settings, data, software and run directory on all ranks. Collective.

    Raises:
        UserError: on every rank, when one differs; it names the rank.
    """
    check_agreement(world, settings=plan.config.shared(), data=plan.data.fingerprint, versions=software(world.device))
    if world.spans_nodes and not all(gather_json(world, sees(plan.run.ownership.token, world))):
        raise UserError(
            f"not every machine sees the run directory that rank 0 writes (here, on {socket.gethostname()}: "
            f"{plan.run.path.resolve()}): rank 0 may move to another machine; give a --run-dir that all machines share"
        )


def software(device: torch.device) -> dict[str, str]:
    """Versions of all that ranks have to have in common."""
    if device.type != "cuda":
        return versions()
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return versions() | {"cuda": str(torch.version.cuda), "nccl": nccl}


def sees(look: Callable[[], str | None], world: World) -> bool:
    """Whether this rank comes to see what rank 0 sees. Collective."""
    expected, until = broadcast_json(world, look()), time.monotonic() + SEEN_WITHIN_S
    while look() != expected and time.monotonic() < until:
        time.sleep(0.1)
    return look() == expected
