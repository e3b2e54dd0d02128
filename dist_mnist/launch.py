"""Starting torchrun on this machine."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from dist_mnist.config import option
from dist_mnist.errors import NO_GPU, UserError

CPU_PROCESSES = 2


def num_processes(device: str) -> int:
    """Processes that suit this machine: one for each GPU, or two on a CPU with two cores or more.

    Raises:
        UserError: GPUs are asked for, and there are none.
    """
    if device != "cpu" and _may_have_gpus():
        import torch  # takes seconds, which a machine without GPUs need not spend

        if torch.cuda.is_available():
            return torch.cuda.device_count()
    if device == "cuda":
        raise UserError(NO_GPU)
    return min(CPU_PROCESSES, os.cpu_count() or 1)


def start_torchrun(nproc: int, given: Mapping[str, Any]) -> NoReturn:
    """Become torchrun with `nproc` processes of `dist_mnist.train`; one process needs no torchrun."""
    module = ["-m", "dist_mnist.train", *_as_options(given)]
    if nproc > 1:
        module = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}", *module]
    # The warning that torchrun sets OMP_NUM_THREADS is not for users: the trainer shares the cores out itself.
    environment = {"OMP_NUM_THREADS": "1"} | dict(os.environ) if nproc > 1 else dict(os.environ)
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *module], environment)


def _may_have_gpus() -> bool:
    """Whether a driver for NVIDIA (also under Windows' Linux) or AMD devices is loaded."""
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd"))


def _as_options(given: Mapping[str, Any]) -> list[str]:
    """Settings as command-line options."""
    return [argument for name, value in given.items() for argument in _as_option(name, value)]


def _as_option(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [option(name) if value else option("no_" + name)]
    return [f"{option(name)}={','.join(map(str, value)) if isinstance(value, tuple) else value}"]
