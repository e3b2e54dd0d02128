"""The device, number of threads and precision that a rank uses."""

import ctypes
import platform
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from dist_mnist.config.choices import Precision
from dist_mnist.distributed.cores import num_cores
from dist_mnist.distributed.world import World, counted
from dist_mnist.utils.errors import NO_GPU, UserError


def resolve_precision(precision: Precision, device: str) -> Precision:
    """Resolve `--precision auto` for a `--device`: bf16 if it is faster on the hardware, else fp32.

    AVX-512's dot product of bf16 (vdpbf16ps) does the work of two fp32 instructions. AMD's cores issue as many of them
    per cycle, Intel's half as many, so that Intel gains only with AMX (without it, a Xeon ran at 0.67 of fp32's speed).
    """
    if precision != Precision.AUTO:
        return precision
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        return Precision.BF16 if torch.cuda.is_bf16_supported(including_emulation=False) else Precision.FP32
    features = torch.cpu.get_capabilities()
    fast = features.get("amx_bf16") or (features.get("avx512_bf16") and "AMD" in features.get("cpu_name", ""))
    return Precision.BF16 if fast else Precision.FP32


def autocast(precision: str, device: torch.device) -> Callable[[], AbstractContextManager]:
    """Return a factory of the autocast context in which a network computes."""
    return partial(torch.autocast, device.type, torch.bfloat16) if precision == "bf16" else nullcontext


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # parameters of mallopt, as in glibc's malloc.h


def _choose_device(device: str, local_rank: int, local_size: int) -> torch.device:
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 0:
        raise UserError(NO_GPU)
    if local_size > count:
        raise UserError(
            f"{local_size} processes were started on a node with {counted(count, 'GPU')}: start one process per GPU, "
            "or give --device cpu"
        )
    return torch.device("cuda", local_rank)


def use_device(world: World, device: str = "auto", threads: int = 0) -> World:
    """Set up the rank's GPU, or an equal part of the node's cores; return the world with that device.

    Args:
        device: "cuda", "cpu", or "auto" for GPUs if there are any.
        threads: CPU threads for this process; 0 for an equal part of the cores that affinity and the container's CPU
            quota allow (torchrun's default is 1).

    Raises:
        UserError: a GPU is requested and there is none, or this node has fewer GPUs than processes.

    Example:
        >>> from dist_mnist import World, use_device
        >>> use_device(World.from_environment(), "cpu").device
        device(type='cpu')
    """
    world = replace(world, device=_choose_device(device, world.local_rank, world.local_size))
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
        torch.backends.cudnn.deterministic = True
        # True fp32: by default torch lets convolutions round their inputs to TF32's 10 mantissa bits.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    else:
        torch.set_num_threads(threads or max(1, num_cores() // world.local_size))
        _keep_memory()
    return world


def _keep_memory() -> None:
    """Let glibc's malloc keep freed memory: each step allocates the same, and new pages cost a fifth of a step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def device_name(device: torch.device) -> str:
    """Return a device's name for people: the GPU's name and memory, or the processor's name."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        return f"{torch.cuda.get_device_name(device)}, {memory >> 30} GiB"
    return torch.cpu.get_capabilities().get("cpu_name") or "CPU"


def num_threads(device: torch.device) -> int:
    """Return the number of compute threads, which decides the order of a CPU's sums; 0 on a GPU."""
    return torch.get_num_threads() if device.type == "cpu" else 0


def machine(world: World) -> dict[str, Any]:
    """Describe the machine of this rank, for people: JSON values."""
    return {
        "host": socket.gethostname(), "system": platform.platform(), "device": device_name(world.device),
        "cores": num_cores(), "processes": world.size,
    }  # fmt: skip
