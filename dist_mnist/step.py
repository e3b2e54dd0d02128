"""One optimizer step on a global batch, and the state that it changes."""

import copy
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from dist_mnist.batch_norm import fold_by_step
from dist_mnist.checkpoint import difference
from dist_mnist.config import Config
from dist_mnist.data.augment import Warp
from dist_mnist.data.loader import Batch
from dist_mnist.distributed import Waiting, World, sum_together
from dist_mnist.draws import address, sample_keys, uniform
from dist_mnist.eager import distributed, take_step
from dist_mnist.errors import UserError
from dist_mnist.evaluate import Network
from dist_mnist.graph import StepGraph
from dist_mnist.model import CNN, move_against, per_sample_loss, place
from dist_mnist.optim import AveragedWeights, learning_rate, make_optimizer, optimizer_state
from dist_mnist.tree import TreeSum, microbatch_sizes

TOO_MANY_SKIPPED = 20  # steps in a row
DIVERGED = "training has diverged; start again in another --run-dir with a lower --lr or with --clip-norm"


class Part(NamedTuple):
    """Some samples of a batch, with the keys of their random draws; B of them, all on the device."""

    images: torch.Tensor  # (B, C, H, W)
    labels: torch.Tensor  # (B,) int64
    augment_keys: torch.Tensor  # (B,) int64
    dropout_keys: torch.Tensor  # (B,) int64

    def split(self, sizes: list[int]) -> list["Part"]:
        return list(map(Part, *(tensor.split(sizes) for tensor in self)))


class Controls(NamedTuple):
    """What is different from step to step, beside the batch; on the device, so that a CUDA graph can read it there."""

    augment: torch.Tensor  # () int64, the key of the epoch's augmentation
    dropout: torch.Tensor  # () int64, the key of its dropped units
    lr: torch.Tensor  # () float32
    averaging: torch.Tensor  # () float32, how far the averaged weights move


