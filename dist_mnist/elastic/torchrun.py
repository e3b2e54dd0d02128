"""Starting the ranks of this node: how many processes, whether an agent is needed, and what started this one."""

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

NO_DEVICES = ("", "-1", "NoDevFiles")  # of CUDA_VISIBLE_DEVICES, where no GPU is to be used
# Variables in which launchers tell a process its rank and the number of ranks, in all and on its node.
TORCHRUNS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
VARIABLES = {
    "torchrun": TORCHRUNS,
    "mpirun": tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "mpiexec": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
}


def num_processes(device: str, wanted: str = "auto") -> int:
    """Processes of this node: a number, or torchrun's `gpu` (one for each) or `cpu` (one for each core), or `auto`.

    That is (also as 0) what suits the node: one for each GPU, or one with all cores of a CPU, which is faster than
    several.

    Raises:
        UserError: `wanted` is none of these; or GPUs are asked for, or given to this job, and torch sees none.
    """
    if not (wanted in ("auto", "gpu", "cpu") or (wanted.isascii() and wanted.isdecimal())):
        raise UserError(f"--nproc takes a number of processes, auto, gpu or cpu; {wanted!r} was given")
    suitable = _suitable_processes("cuda" if wanted == "gpu" else device)
    if wanted == "cpu":
        return num_cores()
    return int(wanted) if wanted.isdecimal() and int(wanted) else suitable


def _suitable_processes(device: str) -> int:
    if device != "cpu" and _may_have_gpus():
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # which is read once; see `run_agent`
        with garbage_collection_paused():
            import torch  # takes seconds, which a node without GPUs need not spend

        if torch.cuda.is_available():
            return _usable_gpus(torch.cuda.device_count())
        if device == "auto" and (chosen := os.environ.get("CUDA_VISIBLE_DEVICES", "").strip()) not in NO_DEVICES:
            raise UserError(
                f"CUDA_VISIBLE_DEVICES is {chosen}, and torch sees no GPU of these on {socket.gethostname()}: correct "
                "it (nvidia-smi -L lists numbers, UUIDs and MIG instances), or give --device cpu"
            )
    if device == "cuda":
        raise UserError(NO_GPU)
    if device == "auto" and whole_number("SLURM_GPUS_ON_NODE", 0):
        raise UserError(
            f"Slurm gave this job {os.environ['SLURM_GPUS_ON_NODE']} GPUs on {socket.gethostname()}, and torch sees "
            "none: install a torch that fits the driver (nvidia-smi shows it), or give --device cpu"
        )
    return 1


def _usable_gpus(count: int) -> int:
    """GPUs as torch counts them, by number or UUID, and as CUDA does MIG instances; says if it leaves some out."""
    chosen = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    if count < len(chosen):
        why = "a process can use only one MIG instance" if chosen[0].startswith("MIG-") else "see nvidia-smi -L"
        warn(f"CUDA_VISIBLE_DEVICES names {len(chosen)} devices, of which this run uses {count}: {why}")
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
    """Run `python COMMAND` as `nproc` ranks of this node by `run_agent`, which see; a single one needs no agent.

    That is one process without restarts and other nodes: it takes this process's place, unless this one `stays`.
    """
    sys.stdout.flush()
    spare_children_warnings()
    if nproc == 1 and max_restarts == 0 and not nodes.several and not stays:
        os.execv(sys.executable, [sys.executable, *command])
    from dist_mnist.elastic.agent import run_agent

    run_agent(command, nproc, nodes, name, stall_timeout_s, max_restarts, ranks_listen)


@dataclass(frozen=True)
class Launched:
    """By which launcher this process was started as one of several ranks, and which."""

    launcher: str
    rank: int
    size: int
    local_rank: int
    local_size: int


def launched() -> Launched | None:
    """What launchers have told this process, torchrun first; None if it was started by itself.

    Raises:
        UserError: what they have told are no numbers.
    """
    for launcher, names in VARIABLES.items():
        if all(os.environ.get(name) for name in names) and whole_number(names[1], 1) > 1:
            rank, size, local_rank = (whole_number(name, 0) for name in names[:3])
            local_size = _tasks_of_this_node(names[3]) if launcher == "srun" else whole_number(names[3], 1)
            return Launched(launcher, rank, size, local_rank, local_size)
    return None


def _tasks_of_this_node(variable: str) -> int:
    """Of srun's `2(x3),1`, which means 2,2,2,1."""
    on_nodes, node = os.environ[variable], whole_number("SLURM_NODEID", 0)
    with suppress(ValueError, IndexError):
        tasks = [part.partition("(x") for part in on_nodes.split(",")]
        per_node = [int(number) for number, _, times in tasks for _ in range(int(times.rstrip(")") or 1))]
        return per_node[node]
    raise UserError(f"{variable} is {short(repr(on_nodes))}, which says nothing of SLURM_NODEID {node}")


def under_launcher() -> bool:
    """Whether a launcher started this process as a rank."""
    return "RANK" in os.environ or launched() is not None


def become_rank() -> None:
    """Where another launcher than torchrun started this process as a rank, set what torchrun sets.

    Raises:
        UserError: nothing says where the ranks meet.
    """
    if "RANK" in os.environ or not (found := launched()):
        return
    facts = (found.rank, found.size, found.local_rank, found.local_size)
    os.environ |= dict(zip(TORCHRUNS, map(str, facts), strict=True))
    if not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise UserError(
            f"{found.launcher} started {found.size} of these, none of which knows where the others are: set "
            "MASTER_ADDR to the first one's node and MASTER_PORT to a free port there, for all of them; or "
            f"{'submit slurm/train.sh' if found.launcher == 'srun' else 'start one `dist-mnist train` per node'}"
        )


def check_is_single(nodes: Nodes) -> None:
    """Refuse to start ranks from each of several processes that a launcher started on its own.

    Raises:
        UserError: it did, and they are not nodes that will meet.
    """
    if (found := launched()) and not nodes.several:
        raise UserError(
            f"{found.launcher} started {found.size} of these, each of which would start a run of its own: start "
            "`python -m dist_mnist.train` in their place, whose processes are the ranks of one run, or a single "
            "`dist-mnist train`"
        )


def _may_have_gpus() -> bool:
    """Whether a driver for NVIDIA (also under Windows' Linux) or AMD devices is loaded."""
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd"))
