"""The consistency check at the start of each run: settings, data, software and run directory are alike on all ranks."""

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

VISIBLE_WITHIN_S = 10.0  # shared storage may show a new file late


@dataclass(frozen=True)
class RankFacts:
    """What has to be the same on all ranks of a run; None where a rank could not come to know it."""

    settings: Mapping[str, object] | None  # JSON values
    data: str | None  # the data's fingerprint
    network: Mapping[str, str | None] | None  # digests of its code and its initial weights
    versions: Mapping[str, str]


def check_ranks(world: World, facts: RankFacts, run_dir: Path, owner_token: Callable[[], str | None]) -> None:
    """Check that all ranks have the same `facts`, and see the run directory that rank 0 writes. Collective.

    Args:
        owner_token: reads from `run_dir` what rank 0 has written there; None where nothing is seen.

    Raises:
        UserError: on every rank, when one differs; it names the rank.
    """
    check_agreement(world, **asdict(facts))
    if world.spans_nodes and not all(gather_json(world, is_visible(owner_token, world))):
        raise UserError(
            f"not every node sees the run directory that rank 0 writes (here, on {socket.gethostname()}: "
            f"{run_dir.resolve()}): rank 0 may move to another node; give a --run-dir that all nodes share"
        )


def software_versions(device: torch.device) -> dict[str, str]:
    """Versions of all software that ranks have to have in common."""
    if device.type != "cuda":
        return versions()
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return versions() | {"cuda": str(torch.version.cuda), "nccl": nccl}


def is_visible(read: Callable[[], str | None], world: World) -> bool:
    """Whether this rank comes to read what rank 0 reads, within ten seconds. Collective."""
    expected, until = broadcast_json(world, read()), time.monotonic() + VISIBLE_WITHIN_S
    while read() != expected and time.monotonic() < until:
        time.sleep(0.1)
    return read() == expected