class Trainer:
    """The network with its optimizer and averaged weights; `step` is what training does, over and over.

    The gradient is the exact mean over the global batch, however unequal the ranks' parts: each rank divides its
    summed loss by the global count, and gradients are summed over ranks: by DDP while the backward pass still goes on,
    or, if invariant, over a fixed tree of microbatches. A step whose gradient is not finite changes nothing.

    With `crop`, early steps see the middle of the images only. On a GPU, steps on whole batches are launched as one
    CUDA graph (see `graph`), others as they are written here.

    `enter` is told which phase of a step begins.
    """

    def __init__(
        self, config: Config, world: World, model: CNN, total_steps: int, enter: Callable[[str], object] = str
    ):
        self.config, self.world, self.total_steps, self.enter = config, world, total_steps, enter
        self.model = place(model, world.device)
        self.waiting = Waiting()
        self.norms = fold_by_step(self.model, world.size > 1 and not config.invariant, self.waiting)
        self.sum_gradients = SumGradients(config.all_reduce, self.waiting)
        self.network = self.model if config.invariant else _distribute(self.model, world, self.sum_gradients)
        # Nothing stays of DDP's first exchange, which is none of the run's.
        for norm in self.norms:
            norm.moments.clear()
        self.sum_gradients.sent_at, self.waiting.seconds = None, 0.0
        integer, number = torch.zeros((), dtype=torch.int64, device=world.device), torch.zeros((), device=world.device)
        self.controls = Controls(integer, integer.clone(), number, number.clone())
        self.optimizer = make_optimizer(self.model, config, self.controls.lr)
        self.averaged = AveragedWeights(self.model, config.ema_decay)
        self.augment = Warp.of(config)
        self.autocast = autocast(config.precision, world.device)
        self.parameters = list(self.model.parameters())
        self.gradient_norm = number.clone()  # of the last step, before clipping; all ranks have the same
        self.totals = torch.zeros(3, dtype=torch.float64, device=world.device)  # loss, right answers, images
        self.skipped = number.clone()  # steps not taken since the last check
        self.skipped_in_a_row = number.clone()
        self.skipped_steps = 0  # before the last check, since this process started
        self.crop_until = round(config.crop_fraction * total_steps) if config.crop else 0
        self.crop = 0  # of this step, in pixels
        self.graph = self._make_graph()

    def step(self, batch: Batch, step: int, epoch: int, global_batch_size: int) -> None:
        """Train on this rank's part of global batch `step`. Collective; nothing is read back from the device."""
        self._set_controls(step, epoch)
        if self.crop != (crop := self.config.crop if step < self.crop_until else 0):
            self.crop, self.graph = crop, self._make_graph()
        whole = global_batch_size == self.config.batch_size
        if not (self.graph and whole and self.graph.take(batch)):
            self.take(batch, global_batch_size)
        if self.world.device.type == "cpu" and self.skipped and self.config.non_finite == "stop":
            self.check_finite(step + 1)  # a GPU, which would have to be waited for, is asked at the next pause

    def _make_graph(self) -> StepGraph | None:
        return StepGraph(self) if self.config.cuda_graph and self.world.device.type == "cuda" else None

    def _set_controls(self, step: int, epoch: int) -> None:
        keys = [address(what, self.config.seed, epoch) for what in ("augment", "dropout")]
        rates = [learning_rate(self.config, step, self.total_steps), self.averaged.weight(step)]
        for control, value in zip(self.controls, keys + rates, strict=True):
            control.fill_(value)

    def take(self, batch: Batch, global_batch_size: int, by_ddp: bool = True) -> None:
        """Take a step as the controls say. Collective; without DDP, gradients are summed after the backward pass."""
        keys = [sample_keys(base, batch.ids) for base in (self.controls.augment, self.controls.dropout)]
        mine = Part(batch.images, batch.labels, *keys)
        if self.config.invariant:
            moments = self._tree_gradient(mine, global_batch_size)
        elif by_ddp and self.network is not self.model:
            moments = self._ddp_gradient(mine, global_batch_size)
        else:
            moments = self._plain_gradient(mine, global_batch_size)
        self.enter("optimizer")
        finite = self._update(moments)
        self.averaged.update(self.controls.averaging * finite)

    def _parts(self, mine: Part, global_batch_size: int) -> list[Part]:
        """What is taken at a time, to save memory; of a short batch fewer, as none may be empty on all ranks."""
        count = min(self.config.accumulate, -(-global_batch_size // self.world.size))
        return list(map(Part, *(torch.tensor_split(tensor, count) for tensor in mine)))

    def _ddp_gradient(self, mine: Part, global_batch_size: int) -> list[torch.Tensor]:
        """The gradient by DDP, exchanged with the last part of the batch; gives the whole batch's moments."""
        network = self.network
        assert isinstance(network, DistributedDataParallel)
        self.optimizer.zero_grad(set_to_none=True)
        *others, last = self._parts(mine, global_batch_size)
        for part in (*others, last):
            with nullcontext() if part is last else network.no_sync():
                loss = self._forward(part, global_batch_size, network)
                self.enter("backward, all-reduce")
                loss.backward()
        self.sum_gradients.arrived()
        return [torch.stack(norm.moments).sum(0) for norm in self.norms]

    def _plain_gradient(self, mine: Part, global_batch_size: int) -> list[torch.Tensor]:
        """The same without DDP: nothing but tensor operations, for one process and for a CUDA graph."""
        # Leaves of their own: DDP keeps the parameters' autograd nodes, with a stream that no CUDA graph may wait for.
        leaves = {name: parameter.detach().requires_grad_() for name, parameter in self.model.named_parameters()}
        gradients: list[torch.Tensor] = []
        for part in self._parts(mine, global_batch_size):
            loss = self._forward(part, global_batch_size, lambda *inputs: functional_call(self.model, leaves, inputs))
            self.enter("backward")
            of_part = list(torch.autograd.grad(loss, list(leaves.values())))
            if gradients:
                torch._foreach_add_(gradients, of_part)
            gradients = gradients or of_part
        self._set_gradients(sum_together(gradients, self.world, self.sum_gradients.dtype))
        return [torch.stack(norm.moments).sum(0) for norm in self.norms]

    def _tree_gradient(self, mine: Part, global_batch_size: int) -> list[torch.Tensor]:
        """The same, with bits that do not depend on the world size."""
        gradients, moments = TreeSum(), TreeSum()
        sizes = microbatch_sizes(global_batch_size, self.config.microbatches, self.world.rank, self.world.size)
        for part in mine.split(sizes):
            if len(part.labels):
                loss = self._forward(part, global_batch_size, self.model)
                self.enter("backward")
                gradients.add(list(torch.autograd.grad(loss, self.parameters)))
                moments.add([norm.moments.pop() for norm in self.norms])
            else:
                gradients.add([torch.zeros_like(parameter) for parameter in self.parameters])
                moments.add([norm.no_moments() for norm in self.norms])
        self.enter("all-reduce")
        with self.waiting:
            summed, of_batch = gradients.total(self.world), moments.total(self.world)
        self._set_gradients(summed)
        return of_batch

    def _set_gradients(self, gradients: list[torch.Tensor]) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            alike = gradient.stride() == parameter.stride()  # fused optimizers go through memory, not through indices
            parameter.grad = gradient if alike else torch.empty_like(parameter).copy_(gradient)

    def _forward(self, part: Part, global_batch_size: int, network: Callable[..., torch.Tensor]) -> torch.Tensor:
        """The part's summed loss over the global count; it is entered in the totals."""
        self.enter("forward")
        images, labels = self.augment(part.images, part.augment_keys), part.labels
        if self.crop:
            images = images[:, :, self.crop : -self.crop, self.crop : -self.crop]
        with self.autocast():
            if self.config.adversarial:
                shares = uniform(~part.augment_keys, 1)[:, 0]  # ~: other numbers than the warp's
                images = move_against(self.model, images, labels, self.config.adversarial * shares)
            logits = network(images, part.dropout_keys)
        losses = per_sample_loss(logits, labels, self.config.label_smoothing)
        with torch.no_grad():
            correct = (logits.argmax(1) == labels).sum()
            self.totals += torch.stack([losses.double().sum(), correct, torch.ones_like(labels).sum()])
        return losses.sum() / global_batch_size

    @torch.no_grad()
    def _update(self, moments: list[torch.Tensor]) -> torch.Tensor:
        """Take the optimizer's step and move the running statistics if the gradient is finite; () bool, whether so."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]  # all have one
        self.gradient_norm.copy_(_total_norm(gradients))
        if self.config.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip_norm, self.gradient_norm, True)
        finite = self.gradient_norm.isfinite()
        # Fused optimizers leave everything as it is where this is 1: decided on the device, alike on all ranks.
        skips = (~finite).float()
        self.optimizer.found_inf = skips  # type: ignore[attr-defined]
        self.skipped += skips
        self.skipped_in_a_row.add_(1).mul_(skips)
        take_step(self.optimizer)
        for norm, of_batch in zip(self.norms, moments, strict=True):
            norm.fold(of_batch, finite)
        return finite

    def check_finite(self, step: int) -> None:
        """Hold the gradients since the last check, and the weights, against `--non-finite`.

        Raises:
            UserError: alike on all ranks, if the run is to stop.
        """
        skipped, weights = int(self.skipped), _total_norm(self.parameters)
        if not weights.isfinite():
            raise UserError(f"the weights are not finite after step {step}: {DIVERGED}")
        if skipped and self.config.non_finite == "stop":
            raise UserError(f"a gradient was not finite by step {step}: {DIVERGED}, or go past it: --non-finite skip")
        if self.skipped_in_a_row >= TOO_MANY_SKIPPED:
            raise UserError(f"{TOO_MANY_SKIPPED} gradients in a row were not finite by step {step}: {DIVERGED}")
        self.skipped_steps += skipped
        self.skipped.zero_()

    def wait(self) -> None:
        """Wait until the device has done what it was given."""
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)

    @contextmanager
    def evaluated(self) -> Iterator[Network]:
        """The network as it is evaluated, for a `with` block: with running statistics, and averaged weights if any."""
        network = copy.deepcopy(self.model) if self.averaged.decay else self.model
        network.load_state_dict(self.averaged.tensors, strict=False)
        try:
            yield network.eval()
        finally:
            self.model.train()

    def state(self) -> dict[str, np.ndarray]:
        """A copy of all that a run needs to go on, in host memory: `model/...`, `average/...`, `optimizer/...`."""
        return {name: np.array(tensor.cpu().numpy(), order="C") for name, tensor in self.tensors().items()}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take over what `state` gave.

        Raises:
            UserError: it is not the state of such a network and optimizer.
        """
        own = self.tensors()
        if different := difference(tensors, own):
            raise UserError(
                f"the run's newest checkpoint is not of its network and optimizer: {different}; remove that file, or "
                "give another --run-dir"
            )
        for name, tensor in own.items():
            tensor.copy_(tensors[name])

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state itself, named as in a checkpoint."""
        parts = {
            "model": self.model.state_dict(),
            "average": self.averaged.tensors,
            "optimizer": optimizer_state(self.optimizer, self.model),
        }
        return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def _total_norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The Euclidean norm of all numbers in `tensors`, (), without gradient."""
    if tensors[0].device.type == "cpu":  # where a large matrix is done twice as fast by rows
        tensors = [torch.linalg.vector_norm(t.detach(), dim=1) if t.dim() == 2 else t.detach() for t in tensors]
    return torch.nn.utils.get_total_norm(tensors, foreach=True)


def resolve_precision(config: Config, device: torch.device) -> str:
    """What `--precision auto` means on a device: bf16 where the hardware is faster at it, else fp32.

    AVX-512's dot products of bf16 (vdpbf16ps) do twice an fp32 instruction's work. AMD's cores start as many of them in
    a cycle, Intel's half as many; there it takes AMX to gain. (Measured on a Xeon without AMX: 0.67 of fp32's speed.)
    """
    if config.precision != "auto":
        return config.precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    features = torch.cpu.get_capabilities()
    fast = features.get("amx_bf16") or (features.get("avx512_bf16") and "AMD" in features.get("cpu_name", ""))
    return "bf16" if fast else "fp32"


def autocast(precision: str, device: torch.device) -> Callable[[], AbstractContextManager]:
    """What makes the context in which a network computes."""
    return partial(torch.autocast, device.type, torch.bfloat16) if precision == "bf16" else nullcontext


def _distribute(model: CNN, world: World, sum_gradients: "SumGradients") -> CNN | DistributedDataParallel:
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
