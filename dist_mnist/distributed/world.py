"""The rank of this process, and the device that it computes on."""

import os
from dataclasses import dataclass

import torch

from dist_mnist.utils.errors import UserError, whole_number


@dataclass(frozen=True)
class World:
    """Rank, world size and device of this process; read from torchrun's environment once, then passed on.

    Attributes:
        rank: from 0 to size - 1.
        size: number of ranks of the run.
        local_rank: rank on this node.
        local_size: number of ranks on this node.
        device: the device on which this rank computes.

    Example:
        >>> from dist_mnist import World
        >>> world = World.from_environment()
        >>> world.rank, world.size, world.is_main
        (0, 1, True)
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @classmethod
    def from_environment(cls) -> "World":
        """Read RANK and its companions, which torchrun sets, with the device set to the CPU; without them, one process.

        Raises:
            UserError: the size is above 1 without MASTER_ADDR; srun started this process without torchrun; or the
                numbers contradict each other.
        """
        rank, size = whole_number("RANK", 0), whole_number("WORLD_SIZE", 1)
        local_rank, local_size = whole_number("LOCAL_RANK", 0), whole_number("LOCAL_WORLD_SIZE", 1)
        if "RANK" not in os.environ and whole_number("SLURM_STEP_NUM_TASKS", 1) > 1:
            raise UserError("srun started several processes without rendezvous variables: use slurm/train.sh")
        if size > 1 and "MASTER_ADDR" not in os.environ:
            raise UserError(f"WORLD_SIZE is {size} but MASTER_ADDR is not set: start the processes with torchrun")
        if rank >= size or local_size < 1:
            raise UserError(
                f"RANK {rank}, WORLD_SIZE {size} and LOCAL_WORLD_SIZE {local_size} contradict each other: RANK must be "
                "below WORLD_SIZE, and LOCAL_WORLD_SIZE at least 1; start the processes with torchrun"
            )
        return cls(rank, size, local_rank, local_size, torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes files."""
        return self.rank == 0

    @property
    def spans_nodes(self) -> bool:
        """Whether there are ranks on other nodes."""
        return self.local_size < self.size

    @property
    def backend(self) -> str:
        """The process group's backend for this device."""
        return "nccl" if self.device.type == "cuda" else "gloo"

    def alone(self) -> "World":
        """Return a world of this process alone, on the same device."""
        return World(0, 1, self.local_rank, 1, self.device)

    def __str__(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        threads = "" if self.device.type == "cuda" else f", {counted(torch.get_num_threads(), 'thread')} each"
        group = f" ({self.backend}{threads})" if self.size > 1 else ""
        return f"{counted(self.size, 'process', 'es')} on {name}{group}"


def counted(number: int, what: str, plural: str = "s") -> str:
    """Format a count with its noun: `1 process`, `2 processes`."""
    return f"{number:,} {what}{'' if number == 1 else plural}"
