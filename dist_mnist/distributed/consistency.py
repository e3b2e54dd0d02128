"""The consistency check at the start of a run: settings, data, software and run directory match on all ranks."""

import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from dist_mnist.distributed.collectives import broadcast_json, check_agreement, gather_json
from dist_mnist.distributed.world import World
from dist_mnist.utils.errors import UserError
from dist_mnist.utils.versions import versions

VISIBLE_WITHIN_S = 10.0  # shared storage may show a new file with a delay


@dataclass(frozen=True)
class RankFacts:
    """Facts that must be the same on all ranks of a run; None if a rank could not determine one."""

    settings: Mapping[str, object] | None  # JSON values
    data: str | None  # the data's fingerprint
    network: Mapping[str, str | None] | None  # digests of its code and its initial weights
    versions: Mapping[str, str]


def check_ranks(world: World, facts: RankFacts, run_dir: Path, owner_token: Callable[[], str | None]) -> None:
    """Check that all ranks have the same `facts` and share the run directory that rank 0 writes. Collective.

    Args:
        owner_token: reads the token that rank 0 has written to `run_dir`; None if it is not visible.

    Raises:
        UserError: on every rank, if one has other facts (the message names it) or does not share the run directory.
    """
    check_agreement(world, **asdict(facts))
    if world.spans_nodes and not all(gather_json(world, is_visible(owner_token, world))):
        raise UserError(
            f"the run directory {run_dir.resolve()} (as seen on {socket.gethostname()}) is not on storage that all "
            "nodes share, and rank 0 may move to another node: give a --run-dir on shared storage"
        )


def software_versions(device: torch.device) -> dict[str, str]:
    """Return the versions of all software that must be the same on all ranks."""
    if device.type != "cuda":
        return versions()
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return versions() | {"cuda": str(torch.version.cuda), "nccl": nccl}


def is_visible(read: Callable[[], str | None], world: World) -> bool:
    """Whether this rank reads the same as rank 0 within `VISIBLE_WITHIN_S`. Collective."""
    expected, until = broadcast_json(world, read()), time.monotonic() + VISIBLE_WITHIN_S
    while read() != expected and time.monotonic() < until:
        time.sleep(0.1)
    return read() == expected
