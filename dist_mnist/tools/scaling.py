"""What to expect of more ranks than are at hand: a model of a data-parallel step, from a few numbers that are measured.

A step on `ranks` ranks takes as long as its computation on one, and the part of the all-reduce that the backward pass
does not hide. The all-reduce costs a latency for each of its 2 log2(ranks) hops, and the time in which each rank sends
2 (ranks - 1) / ranks times the gradient (Thakur, Rabenseifner and Gropp: "Optimization of Collective Communication
Operations in MPICH", 2005). Batch normalisation over the global batch adds two small collectives for each layer, which
nothing hides.
"""

import math
from typing import NamedTuple

GPUS_PER_NODE = 8


class Link(NamedTuple):
    """A way between ranks: seconds for a message of no bytes, and bytes per second of one rank."""

    latency_s: float
    bytes_per_s: float


# On paper: NVLink 4 carries 450 GB/s each way; eight NDR InfiniBand adapters, which NCCL's rings share, 400 GB/s for a
# node (data sheets of NVIDIA's H100 and ConnectX-7). Four fifths of that are counted on. The latency of a hop is of
# the order that nccl-tests shows for small messages.
WITHIN_NODE = Link(5e-6, 0.8 * 450e9)
BETWEEN_NODES = Link(5e-6, 0.8 * 400e9)


class Work(NamedTuple):
    """One rank's step: seconds whatever the batch, seconds for each image, and what its gradient is like."""

    fixed_s: float
    image_s: float
    gradient_bytes: int
    hidden_share: float  # of the computation, in which the all-reduce can go on: 0 where it takes the same cores
    norm_layers: int = 0

    def step_s(self, batch_size: float) -> float:
        """Seconds of a step on `batch_size` images, without communication."""
        return self.fixed_s + self.image_s * batch_size


def all_reduce_s(num_bytes: float, ranks: int, link: Link) -> float:
    """Seconds of an all-reduce of `num_bytes` over `ranks` ranks."""
    if ranks == 1:
        return 0.0
    return 2 * math.ceil(math.log2(ranks)) * link.latency_s + 2 * (ranks - 1) / ranks * num_bytes / link.bytes_per_s


def efficiency(work: Work, ranks: int, batch_size: float, link: Link) -> float:
    """Images per second of `ranks` ranks with `batch_size` images each, over `ranks` times those of one alone."""
    computing = work.step_s(batch_size)
    exposed = max(0.0, all_reduce_s(work.gradient_bytes, ranks, link) - work.hidden_share * computing)
    norms = 2 * work.norm_layers * all_reduce_s(0, ranks, link)
    return computing / (computing + exposed + norms)


def batch_size_for(wanted: float, work: Work, ranks: int, link: Link) -> int:
    """The least power of two of images per rank from which the efficiency is `wanted`."""
    return next(2**power for power in range(40) if efficiency(work, ranks, 2**power, link) >= wanted)


def link_on_paper(gpus: int) -> Link:
    """The slowest way between so many GPUs, in nodes of eight."""
    return WITHIN_NODE if gpus <= GPUS_PER_NODE else BETWEEN_NODES
