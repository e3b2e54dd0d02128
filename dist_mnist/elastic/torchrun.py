"""Starting the ranks of this node: how many processes, and whether an agent is needed."""

import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from dist_mnist.elastic.rendezvous import Nodes
from dist_mnist.utils.errors import NO_GPU, UserError, spare_children_warnings
from dist_mnist.utils.imports import garbage_collection_paused


def num_processes(device: str) -> int:
    """Processes that suit this node: one for each GPU, or one with all cores of a CPU, which is faster than several.

    Raises:
        UserError: GPUs are asked for, or Slurm has given them, and torch sees none.
    """
    if device != "cpu" and _may_have_gpus():
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # which is read once; see `run_agent`
        with garbage_collection_paused():
            import torch  # takes seconds, which a node without GPUs need not spend

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


def start_ranks(
    command: Sequence[str],
    nproc: int,
    nodes: Nodes,
    name: str,
    stall_timeout_s: float,
    max_restarts: int = 0,
    ranks_listen: bool = False,
) -> None:
    """Run `python COMMAND` as `nproc` ranks of this node by `run_agent`, which see; a single one needs no agent.

    That is one process without restarts and other nodes: it takes this process's place.
    """
    sys.stdout.flush()
    spare_children_warnings()
    if nproc == 1 and max_restarts == 0 and not nodes.several:
        os.execv(sys.executable, [sys.executable, *command])
    from dist_mnist.elastic.agent import run_agent

    run_agent(command, nproc, nodes, name, stall_timeout_s, max_restarts, ranks_listen)


def under_launcher() -> bool:
    """Whether this process is a rank that torchrun or srun started."""
    return "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1


def _may_have_gpus() -> bool:
    """Whether a driver for NVIDIA (also under Windows' Linux) or AMD devices is loaded."""
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd"))
