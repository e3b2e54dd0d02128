"""Launch of the ranks on this node: the number of processes, with or without an agent, and this process's launcher."""

import os
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dist_mnist.distributed.cores import num_cores
from dist_mnist.elastic.rendezvous import Nodes
from dist_mnist.utils.errors import NO_GPU, UserError, short, spare_children_warnings, warn, whole_number
from dist_mnist.utils.imports import garbage_collection_paused

NO_DEVICES = ("", "-1", "NoDevFiles")  # values of CUDA_VISIBLE_DEVICES that hide all GPUs
# Each launcher's variables for the rank of a process and the number of ranks, in all and on its node.
TORCHRUNS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
VARIABLES = {
    "torchrun": TORCHRUNS,
    "mpirun": tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "mpiexec": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
}


def num_processes(device: str, wanted: str = "auto") -> int:
    """Return the number of processes on this node for `wanted`: a number, `gpu`, `cpu` (as in torchrun), or `auto`.

    `gpu` is one per GPU, `cpu` one per core. `auto` (or 0) is one per GPU, or else one with all CPU cores, which is
    faster than several.

    Raises:
        UserError: `wanted` is invalid; or GPUs were requested, or assigned to this job, but torch finds none.
    """
    if not (wanted in ("auto", "gpu", "cpu") or (wanted.isascii() and wanted.isdecimal())):
        raise UserError(f"--nproc expects a number of processes, auto, gpu or cpu; got {wanted!r}")
    suitable = _suitable_processes("cuda" if wanted == "gpu" else device)
    if wanted == "cpu":
        return num_cores()
    return int(wanted) if wanted.isdecimal() and int(wanted) else suitable


def _suitable_processes(device: str) -> int:
    if device != "cpu" and _may_have_gpus():
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch reads it once; see `run_agent`
        with garbage_collection_paused():
            import torch  # takes seconds, so only if there may be GPUs

        if torch.cuda.is_available():
            return _usable_gpus(torch.cuda.device_count())
        if device == "auto" and (chosen := os.environ.get("CUDA_VISIBLE_DEVICES", "").strip()) not in NO_DEVICES:
            raise UserError(
                f"CUDA_VISIBLE_DEVICES is {chosen}, but torch finds no such GPU on {socket.gethostname()}: correct it "
                "(nvidia-smi -L lists numbers, UUIDs and MIG instances), or give --device cpu"
            )
    if device == "cuda":
        raise UserError(NO_GPU)
    if device == "auto" and whole_number("SLURM_GPUS_ON_NODE", 0):
        raise UserError(
            f"Slurm assigned this job {os.environ['SLURM_GPUS_ON_NODE']} GPUs on {socket.gethostname()}, but torch "
            "finds none: install a torch build for the driver (nvidia-smi shows its version), or give --device cpu"
        )
    return 1


def _usable_gpus(count: int) -> int:
    """Return the number of usable GPUs, `count`. Warns if CUDA_VISIBLE_DEVICES names more, such as MIG instances."""
    chosen = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    if count < len(chosen):
        why = "a process can use only one MIG instance" if chosen[0].startswith("MIG-") else "see nvidia-smi -L"
        warn(f"CUDA_VISIBLE_DEVICES names {len(chosen)} devices; this run uses {count}: {why}")
    return count


def start_ranks(
    command: Sequence[str],
    nproc: int,
    nodes: Nodes,
    name: str,
    stall_timeout_s: float,
    max_restarts: int = 0,
    ranks_listen: bool = False,
    stays: bool = False,
) -> None:
    """Run `python COMMAND` as `nproc` ranks of this node by `run_agent` (see there for the arguments).

    A single rank without restarts and other nodes needs no agent: it replaces this process, unless `stays`.
    """
    sys.stdout.flush()
    spare_children_warnings()
    if nproc == 1 and max_restarts == 0 and not nodes.several and not stays:
        os.execv(sys.executable, [sys.executable, *command])
    from dist_mnist.elastic.agent import run_agent

    run_agent(command, nproc, nodes, name, stall_timeout_s, max_restarts, ranks_listen)


@dataclass(frozen=True)
class Launched:
    """The launcher that started this process as one of several ranks, and the rank."""

    launcher: str
    rank: int
    size: int
    local_rank: int
    local_size: int


def launched() -> Launched | None:
    """Read the variables of the launcher that started this process as a rank, torchrun's first; None without one.

    Raises:
        UserError: a variable is not a number.
    """
    for launcher, names in VARIABLES.items():
        if all(os.environ.get(name) for name in names) and whole_number(names[1], 1) > 1:
            rank, size, local_rank = (whole_number(name, 0) for name in names[:3])
            local_size = _tasks_of_this_node(names[3]) if launcher == "srun" else whole_number(names[3], 1)
            return Launched(launcher, rank, size, local_rank, local_size)
    return None


def _tasks_of_this_node(variable: str) -> int:
    """The number of tasks on this node, from srun's notation: `2(x3),1` means 2,2,2,1."""
    on_nodes, node = os.environ[variable], whole_number("SLURM_NODEID", 0)
    with suppress(ValueError, IndexError):
        tasks = [part.partition("(x") for part in on_nodes.split(",")]
        per_node = [int(number) for number, _, times in tasks for _ in range(int(times.rstrip(")") or 1))]
        return per_node[node]
    raise UserError(f"{variable} is {short(repr(on_nodes))}, which has no entry for SLURM_NODEID {node}")


def under_launcher() -> bool:
    """Whether a launcher started this process as a rank."""
    return "RANK" in os.environ or launched() is not None


def become_rank() -> None:
    """Set torchrun's variables if another launcher started this process as a rank.

    Raises:
        UserError: MASTER_ADDR or MASTER_PORT, the address of rank 0, is not set.
    """
    if "RANK" in os.environ or not (found := launched()):
        return
    facts = (found.rank, found.size, found.local_rank, found.local_size)
    os.environ |= dict(zip(TORCHRUNS, map(str, facts), strict=True))
    if not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise UserError(
            f"{found.launcher} started {found.size} processes that have no rendezvous endpoint: set MASTER_ADDR to the "
            "node of rank 0 and MASTER_PORT to a free port there, for all processes; or "
            f"{'submit slurm/train.sh' if found.launcher == 'srun' else 'start one `dist-mnist train` per node'}"
        )


def check_is_single(nodes: Nodes) -> None:
    """Check that no launcher started several copies of this process, each of which would start ranks.

    Raises:
        UserError: a launcher did, and the copies are not the nodes of one rendezvous.
    """
    if (found := launched()) and not nodes.several:
        raise UserError(
            f"{found.launcher} started {found.size} processes, and each would start its own run: launch `python -m "
            "dist_mnist.train` instead, whose processes are the ranks of one run, or a single `dist-mnist train`"
        )


def _may_have_gpus() -> bool:
    """Whether a driver for NVIDIA (including WSL) or AMD devices is loaded."""
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd"))
