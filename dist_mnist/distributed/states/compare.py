"""Comparison of all ranks' states (weights, EMA, optimizer) by digests, which finds silent data corruption.

All ranks hold the same bits at every step. A processor, GPU or memory that gets one wrong reports nothing, and what the
rank sends from then on corrupts the weights of all others.
"""

import socket
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from dist_mnist.distributed.collectives import gather_json, gather_rows
from dist_mnist.distributed.device import device_name, num_threads
from dist_mnist.distributed.states.digest import state_digest, tensor_digests
from dist_mnist.distributed.world import World, counted
from dist_mnist.utils.errors import Restartable, warn
from dist_mnist.utils.hashing import GOLDEN

State = Callable[[], Mapping[str, torch.Tensor]]
WHAT_TO_DO = (
    "All ranks compute the same, so a processor, GPU or memory made an error. No checkpoint contains it: the run "
    "resumes from the last one, automatically (--max-restarts) or by the same command. If it happens again, exclude "
    "that device and test its memory (for a GPU: nvidia-smi -q -d ECC)"
)


class StatesDiffer(Restartable):
    """Ranks do not hold the same bits."""


class Place(NamedTuple):
    """The host, device and threads of a rank."""

    host: str
    device: str
    threads: int  # on a CPU, whose sums depend on it; 0 on a GPU

    @classmethod
    def here(cls, world: World) -> "Place":
        return cls(socket.gethostname(), device_name(world.device), num_threads(world.device))


class RankStates:
    """The history of this rank's state as one number: a digest of the digests taken every `every` steps.

    The caller chooses when to compare ranks: the history also reveals a difference that has vanished by then.

    Args:
        state: returns the tensors, by name.
        every: steps between digests; 0 turns them off.
        comparable: whether the network computes the same on all ranks.
        group: the process group for CPU tensors.
    """

    def __init__(
        self, world: World, state: State, every: int, comparable: bool = True, group: dist.ProcessGroup | None = None
    ):
        self.world, self.state, self.group = world, state, group
        self.places = [Place(*place) for place in gather_json(world, Place.here(world))]
        self.every = every if world.size > 1 else 0
        if self.every and (why := "the network is not exact" if not comparable else unlike(self.places)):
            self.every = 0
            if world.is_main:
                warn(f"the ranks' weights are not compared (--check-ranks-every): {why}")
        self.history = torch.zeros((), dtype=torch.int64, device=world.device)
        self._in_host_memory = _HostCopy(self.history) if world.device.type == "cuda" else None

    def after_step(self, steps_done: int) -> None:
        """Take a digest if one is due; does not wait for a GPU."""
        if self.every and steps_done % self.every == 0:
            self._enter()

    def facts(self) -> tuple[int, int]:
        """Return two numbers, whose maxima over all ranks are the arguments of `differ`.

        On a GPU they are those of the previous call, which have arrived by now, so that its queue never runs dry.
        """
        value = self._in_host_memory.exchange() if self._in_host_memory else int(self.history)
        return value, ~value

    @staticmethod
    def differ(largest: int, largest_inverted: int) -> bool:
        """Whether ranks had different facts: ~ reverses the order, so the arguments give the maximum and minimum."""
        return largest != ~largest_inverted

    def check(self, steps_done: int) -> None:
        """Compare the current state. Collective.

        Raises:
            StatesDiffer: on all ranks, if one differs.
        """
        if not self.every:
            return
        self._enter()
        value = int(self.history)
        facts = torch.tensor([value, ~value])
        dist.all_reduce(facts, dist.ReduceOp.MAX, self.group)
        if self.differ(*facts.tolist()):
            self.name_difference(steps_done)

    def name_difference(self, steps_done: int) -> None:
        """Raise an error that names the rank and the tensors that differ. Collective.

        Raises:
            StatesDiffer: always.
        """
        tensors = self.state()
        digests = torch.cat([tensor_digests(tensors.values()), self.history[None]])
        rows = [tuple(row) for row in gather_rows(digests).tolist()]
        raise StatesDiffer(f"{explain(rows, list(tensors), self.places, steps_done)}. {WHAT_TO_DO}")

    def _enter(self) -> None:
        self.history.mul_(GOLDEN).add_(state_digest(self.state().values()))


class _HostCopy:
    """A copy of a GPU's number in pinned host memory, made asynchronously."""

    def __init__(self, number: torch.Tensor):
        self.number, self.copy = number, torch.zeros((), dtype=number.dtype, pin_memory=True)
        self.arrived = torch.cuda.current_stream(number.device).record_event()

    def exchange(self) -> int:
        """Return the number as of the previous call (0 at the first), and start to copy the current one."""
        self.arrived.synchronize()
        value = int(self.copy)
        self.copy.copy_(self.number, non_blocking=True)
        self.arrived = torch.cuda.current_stream(self.number.device).record_event()
        return value


def unlike(places: Sequence[Place]) -> str | None:
    """Return why ranks may compute different bits without a fault; None if they may not."""
    others = [place for place in places if place[1:] != places[0][1:]]
    if not others:
        return None
    kinds = (f"{place.device} with {counted(place.threads, 'thread')}" for place in (places[0], others[0]))
    return f"devices of different kinds may round differently ({' and '.join(kinds)})"


def explain(rows: Sequence[tuple[int, ...]], names: Sequence[str], places: Sequence[Place], steps_done: int) -> str:
    """Return the error message for ranks whose digests differ.

    Args:
        rows: each rank's digests: one for each tensor, then one of the history.
        names: the tensors' names.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank, row in enumerate(rows):
        groups.setdefault(row, []).append(rank)
    usual, *unusual = sorted(groups, key=lambda row: -len(groups[row]))
    different = [name for at, name in enumerate(names) if any(row[at] != usual[at] for row in unusual)]
    what = "by now no tensor differs"
    if different:
        more = f" and {counted(len(different) - 1, 'more tensor')} differ" if different[1:] else " differs"
        what = different[0] + more
    if 2 * len(groups[usual]) > len(rows):
        odd = [rank for rank, row in enumerate(rows) if row != usual]
        others = f"the other {len(groups[usual])} ranks by step {steps_done}"
        return f"{_named(odd, places)} computed other bits than {others}: {what}"
    named = "; ".join(_named(ranks, places) for ranks in groups.values())
    return f"ranks computed different bits by step {steps_done}: {what}. Which is right is unknown: {named}"


def _named(ranks: Sequence[int], places: Sequence[Place]) -> str:
    return ", ".join(f"rank {rank} on {places[rank].host} ({places[rank].device})" for rank in ranks)
