"""Collectives over all ranks: sums, all-gather and broadcast of tensors and JSON, consistency of facts."""

import hashlib
import json
import socket
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dist_mnist.distributed.world import World
from dist_mnist.utils.errors import UserError


def sum_over_ranks(tensor: torch.Tensor, world: World) -> torch.Tensor:
    """Return the elementwise sum over all ranks (all-reduce) as a new tensor. Collective."""
    total = tensor.clone()
    if world.size > 1:
        dist.all_reduce(total)
    return total


def sum_together(tensors: list[torch.Tensor], world: World, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return the elementwise sums of several tensors over all ranks, by one all-reduce in `dtype`. Collective."""
    if world.size == 1:
        return tensors
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    sums = flat.to(dtype)
    dist.all_reduce(sums)
    parts = sums.to(flat.dtype).split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


class CollectiveTimer:
    """Measure the seconds that this process spends in collectives; meaningful on CPUs, where they block."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._since = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._since


def gather_json(world: World, value: Any) -> list[Any]:
    """All-gather a JSON value: return every rank's, in rank order. Collective."""
    if world.size == 1:
        return [value]
    text = json.dumps(value).encode()
    length = int(gather_rows(torch.tensor([len(text)], device=world.device)).max())
    data = torch.tensor(list(text.ljust(length)), dtype=torch.uint8, device=world.device)
    return [json.loads(bytes(row)) for row in gather_rows(data).tolist()]


def gather_rows(values: torch.Tensor) -> torch.Tensor:
    """All-gather tensors (n,) as the rows of one (world size, n) tensor. Collective."""
    rows = list(values.new_empty(dist.get_world_size(), len(values)))
    dist.all_gather(rows, values)
    return torch.stack(rows)


def check_agreement(world: World, **facts: object) -> None:
    """Compare every rank's `facts` with rank 0's. Collective.

    Raises:
        UserError: on every rank, if one differs; it names the fact and the rank.
    """
    if world.size == 1:
        return
    mine = torch.tensor([_digest(fact) for fact in facts.values()], device=world.device)
    for name, column in zip(facts, gather_rows(mine).T.tolist(), strict=True):
        odd = [rank for rank, digest in enumerate(column) if digest != column[0]]
        if odd:
            ranks = gather_json(world, [socket.gethostname(), facts[name]])
            (main_host, here), (host, theirs) = ranks[0], ranks[odd[0]]
            who, apart = ", ".join(map(str, odd)), difference(theirs, here)
            raise UserError(
                f"rank {who} and rank 0 differ in their {name}: {apart}, on rank {odd[0]} ({host}) and 0 ({main_host})"
            )


def difference(theirs: Any, mine: Any) -> str:
    """Describe how two facts differ; for mappings, only the entries that do."""
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        names = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
        theirs, mine = (", ".join(f"{name} {facts.get(name)}" for name in names) for facts in (theirs, mine))
    return f"{theirs} and {mine}"


def broadcast_state(world: World, arrays: Mapping[str, np.ndarray], info: dict) -> tuple[dict[str, torch.Tensor], dict]:
    """Broadcast rank 0's named arrays, as tensors on the device, and its JSON; other ranks' are ignored. Collective."""
    tensors = {name: torch.from_numpy(array).to(world.device) for name, array in arrays.items()}
    if world.size == 1:
        return tensors, info
    layout = [[name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in tensors.items()]
    layout, info = broadcast_json(world, [layout, info])
    for name, dtype, shape in layout:
        if not world.is_main:
            tensors[name] = torch.empty(shape, dtype=getattr(torch, dtype), device=world.device)
        dist.broadcast(tensors[name], 0)
    return tensors, info


def broadcast_json(world: World, value: Any) -> Any:
    """Broadcast rank 0's JSON value. Collective."""
    if world.size == 1:
        return value
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(world.device)
    length = torch.tensor([len(data)], device=world.device)
    dist.broadcast(length, 0)
    if not world.is_main:
        data = data.new_empty(int(length))
    dist.broadcast(data, 0)
    return json.loads(data.cpu().numpy().tobytes())


def _digest(fact: object) -> int:
    text = json.dumps(fact, sort_keys=True, default=str) if isinstance(fact, Mapping) else str(fact)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)
