"""Ranks: who this process is, the process group's start and end, and agreement between its members."""

import ctypes
import gc
import hashlib
import importlib
import json
import os
import platform
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dist_mnist.errors import NO_GPU, Shortage, UserError, short

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # parameters of mallopt, as in glibc's malloc.h


@dataclass(frozen=True)
class World:
    """This process's place among the processes of a run; read from torchrun's environment once, then passed on."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @classmethod
    def from_environment(cls) -> "World":
        """Read RANK and its companions, which torchrun sets; without them this is a run of one process. On the CPU.

        Raises:
            UserError: there are other ranks, but no address to meet them at; or srun started this, and not torchrun.
        """
        size = int(os.environ.get("WORLD_SIZE", 1))
        if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
            raise UserError("srun started several of these, none of which knows of the others: use slurm/train.sh")
        if size > 1 and "MASTER_ADDR" not in os.environ:
            raise UserError(f"WORLD_SIZE is {size} but MASTER_ADDR is not set: start the processes with torchrun")
        rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
        return cls(rank, size, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes."""
        return self.rank == 0

    @property
    def spans_machines(self) -> bool:
        """Whether there are ranks on other machines than this one."""
        return self.local_size < self.size

    @property
    def backend(self) -> str:
        """The collective library for this device."""
        return "nccl" if self.device.type == "cuda" else "gloo"

    def alone(self) -> "World":
        """This process as a world of its own, on the same device."""
        return World(0, 1, self.local_rank, 1, self.device)

    def __str__(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        threads = "" if self.device.type == "cuda" else f", {counted(torch.get_num_threads(), 'thread')} each"
        group = f" ({self.backend}{threads})" if self.size > 1 else ""
        return f"{counted(self.size, 'process', 'es')} on {name}{group}"


def _choose_device(device: str, local_rank: int, local_size: int) -> torch.device:
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 0:
        raise UserError(NO_GPU)
    if local_size > count:
        raise UserError(
            f"{local_size} processes were started on a machine with {counted(count, 'GPU')}: start one per GPU, or "
            "give --device cpu"
        )
    return torch.device("cuda", local_rank)


def use_device(world: World, device: str = "auto", threads: int = 0) -> World:
    """Take the rank's GPU, or its share of the machine's cores; the world with the device that is now in use.

    Args:
        device: "cuda", "cpu", or "auto" for GPUs where there are any.
        threads: CPU threads for this process; 0 for an equal share of the cores (torchrun by itself sets 1).

    Raises:
        UserError: a GPU is asked for where there is none, or there are more processes than GPUs on this machine.
    """
    world = replace(world, device=_choose_device(device, world.local_rank, world.local_size))
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
        torch.backends.cudnn.deterministic = True
        # fp32 means fp32: by default torch lets convolutions round their inputs to TF32's 10 bits.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    else:
        torch.set_num_threads(threads or max(1, num_cores() // world.local_size))
        _keep_memory()
    return world


def _keep_memory() -> None:
    """Let glibc's malloc keep what is freed: each step takes the same again, and new pages cost a fifth of a step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def counted(number: int, what: str, plural: str = "s") -> str:
    """A number of things in words: `1 process`, `2 processes`."""
    return f"{number} {what}{'' if number == 1 else plural}"


def device_name(device: torch.device) -> str:
    """What people know a device as: the GPU's name and memory, or the processor's name."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        return f"{torch.cuda.get_device_name(device)}, {memory >> 30} GiB"
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("model name")).split(": ", 1)[1]
    return "CPU"


def machine(world: World) -> dict[str, Any]:
    """What a run is made on, as this rank sees it: JSON values, for people."""
    return {
        "host": socket.gethostname(), "system": platform.platform(), "device": device_name(world.device),
        "cores": num_cores(), "processes": world.size,
    }  # fmt: skip


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def process_group(world: World, timeout_s: float, store: dist.Store | None = None) -> Iterator[dist.Store | None]:
    """Form the group of all ranks for the time of a `with` block, and give its store. Collective.

    They meet in `store`, or else where torchrun says.

    A world of one process needs none. Ranks leave together: a barrier, then the group's end. After an error a rank
    leaves alone, and the others notice.
    """
    if world.size == 1:
        yield None
        return
    # Its functions take the group that exists when it is first imported as their default, and so keep it, and gloo's
    # threads, alive for ever. DDP imports it in passing; so it has to be imported while there is no group yet.
    importlib.import_module("torch.distributed.nn.functional")
    device_id = world.device if world.device.type == "cuda" else None
    timeout = timedelta(seconds=timeout_s)
    if store is None:
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    if not world.spans_machines:
        # Processes that torchrun started again meet in the same store as their forerunners, whose addresses are still
        # in it. On one machine the count of restarts tells them apart; for several see `launch.main`.
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


def sum_over_ranks(tensor: torch.Tensor, world: World) -> torch.Tensor:
    """The elementwise sum over all ranks, as a new tensor on every rank. Collective."""
    total = tensor.clone()
    if world.size > 1:
        dist.all_reduce(total)
    return total


def sum_together(tensors: list[torch.Tensor], world: World, dtype: torch.dtype) -> list[torch.Tensor]:
    """The elementwise sums over all ranks of several tensors, by one all-reduce in `dtype`. Collective."""
    if world.size == 1:
        return tensors
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    sums = flat.to(dtype)
    dist.all_reduce(sums)
    parts = sums.to(flat.dtype).split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


class Waiting:
    """Seconds that this process has spent in collectives, waiting for others; of use on CPUs, where they block."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._since = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._since


def gather_json(world: World, value: Any) -> list[Any]:
    """Every rank's JSON value, in order of rank. Collective."""
    if world.size == 1:
        return [value]
    text = json.dumps(value).encode()
    length = int(gather_rows(torch.tensor([len(text)], device=world.device)).max())
    data = torch.tensor(list(text.ljust(length)), dtype=torch.uint8, device=world.device)
    return [json.loads(bytes(row)) for row in gather_rows(data).tolist()]


def gather_rows(values: torch.Tensor) -> torch.Tensor:
    """Every rank's (n,) as the rows of one (world size, n) tensor. Collective."""
    rows = list(values.new_empty(dist.get_world_size(), len(values)))
    dist.all_gather(rows, values)
    return torch.stack(rows)


def check_agreement(world: World, **facts: object) -> None:
    """Hold every rank's view of `facts` against rank 0's. Collective.

    Raises:
        UserError: on every rank, when one differs; it names the fact and the rank.
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
    """How two facts differ, in words: of mappings, only the entries that do."""
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        names = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
        theirs, mine = (", ".join(f"{name} {facts.get(name)}" for name in names) for facts in (theirs, mine))
    return f"{theirs} and {mine}"


@contextmanager
def named_shortage() -> Iterator[None]:
    """Turn errors for memory that is not there into a sentence, for a `with` block."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        what = (str(error).splitlines() or [""])[0]
        if isinstance(error, RuntimeError) and "allocate memory" not in what and "out of memory" not in what:
            raise
        raise Shortage(
            f"there is not enough memory ({short(what, 200)}): see what else takes it, or start another run, in "
            "another --run-dir, with a smaller --batch-size or network"
        ) from None


def share_state(world: World, arrays: Mapping[str, np.ndarray], info: dict) -> tuple[dict[str, torch.Tensor], dict]:
    """Rank 0's named arrays, as tensors on the device, and JSON, on every rank, whatever they have. Collective."""
    tensors = {name: torch.from_numpy(array).to(world.device) for name, array in arrays.items()}
    if world.size == 1:
        return tensors, info
    layout = [[name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in tensors.items()]
    layout, info = share_json(world, [layout, info])
    for name, dtype, shape in layout:
        if not world.is_main:
            tensors[name] = torch.empty(shape, dtype=getattr(torch, dtype), device=world.device)
        dist.broadcast(tensors[name], 0)
    return tensors, info


def share_json(world: World, value: Any) -> Any:
    """Rank 0's JSON value, on every rank. Collective."""
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
