"""One optimizer step on a global batch, and the state that it changes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from dist_mnist.config.settings import Config
from dist_mnist.data.loader import Batch
from dist_mnist.distributed.collectives import CollectiveTimer, sum_over_ranks
from dist_mnist.distributed.device import autocast
from dist_mnist.distributed.world import World
from dist_mnist.model.adversarial import fgm_perturb
from dist_mnist.model.augment.pipeline import Augmentation
from dist_mnist.model.classifier import Classifier, to_device
from dist_mnist.model.layers.batch_norm import RunningStatistics, collect_moments, synchronise_batch_norm
from dist_mnist.model.layers.dropout import KEYED
from dist_mnist.model.stateless_rng import fold_in, key_of, uniform
from dist_mnist.run.checkpoints.file import difference
from dist_mnist.run.plan import Plan
from dist_mnist.training.cuda_graph import StepGraph
from dist_mnist.training.gradients import (
    DdpGradients,
    Gradient,
    GradientStrategy,
    Microbatch,
    OnPhase,
    Outcome,
    PlainGradients,
    TreeGradients,
)
from dist_mnist.training.optim import EmaWeights, learning_rate, make_optimizer, optimizer_state
from dist_mnist.training.spikes.audit import SpikeAudit
from dist_mnist.training.torch_startup import take_step
from dist_mnist.utils.errors import NotFinite, UserError

TOO_MANY_SKIPPED = 20  # steps in a row
DIVERGED = "training has diverged; start again in another --run-dir with a lower --lr or with --clip-norm"


class Controls(NamedTuple):
    """A step's inputs besides the batch; on the device, where a CUDA graph reads them."""

    keys: torch.Tensor  # (K,) int64, the epoch's key for each purpose of random numbers
    lr: torch.Tensor  # () float32, learning rate
    averaging: torch.Tensor  # () float32, weight of the new values in the EMA


class StepStatistics(NamedTuple):
    """Statistics of the last step, the same on all ranks."""

    learning_rate: float
    gradient_norm: float  # before clipping
    skipped_steps: int  # number since this process started, as of the last check for finite numbers


