"""One optimizer step on a global batch, and the state that it changes."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from dist_mnist.config.settings import Config
from dist_mnist.data.loader import Batch
from dist_mnist.distributed.collectives import Waiting, sum_together
from dist_mnist.distributed.device import autocast
from dist_mnist.distributed.tree_reduce import TreeSum, microbatch_sizes
from dist_mnist.distributed.world import World
from dist_mnist.model.adversarial import move_against
from dist_mnist.model.augment import Warp
from dist_mnist.model.batch_norm import fold_by_step
from dist_mnist.model.cnn import CNN, Network, place
from dist_mnist.model.losses import per_sample_loss
from dist_mnist.model.stateless_rng import address, sample_keys, uniform
from dist_mnist.run.checkpoint import difference
from dist_mnist.training.cuda_graph import StepGraph
from dist_mnist.training.gradients import Part, SumGradients, distribute, total_norm
from dist_mnist.training.optim import AveragedWeights, learning_rate, make_optimizer, optimizer_state
from dist_mnist.training.torch_startup import take_step
from dist_mnist.utils.errors import UserError

TOO_MANY_SKIPPED = 20  # steps in a row
DIVERGED = "training has diverged; start again in another --run-dir with a lower --lr or with --clip-norm"


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
        self.network = self.model if config.invariant else distribute(self.model, world, self.sum_gradients)
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
        self.gradient_norm.copy_(total_norm(gradients))
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
        skipped, weights = int(self.skipped), total_norm(self.parameters)
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
