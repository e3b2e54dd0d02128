"""One optimizer step on a global batch, and the state that it changes."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from dist_mnist.batch_norm import fold_by_step
from dist_mnist.checkpoint import part_of
from dist_mnist.config import Config
from dist_mnist.data.augment import Affine
from dist_mnist.data.loader import Batch
from dist_mnist.distributed import World
from dist_mnist.draws import address, sample_keys
from dist_mnist.evaluate import Network
from dist_mnist.model import CNN, per_sample_loss
from dist_mnist.optim import AveragedWeights, gather_optimizer, learning_rate, make_optimizer, restore_optimizer


class Trainer:
    """The network with its optimizer and averaged weights; `step` is what training does, over and over.

    The gradient is the exact mean over the global batch, however unequal the ranks' parts: each rank divides its
    summed loss by the global count, and gradients are summed over ranks.
    """

    def __init__(self, config: Config, world: World, model: CNN, total_steps: int):
        self.config, self.world, self.total_steps = config, world, total_steps
        self.model = model.to(world.device)
        self.norms = fold_by_step(self.model, over_ranks=world.size > 1)
        self.network = _distribute(self.model, world)
        self.optimizer = make_optimizer(self.model, config)
        self.averaged = AveragedWeights(self.model, config.ema_decay)
        self.augment = Affine(config.rotate, config.scale, config.shear, config.shift)
        self.autocast = _autocast(config.precision, world.device)
        self.parameters = list(self.model.parameters())
        self.gradient_norm = torch.zeros(())  # of the last step, before clipping; all ranks have the same
        self.totals = torch.zeros(3, dtype=torch.float64, device=world.device)  # loss, right answers, images

    def step(self, batch: Batch, step: int, epoch: int, global_batch_size: int) -> None:
        """Train on this rank's part of global batch `step`. Collective; nothing is read back from the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step, self.total_steps)
        augment_keys, dropout_keys = (
            sample_keys(address(purpose, self.config.seed, epoch), batch.ids) for purpose in ("augment", "dropout")
        )
        images = self.augment(batch.images, augment_keys)
        # No part may be empty on all ranks: of a short batch there are fewer.
        num_parts = min(self.config.accumulate, -(-global_batch_size // self.world.size))
        parts = [torch.tensor_split(tensor, num_parts) for tensor in (images, batch.labels, dropout_keys)]
        self.optimizer.zero_grad(set_to_none=True)
        for number, part in enumerate(zip(*parts, strict=True), start=1):
            with self._reduce_gradients(number == num_parts):
                self._forward_backward(*part, global_batch_size)
        for norm in self.norms:
            norm.fold(torch.stack(norm.moments).sum(0))
        self.gradient_norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters], foreach=True)
        if self.config.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip_norm, self.gradient_norm, True)
        self.optimizer.step()
        self.averaged.update(step)

    def _forward_backward(
        self, images: torch.Tensor, labels: torch.Tensor, dropout_keys: torch.Tensor, global_batch_size: int
    ) -> None:
        with self.autocast():
            logits = self.network(images, dropout_keys)
        losses = per_sample_loss(logits, labels, self.config.label_smoothing)
        (losses.sum() / global_batch_size).backward()
        with torch.no_grad():
            correct = (logits.argmax(1) == labels).sum()
            self.totals += torch.stack([losses.double().sum(), correct, torch.ones_like(labels).sum()])

    def _reduce_gradients(self, wanted: bool):
        """Gradients are exchanged only after the last part of a batch."""
        return nullcontext() if wanted or self.network is self.model else self.network.no_sync()

    def wait(self) -> None:
        """Wait until the device has done what it was given."""
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)

    @contextmanager
    def evaluated(self) -> Iterator[Network]:
        """The network as it is evaluated, for a `with` block: with running statistics, and averaged weights if any."""
        self.model.eval()
        yield partial(functional_call, self.model, self.averaged.tensors) if self.averaged.decay else self.model
        self.model.train()

    def state(self) -> dict[str, np.ndarray]:
        """All numbers that a run needs to go on, on the CPU: `model/...`, `average/...`, `optimizer/...`."""
        parts = {
            "model": self.model.state_dict(),
            "average": self.averaged.tensors,
            "optimizer": gather_optimizer(self.optimizer, self.model),
        }
        return {
            f"{part}/{name}": np.ascontiguousarray(tensor.cpu().numpy())
            for part, tensors in parts.items()
            for name, tensor in tensors.items()
        }

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take over what `state` gave."""
        self.model.load_state_dict(part_of(tensors, "model"))
        for name, tensor in part_of(tensors, "average").items():
            self.averaged.tensors[name].copy_(tensor)
        restore_optimizer(self.optimizer, self.model, part_of(tensors, "optimizer"))


def resolve_precision(config: Config, device: torch.device) -> str:
    """What `--precision auto` means on a device: bf16 where it is computed in hardware, else fp32."""
    if config.precision != "auto":
        return config.precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    features = torch.cpu.get_capabilities()
    return "bf16" if any(features.get(name) for name in ("avx512_bf16", "amx_bf16")) else "fp32"


def _autocast(precision: str, device: torch.device):
    return partial(torch.autocast, device.type, torch.bfloat16) if precision == "bf16" else nullcontext


def _distribute(model: CNN, world: World) -> CNN | DistributedDataParallel:
    if world.size == 1:
        return model
    devices = [world.device.index] if world.device.type == "cuda" else None
    # Buffers are the same on all ranks by themselves. torch 2.13 gave the option that says so another name.
    options = inspect.signature(DistributedDataParallel).parameters
    keep_buffers = "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers"
    network = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True, **{keep_buffers: False})
    network.register_comm_hook(None, _sum_gradients)
    return network


def _sum_gradients(_: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP's communication, without its division by the world size: losses are divided by the global count already."""
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])