class Trainer:
    """The model with its optimizer and the EMA of its weights; `step` trains on one batch.

    A strategy, chosen once, computes the gradient of the global batch (see `gradients`). A step whose gradient is not
    finite changes nothing.

    With `crop`, early steps use a centre crop of the images. On a GPU, steps on whole batches run as one CUDA graph
    (see `cuda_graph`), others eagerly.

    `on_phase` is called when a phase of a step begins.
    """

    def __init__(
        self, config: Config, world: World, model: Classifier, total_steps: int, on_phase: OnPhase = lambda phase: None
    ):
        self.config, self.world, self.total_steps, self.on_phase = config, world, total_steps, on_phase
        self.model = to_device(model, world.device)
        self.collective_timer = CollectiveTimer()
        over_ranks = world.size > 1 and not config.invariant
        norms = synchronise_batch_norm(self.model, over_ranks, self.collective_timer)
        self.running_statistics = RunningStatistics(norms, world.device)
        self.gradient = self._choose_strategy()
        self.collective_timer.seconds = 0.0  # without DDP's dummy pass, which is no part of the run
        self.augment = Augmentation(config)
        drops = any(isinstance(layer, KEYED) for layer in self.model.modules())
        self.purposes = self.augment.purposes + ["dropout"] * drops  # of random numbers that need keys
        number = torch.zeros((), device=world.device)
        keys = torch.zeros(len(self.purposes), dtype=torch.int64, device=world.device)
        self.controls = Controls(keys, number, number.clone())
        self.epoch_of_keys = -1
        self.optimizer = make_optimizer(self.model, config, self.controls.lr)
        self.ema = EmaWeights(self.model, config.ema_decay)
        self.autocast = autocast(config.precision, world.device)
        self.parameters = self.model.trained_parameters()
        self.values = torch.zeros(4, dtype=torch.float64, device=world.device)  # the last result of `step`
        self.totals, self.gradient_norm = self.values[:3], self.values[3]
        self.skipped = number.clone()  # steps skipped since the last check
        self.skipped_in_a_row = number.clone()
        self.skipped_steps = 0  # number before the last check
        self.crop_until = round(config.crop_fraction * total_steps) if config.crop else 0
        self.crop = 0  # centre crop of this step, in pixels
        self.graph = self._make_graph()
        self.audit = SpikeAudit(world, self._changed_by_a_step, self.values) if config.audit_spikes else None

    @classmethod
    def build(
        cls, plan: Plan, world: World, model: Classifier, on_phase: OnPhase, tensors: dict[str, torch.Tensor]
    ) -> "Trainer":
        """Build a run's trainer; `tensors`, if any, are the state to resume from. Collective."""
        trainer = cls(plan.config, world, model, plan.total_steps, on_phase)
        if tensors:
            trainer.load_state(tensors)
        return trainer

    def _choose_strategy(self) -> GradientStrategy:
        config, world, model, timer = self.config, self.world, self.model, self.collective_timer
        if config.invariant:
            return TreeGradients(config, world, model, self.running_statistics, self.on_phase, timer)
        if world.size > 1:
            return DdpGradients(config, world, model, self.on_phase, timer)
        return PlainGradients(config, world, model, self.on_phase)

    def _make_graph(self) -> StepGraph | None:
        """Return the CUDA graph of a step, if it is to be used."""
        if not self.config.cuda_graph or self.world.device.type != "cuda":
            return None
        return self.step_graph()

    def step_graph(self, **options: Callable) -> StepGraph:
        """Return a CUDA graph of steps on whole batches; `options` are passed to `StepGraph`."""
        strategy = self.gradient
        if not isinstance(strategy, TreeGradients):  # DDP's hooks cannot be captured
            strategy = PlainGradients(self.config, self.world, self.model, self.on_phase, captured=True)
        size = self.config.batch_size
        return StepGraph(
            eager_step=lambda batch: self.eager_step(batch, size, self.gradient),
            captured_step=lambda batch: self.eager_step(batch, size, strategy),
            state=self._changed_by_a_step,
            parameters=self.parameters,
            world=self.world,
            all_reduce=self.config.all_reduce,
            on_phase=self.on_phase,
            **options,
        )

    def step(self, batch: Batch, step: int, epoch: int, global_batch_size: int) -> torch.Tensor:
        """Train on this rank's part of global batch `step`. Collective; does not synchronise with a GPU.

        Returns:
            (4,) float64 on the device: summed loss, correct predictions and images of this rank's part, and the norm of
            the global batch's gradient before clipping. The next step overwrites this tensor.
        """
        self._set_controls(step, epoch)
        if self.crop != (crop := self.config.crop if step < self.crop_until else 0):
            self.crop, self.graph = crop, self._make_graph()
        take = lambda: self._take_step(batch, global_batch_size)  # noqa: E731
        self.audit.step(take, step, global_batch_size) if self.audit else take()
        if self.world.device.type == "cpu" and self.skipped and self.config.non_finite == "stop":
            self.check_finite(step + 1)  # on a GPU this would synchronise; it is checked at the next pause
        return self.values

    def _take_step(self, batch: Batch, global_batch_size: int) -> None:
        whole = global_batch_size == self.config.batch_size
        if not (self.graph and whole and self.graph.launch(batch)):
            self.eager_step(batch, global_batch_size, self.gradient)

    def _set_controls(self, step: int, epoch: int) -> None:
        self.controls.lr.fill_(learning_rate(self.config, step, self.total_steps))
        self.controls.averaging.fill_(self.ema.weight(step))
        if epoch != self.epoch_of_keys:
            keys = [key_of(purpose, self.config.seed, epoch) for purpose in self.purposes]
            self.controls.keys.copy_(torch.tensor(keys, dtype=torch.int64))
            self.epoch_of_keys = epoch

    def eager_step(self, batch: Batch, global_batch_size: int, strategy: GradientStrategy) -> None:
        """Run a step eagerly, with the current controls. Collective."""
        ids = batch.ids[:, None]
        keys = fold_in(self.controls.keys, ids) if self.purposes else ids[:, :0]
        part = Microbatch.of(batch, keys, self.config.mixes)
        forward = lambda network, microbatch: self._forward(network, microbatch, global_batch_size)  # noqa: E731
        gradient = strategy(part, forward, global_batch_size)
        self.on_phase("optimizer")
        finite = self._update(gradient)
        self.totals.copy_(gradient.totals)
        self.ema.update(self.controls.averaging * finite)

    def _forward(self, network: Callable[..., torch.Tensor], part: Microbatch, global_batch_size: int) -> Outcome:
        self.on_phase("forward")
        if not (counts := len(part.labels) > 0):  # many networks fail on an empty batch
            part = part.blank()
        keys = dict(zip(self.purposes, part.keys.unbind(1), strict=True))
        images, targets = self.augment((part.images, part.labels), part.partners, keys, self.crop)
        with self.autocast():
            if self.config.adversarial:
                fractions = uniform(~keys["augment"], 1)[:, 0]  # ~: a different stream from the augmentation's
                images = fgm_perturb(self.model, images, targets, self.config.adversarial * fractions)
            with collect_moments(counts) as seen:
                logits = network(images, keys.get("dropout"))
        losses = targets.losses(logits, self.config.label_smoothing)
        if not counts:
            losses = losses * 0
        with torch.no_grad():
            correct = (logits.argmax(1) == targets.dominant()).sum(dtype=torch.float64)
            totals = torch.stack([losses.double().sum(), correct, torch.full_like(correct, len(losses))])
            if not counts:
                totals.zero_()
        return Outcome(losses.sum() / global_batch_size, self.running_statistics.moments(seen), totals)

    @torch.no_grad()
    def _update(self, gradient: Gradient) -> torch.Tensor:
        """Update weights and running statistics if the gradient is finite; return whether it is, () bool."""
        self._set_gradients(gradient.gradients)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = _total_norm(gradients)
        self.gradient_norm.copy_(norm)
        if self.config.clip_norm:
            nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip_norm, norm, True)
        finite = norm.isfinite()
        # Fused optimizers change nothing if found_inf is 1: decided on the device, and equal on all ranks.
        skips = (~finite).float()
        self.optimizer.found_inf = skips  # type: ignore[attr-defined]
        self.skipped += skips
        self.skipped_in_a_row.add_(1).mul_(skips)
        take_step(self.optimizer)
        self.running_statistics.update(gradient.moments, finite)
        return finite

    def _set_gradients(self, gradients: Sequence[torch.Tensor]) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            alike = gradient.stride() == parameter.stride()  # fused optimizers iterate over memory, not over indices
            parameter.grad = gradient if alike else torch.empty_like(parameter).copy_(gradient)

    def check_finite(self, step: int) -> None:
        """Check that the gradients since the last check, and the weights, are finite; see `--non-finite`. Collective.

        Raises:
            NotFinite: on all ranks, if the run must stop.
        """
        skipped, weights = int(self.skipped), sum_over_ranks(_total_norm(self.parameters), self.world)
        if not weights.isfinite():
            raise NotFinite(f"the weights are not finite after step {step}: {DIVERGED}")
        if skipped and self.config.non_finite == "stop":
            raise NotFinite(f"a gradient was not finite by step {step}: {DIVERGED}; or skip it by --non-finite skip")
        if self.skipped_in_a_row >= TOO_MANY_SKIPPED:
            raise NotFinite(f"{TOO_MANY_SKIPPED} gradients in a row were not finite by step {step}: {DIVERGED}")
        self.skipped_steps += skipped
        self.skipped.zero_()

    def statistics(self) -> StepStatistics:
        """Return the statistics of the last step."""
        return StepStatistics(float(self.controls.lr), float(self.gradient_norm), self.skipped_steps)

    @contextmanager
    def evaluation_model(self) -> Iterator[Classifier]:
        """Yield the model in eval mode, with the EMA of the weights if there is one, for a `with` block."""
        with self.ema.in_place():
            try:
                yield self.model.eval()
            finally:
                self.model.train()

    def close(self) -> None:
        """Release the CUDA graph: NCCL's shutdown would wait for a graph that holds its work."""
        self.graph = None

    def state_arrays(self) -> dict[str, np.ndarray]:
        """Return a copy of the state for a checkpoint, in host memory: `model/...`, `average/...`, `optimizer/...`."""
        return {name: np.array(tensor.cpu().numpy(), order="C") for name, tensor in self.state_tensors().items()}

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Load the state of a checkpoint.

        Raises:
            UserError: it is the state of another model or optimizer.
        """
        own = self.state_tensors()
        if different := difference(tensors, own):
            raise UserError(
                f"the run's newest checkpoint does not match its network and optimizer: {different}; remove that file, "
                "or give another --run-dir"
            )
        for name, tensor in own.items():
            tensor.copy_(tensors[name])

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors of the state, not copies, named as in a checkpoint."""
        parts = {
            "model": self.model.state_dict(),
            "average": self.ema.tensors,
            "optimizer": optimizer_state(self.optimizer, self.model),
        }
        return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}

    def _changed_by_a_step(self) -> list[torch.Tensor]:
        counts = [self.totals, self.skipped, self.skipped_in_a_row, self.gradient_norm]
        return [*self.state_tensors().values(), *counts]


def _total_norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the Euclidean norm of all numbers in `tensors`, (), without gradient."""
    if tensors[0].device.type == "cpu":  # row by row is twice as fast there for a large matrix
        tensors = [torch.linalg.vector_norm(t.detach(), dim=1) if t.dim() == 2 else t.detach() for t in tensors]
    return nn.utils.get_total_norm(tensors, foreach=True)
