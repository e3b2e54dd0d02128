"""Optimizer, learning rate schedule and exponential moving average (EMA) of the weights."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from dist_mnist.config.settings import Config
from dist_mnist.training.torch_startup import exempt


def make_optimizer(model: nn.Module, config: Config, lr: torch.Tensor) -> torch.optim.Optimizer:
    """Return the optimizer that `config` names, fused; weight decay is not applied to biases and normalisation.

    Each step reads the learning rate from `lr`, () float32 on the model's device.
    """
    exempt(torch.optim.Optimizer)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer: torch.optim.Optimizer
    if config.optimizer == "sgd":
        nesterov = config.nesterov and config.momentum > 0
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=config.momentum, nesterov=nesterov, fused=True)
        moments = ["momentum_buffer"] if config.momentum else []
    else:
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
        betas = (config.beta1, config.beta2)
        optimizer = kind(groups, lr=lr, betas=betas, fused=True, capturable=lr.is_cuda)
        moments = ["exp_avg", "exp_avg_sq"]
    # Create all state now: a checkpoint's contents are then known, and SGD's momentum would be uninitialised if the
    # first step were skipped.
    for parameter in parameters:
        state = {moment: torch.zeros_like(parameter) for moment in moments}
        if config.optimizer != "sgd":
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        optimizer.state[parameter] = state
    return optimizer


def learning_rate(config: Config, step: int, total_steps: int) -> float:
    """Return the learning rate of step `step` (from 0): a linear warm-up, then the schedule."""
    assert config.lr is not None  # resolved before
    warmup_steps = round(config.warmup_fraction * total_steps)
    if step < warmup_steps:
        return config.lr * (step + 1) / (warmup_steps + 1)
    if config.schedule == "constant":
        return config.lr
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    left = (1 + math.cos(math.pi * progress)) / 2 if config.schedule == "cosine" else 1 - progress
    return config.lr * (config.final_lr_fraction + (1 - config.final_lr_fraction) * left)


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, torch.Tensor]:
    """Return an optimizer's state as named tensors, such as `momentum_buffer/head.weight`; not copies."""
    return {
        f"{key}/{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, torch.Tensor)
    }


class EmaWeights:
    """Exponential moving average (EMA) of a model's parameters and buffers; a decay of 0 turns it off.

    At first the EMA follows faster, with decay min(decay, (1 + updates) / (10 + updates)), as in TensorFlow's
    ExponentialMovingAverage, so that it soon forgets the initial weights.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self._live = {k: v for k, v in model.state_dict().items() if v.is_floating_point()} if decay else {}
        self.tensors = {name: tensor.clone() for name, tensor in self._live.items()}

    def weight(self, step: int) -> float:
        """Return the weight of the new values in the EMA's update after step `step` (from 0)."""
        return 1 - min(self.decay, (1 + step) / (10 + step))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Replace the model's weights by the EMA for a `with` block; restore them bit for bit afterwards."""
        kept = {name: live.clone() for name, live in self._live.items()}
        try:
            self._copy(self.tensors)
            yield
        finally:
            self._copy(kept)

    @torch.no_grad()
    def _copy(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, live in self._live.items():
            live.copy_(tensors[name])

    @torch.no_grad()
    def update(self, weight: torch.Tensor) -> None:
        """Update the EMA, with `weight` for the new values, () float32 on the device."""
        averages, live = list(self.tensors.values()), list(self._live.values())
        if weight.is_cuda and averages:
            move_together(averages, live, weight)
            return
        for average, current in zip(averages, live, strict=True):  # on a CPU one pass over each tensor is faster
            average.lerp_(current, weight)


def move_together(averages: list[torch.Tensor], live: list[torch.Tensor], weight: torch.Tensor) -> None:
    """Move each average towards its live tensor by `weight`, (); on a GPU, three kernels for many tensors."""
    moves = torch._foreach_sub(live, averages)
    torch._foreach_mul_(moves, weight)
    torch._foreach_add_(averages, moves)
