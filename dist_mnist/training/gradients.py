"""How a rank computes the gradient of the global batch: DDP, one process, or a deterministic tree reduction."""

import inspect
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dist_mnist.distributed.collectives import Waiting
from dist_mnist.distributed.world import World
from dist_mnist.model.cnn import CNN
from dist_mnist.training.torch_startup import distributed


class Part(NamedTuple):
    """Some samples of a batch, with the keys of their random draws; B of them, all on the device."""

    images: torch.Tensor  # (B, C, H, W)
    labels: torch.Tensor  # (B,) int64
    augment_keys: torch.Tensor  # (B,) int64
    dropout_keys: torch.Tensor  # (B,) int64

    def split(self, sizes: list[int]) -> list["Part"]:
        return list(map(Part, *(tensor.split(sizes) for tensor in self)))


def total_norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The Euclidean norm of all numbers in `tensors`, (), without gradient."""
    if tensors[0].device.type == "cpu":  # where a large matrix is done twice as fast by rows
        tensors = [torch.linalg.vector_norm(t.detach(), dim=1) if t.dim() == 2 else t.detach() for t in tensors]
    return torch.nn.utils.get_total_norm(tensors, foreach=True)


def distribute(model: CNN, world: World, sum_gradients: "SumGradients") -> CNN | DistributedDataParallel:
    if world.size == 1:
        return model
    devices = [world.device.index] if world.device.type == "cuda" else None
    # Buffers are the same on all ranks by themselves. torch 2.13 gave the option that says so another name.
    options = inspect.signature(DistributedDataParallel).parameters
    keep_buffers = "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers"
    network = distributed(model, device_ids=devices, gradient_as_bucket_view=True, **{keep_buffers: False})
    network.register_comm_hook(None, sum_gradients.send)
    # DDP exchanges a process's first gradient in other buckets than all later ones, and the place in a bucket decides
    # in which order ranks are summed. For a run that goes on to end with the same bits, the first is none of its own.
    blank, keys = torch.zeros(1, *model.image_shape, device=world.device), torch.zeros(1, dtype=torch.int64)
    network(blank, keys.to(world.device)).sum().backward()
    network.zero_grad(set_to_none=True)
    return network


class SumGradients:
    """DDP's communication, without its division by the world size: losses are divided by the global count already.

    The time between the sending of the last gradients and the end of the backward pass is time spent `waiting`.
    """

    def __init__(self, precision: str, waiting: Waiting):
        self.dtype, self.waiting = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision], waiting
        self.sent_at: float | None = None

    def send(self, _: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """A hook for DDP: begin to sum a bucket of gradients over all ranks."""
        gradients = bucket.buffer()
        sent = gradients.to(self.dtype)
        future = dist.all_reduce(sent, async_op=True).get_future()
        self.sent_at = time.perf_counter()

        def arrived(done: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
            done.value()  # raises what went wrong
            return gradients if sent is gradients else gradients.copy_(sent)

        return future.then(arrived)

    def arrived(self) -> None:
        """Say that the backward pass has ended."""
        if self.sent_at is not None:
            self.waiting.seconds += time.perf_counter() - self.sent_at
            self.sent_at = None
