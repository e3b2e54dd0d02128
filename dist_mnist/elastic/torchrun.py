"""Starting torchrun on this machine: how many processes, and the agent that takes this process's place."""

import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from dist_mnist.config.overrides import as_options
from dist_mnist.config.settings import Config
from dist_mnist.elastic.rendezvous import Machines
from dist_mnist.utils.errors import NO_GPU, UserError


def num_processes(device: str) -> int:
    """Processes that suit this machine: one for each GPU, or one with all cores of a CPU, which is faster than several.

    Raises:
        UserError: GPUs are asked for, or Slurm has given them, and torch sees none.
    """
    if device != "cpu" and _may_have_gpus():
        import torch  # takes seconds, which a machine without GPUs need not spend

        if torch.cuda.is_available():
            return torch.cuda.device_count()
    if device == "cuda":
        raise UserError(NO_GPU)
    if device == "auto" and int(os.environ.get("SLURM_GPUS_ON_NODE") or 0):
        raise UserError(
            f"Slurm gave this job {os.environ['SLURM_GPUS_ON_NODE']} GPUs on {socket.gethostname()}, and torch sees "
            "none: install a torch that fits the driver (nvidia-smi shows it), or give --device cpu"
        )
    return 1


def start_torchrun(
    module: str,
    given: Mapping[str, Any],
    nproc: int,
    machines: Machines,
    name: str,
    max_restarts: int = 0,
) -> NoReturn:
    """Become an agent of torchrun with `nproc` processes of `module`; a single one without restarts needs none.

    `name` tells this run from others that meet at the same place.
    """
    command = ["-m", module, *as_options(given)]
    if nproc > 1 or max_restarts > 0 or machines.several:
        meeting = machines.options(name, given.get("stall_timeout") or Config.stall_timeout)
        options = [*meeting, f"--nproc-per-node={nproc}", f"--max-restarts={max_restarts}"]
        command = ["-m", "dist_mnist.elastic.agent", *options, *command]
    # The warning that torchrun sets OMP_NUM_THREADS is not for users: the trainer shares the cores out itself.
    environment = {"OMP_NUM_THREADS": "1"} | dict(os.environ) if nproc > 1 else dict(os.environ)
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *command], environment)


def _may_have_gpus() -> bool:
    """Whether a driver for NVIDIA (also under Windows' Linux) or AMD devices is loaded."""
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd"))
