"""Strategies for the gradient of a global batch: DDP, plain tensor operations, or a deterministic tree reduction.

Each strategy gets this rank's part of a batch and a function for the forward pass. The gradient is the exact mean over
the global batch, however unequal the ranks' parts: the forward pass divides its summed loss by the global count, and
gradients are summed over ranks.
"""

import inspect
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from dist_mnist.config.settings import Config
from dist_mnist.data.loader import Batch
from dist_mnist.distributed.collectives import CollectiveTimer, sum_together
from dist_mnist.distributed.tree_reduce import TreeSum, microbatch_sizes
from dist_mnist.distributed.world import World
from dist_mnist.model.classifier import Classifier, unchanged_buffers
from dist_mnist.model.layers.batch_norm import RunningStatistics
from dist_mnist.training.torch_startup import distributed
from dist_mnist.utils.errors import UserError, short

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of the gradients' all-reduce


class Microbatch(NamedTuple):
    """B samples of a batch on the device, with keys of random numbers for K purposes."""

    images: torch.Tensor  # (B, C, H, W)
    labels: torch.Tensor  # (B,) int64
    keys: torch.Tensor  # (B, K) int64
    partner_images: torch.Tensor | None = None  # (B, C, H, W), of the samples to mix these with, if any
    partner_labels: torch.Tensor | None = None  # (B,) int64

    @property
    def partners(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The partners' images and labels, if there are any."""
        if self.partner_images is None or self.partner_labels is None:
            return None
        return self.partner_images, self.partner_labels

    @classmethod
    def of(cls, batch: Batch, keys: torch.Tensor, partners: bool) -> "Microbatch":
        """Return a whole batch as one microbatch; `partners` says whether its samples have partners."""
        count = len(batch.ids)
        samples = cls(batch.images[:count], batch.labels[:count], keys)
        if not partners:
            return samples
        return samples._replace(partner_images=batch.images[count:], partner_labels=batch.labels[count:])

    def _tensors(self) -> list[torch.Tensor]:
        return [tensor for tensor in self if tensor is not None]

    def split(self, sizes: list[int]) -> list["Microbatch"]:
        """Split into microbatches of the given sizes."""
        return list(map(Microbatch, *(tensor.split(sizes) for tensor in self._tensors())))

    def blank(self) -> "Microbatch":
        """Return one placeholder image for an empty part: a ramp, as a constant image has zero standard deviation."""
        one = Microbatch(*(tensor.new_zeros((1, *tensor.shape[1:])) for tensor in self._tensors()))
        ramp = torch.arange(one.images.numel(), device=one.images.device) % 127
        return one._replace(images=ramp.reshape(one.images.shape).to(one.images.dtype))

    def split_evenly(self, count: int) -> list["Microbatch"]:
        """Split into `count` microbatches, equal to within one sample."""
        return list(map(Microbatch, *(torch.tensor_split(tensor, count) for tensor in self._tensors())))


class Outcome(NamedTuple):
    """The result of a forward pass."""

    loss: torch.Tensor  # (), summed loss / global batch size, to be differentiated
    moments: torch.Tensor  # (3, C) float64, of the inputs of the batch normalisation layers: sums of 1, x and x squared
    totals: torch.Tensor  # (3,) float64: summed loss, correct predictions, images


class Gradient(NamedTuple):
    """The gradient of a global batch, the same on all ranks, with the moments and totals of its forward passes."""

    gradients: Sequence[torch.Tensor]  # in the order of the trained parameters
    moments: torch.Tensor  # (3, C) float64, summed over the batch
    totals: torch.Tensor  # of this rank's part


Forward = Callable[[Callable[..., torch.Tensor], Microbatch], Outcome]
OnPhase = Callable[[str], object]


class GradientStrategy(Protocol):
    """A way to compute the gradient of a global batch. Collective."""

    def __call__(self, batch: Microbatch, forward: Forward, global_batch_size: int) -> Gradient:
        """Return the gradient; `batch` is this rank's part of the global batch, and may be empty."""


class DdpGradients:
    """Gradients by DistributedDataParallel (DDP), whose all-reduce overlaps with the backward pass.

    A communication hook replaces DDP's, which would divide by the world size. The time from sending the last bucket to
    the end of the backward pass counts as time in collectives.
    """

    def __init__(self, config: Config, world: World, model: Classifier, on_phase: OnPhase, timer: CollectiveTimer):
        self.config, self.world, self.model, self.on_phase, self.timer = config, world, model, on_phase, timer
        self.parameters = model.trained_parameters()
        self.all_reduce = _AllReduce(DTYPES[config.all_reduce])
        devices = [world.device.index] if world.device.type == "cuda" else None
        # Buffers are already the same on all ranks. torch 2.13 has renamed the option that turns their broadcast off.
        options = inspect.signature(DistributedDataParallel).parameters
        keep_buffers = "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers"
        self.network = distributed(model, device_ids=devices, gradient_as_bucket_view=True, **{keep_buffers: False})
        self.network.register_comm_hook(None, self.all_reduce.send)
        # DDP uses other buckets for a process's first gradient than for later ones, and the position in a bucket
        # decides the order in which ranks are summed. A dummy backward pass uses up the first buckets, so that a
        # resumed run ends with the same bits.
        blank, keys = torch.zeros(2, *model.image_shape, device=world.device), torch.zeros(2, dtype=torch.int64)
        with unchanged_buffers(model):
            self.network(blank, keys.to(world.device)).sum().backward()
        self.network.zero_grad(set_to_none=True)

    def __call__(self, batch: Microbatch, forward: Forward, global_batch_size: int) -> Gradient:
        self.network.zero_grad(set_to_none=True)
        outcomes = []
        *others, last = batch.split_evenly(_accumulated(self.config, self.world, global_batch_size))
        for microbatch in (*others, last):
            with nullcontext() if microbatch is last else self.network.no_sync():
                outcome = forward(self.network, microbatch)
                self.on_phase("backward, all-reduce")
                outcome.loss.backward()
            outcomes.append((outcome.moments, outcome.totals))
        self.timer.seconds += time.perf_counter() - self.all_reduce.sent_at
        gradients = [parameter.grad for parameter in self.parameters]
        return Gradient(_all_there(gradients, self.model), *_together(outcomes))


class _AllReduce:
    """DDP's communication hook. DDP keeps it forever, so it must not refer to DDP: gloo's threads would stay alive."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.sent_at = 0.0  # time.perf_counter() of the last bucket

    def send(self, _: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Start the all-reduce of a bucket of gradients."""
        gradients = bucket.buffer()
        sent = gradients.to(self.dtype)
        future = dist.all_reduce(sent, async_op=True).get_future()
        self.sent_at = time.perf_counter()

        def arrived(done: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
            done.value()  # raises the all-reduce's error, if any
            return gradients if sent is gradients else gradients.copy_(sent)

        return future.then(arrived)


class PlainGradients:
    """Gradients by plain tensor operations, with an all-reduce after the backward pass; for one process or CUDA graphs.

    Args:
        captured: for a CUDA graph: differentiate separate leaves, as DDP holds the parameters' autograd nodes, with a
            stream that a graph may not wait for. Hooks on parameters do not run then; the comparison of the graph's
            first step with an eager one reveals that.
    """

    def __init__(self, config: Config, world: World, model: Classifier, on_phase: OnPhase, captured: bool = False):
        self.config, self.world, self.model, self.on_phase = config, world, model, on_phase
        self.captured, self.parameters = captured, model.trained_parameters()

    def __call__(self, batch: Microbatch, forward: Forward, global_batch_size: int) -> Gradient:
        network: Callable[..., torch.Tensor] = self.model
        parameters: Sequence[torch.Tensor] = self.parameters
        if self.captured:
            trained = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
            leaves = {name: parameter.detach().requires_grad_() for name, parameter in trained.items()}
            network, parameters = lambda *inputs: functional_call(self.model, leaves, inputs), list(leaves.values())
        gradients: list[torch.Tensor] = []
        outcomes = []
        for microbatch in batch.split_evenly(_accumulated(self.config, self.world, global_batch_size)):
            outcome = forward(network, microbatch)
            self.on_phase("backward")
            of_microbatch = _differentiated(outcome.loss, parameters, self.model)
            if gradients:
                torch._foreach_add_(gradients, of_microbatch)
            gradients = gradients or of_microbatch
            outcomes.append((outcome.moments, outcome.totals))
        summed = sum_together(gradients, self.world, DTYPES[self.config.all_reduce])
        return Gradient(summed, *_together(outcomes))


class TreeGradients:
    """Gradients by a deterministic tree reduction over microbatches; their bits do not depend on the world size."""

    def __init__(
        self,
        config: Config,
        world: World,
        model: Classifier,
        running_statistics: RunningStatistics,
        on_phase: OnPhase,
        timer: CollectiveTimer,
    ):
        self.config, self.world, self.model = config, world, model
        self.running_statistics, self.parameters = running_statistics, model.trained_parameters()
        self.on_phase, self.timer = on_phase, timer

    def __call__(self, batch: Microbatch, forward: Forward, global_batch_size: int) -> Gradient:
        gradients, moments, totals = TreeSum(), TreeSum(), []
        sizes = microbatch_sizes(global_batch_size, self.config.microbatches, self.world.rank, self.world.size)
        for microbatch in batch.split(sizes):
            if len(microbatch.labels):
                outcome = forward(self.model, microbatch)
                self.on_phase("backward")
                gradients.add(_differentiated(outcome.loss, self.parameters, self.model))
                moments.add([outcome.moments])
                totals.append(outcome.totals)
            else:
                gradients.add([torch.zeros_like(parameter) for parameter in self.parameters])
                moments.add([self.running_statistics.nothing.clone()])
        self.on_phase("all-reduce")
        with self.timer:
            summed, [of_batch] = gradients.total(self.world), moments.total(self.world)
        nothing = torch.zeros(3, dtype=torch.float64, device=self.world.device)
        return Gradient(summed, of_batch, sum(totals, nothing))


def _differentiated(loss: torch.Tensor, parameters: Sequence[torch.Tensor], model: Classifier) -> list[torch.Tensor]:
    """Return the gradients of a loss (), one per parameter; UserError if it does not depend on one of them."""
    return _all_there(torch.autograd.grad(loss, parameters, allow_unused=True), model)


def _all_there(gradients: Sequence[torch.Tensor | None], model: Classifier) -> list[torch.Tensor]:
    """Return the gradients; UserError if a parameter has none, which the check before the run cannot foresee."""
    found = [gradient for gradient in gradients if gradient is not None]
    if len(found) < len(gradients):
        named = [name for name, parameter in model.inner.named_parameters() if parameter.requires_grad]
        unused = [name for name, gradient in zip(named, gradients, strict=True) if gradient is None]
        raise UserError(
            f"the logits of this batch do not depend on {short(', '.join(unused), 200)}, unlike those of earlier "
            "batches: a network must use all of its parameters in each step; compute every branch, multiplied by 0 "
            "where it is not used, or --freeze its parameters"
        )
    return found


def _accumulated(config: Config, world: World, global_batch_size: int) -> int:
    """Return the number of microbatches of a batch; fewer for a short batch, as none may be empty on all ranks."""
    return min(config.accumulate, -(-global_batch_size // world.size))


def _together(outcomes: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum moments and totals over the microbatches of a batch."""
    if len(outcomes) == 1:
        return outcomes[0]
    moments, totals = zip(*outcomes, strict=True)
    return torch.stack(moments).sum(0), torch.stack(totals).sum(0)
