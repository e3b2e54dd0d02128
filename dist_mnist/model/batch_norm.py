"""Batch normalisation over the global batch: one GPU and N GPUs compute the same network.

torch's SyncBatchNorm runs on GPUs alone; this one is plain tensor operations, so it also runs over gloo on CPUs, and
the ranks' parts of a batch may differ in size and be empty. Where a batch is taken in several parts, each part is
normalised by its own statistics, and the running statistics still move once a step, by those of the whole batch.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dist_mnist.distributed.collectives import Waiting, gather_rows


class _NormaliseGlobally(torch.autograd.Function):
    """(x - mean) * rstd, the statistics over all ranks' rows of x (B, C, ...). Collective, in both directions."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, eps: float, waiting: Waiting) -> tuple[torch.Tensor, ...]:
        axes = [axis for axis in range(x.dim()) if axis != 1]
        values = x.float()
        count = torch.full((1,), x.numel() / x.shape[1], device=x.device)
        local_mean = values.sum(axes) / count.clamp(min=1)
        local_squares = (values - _like(local_mean, x)).square().sum(axes)
        with waiting:
            rows = gather_rows(torch.cat([count, local_mean, local_squares]))
        counts, means, squares = rows.split([1, x.shape[1], x.shape[1]], dim=1)
        total = counts.sum()
        mean = (counts * means).sum(0) / total
        # Chan, Golub and LeVeque (1979): exact combination of the parts' squared deviations, without cancellation.
        variance = (squares + counts * (means - mean).square()).sum(0) / total
        rstd = (variance + eps).rsqrt()
        normal = (values - _like(mean, x)) * _like(rstd, x)
        ctx.save_for_backward(normal, rstd, total)
        ctx.waiting = waiting
        ctx.mark_non_differentiable(mean, variance, total)
        return normal, mean, variance, total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor, None, None]:
        normal, rstd, total = ctx.saved_tensors
        axes = [axis for axis in range(grad.dim()) if axis != 1]
        sums = torch.cat([grad.sum(axes), (grad * normal).sum(axes)])
        with ctx.waiting:
            dist.all_reduce(sums)
        grad_mean, grad_normal = (sums / total).chunk(2)
        return _like(rstd, grad) * (grad - _like(grad_mean, grad) - normal * _like(grad_normal, grad)), None, None


class StepBatchNorm(nn.modules.batchnorm._BatchNorm):
    """nn.BatchNorm1d or 2d with the statistics of the global batch, or of this process's part of it alone.

    In training it must be called on every rank (it is collective if `over_ranks`), with an empty part too; the running
    statistics wait until `fold` moves them. State dicts are those of torch's layers.
    """

    over_ranks: bool
    waiting: Waiting
    moments: list[torch.Tensor]  # of each call since the last fold: (3, C) float64 sums of 1, x and x squared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        if self.over_ranks:
            normal, mean, variance, total = _NormaliseGlobally.apply(x, self.eps, self.waiting)
            result = (normal * _like(self.weight, x) + _like(self.bias, x)).to(x.dtype)
        else:
            result, mean, rstd = torch.native_batch_norm(x, self.weight, self.bias, None, None, True, 0.0, self.eps)
            variance = rstd.detach().double() ** -2 - self.eps
            total = torch.full((), x.numel() / x.shape[1], device=x.device)
        mean, total = mean.detach().double(), total.double()
        self.moments.append(torch.stack([total.expand_as(mean), total * mean, total * (variance + mean.square())]))
        return result

    def no_moments(self) -> torch.Tensor:
        """The moments of no rows."""
        return torch.zeros(3, self.num_features, dtype=torch.float64, device=self.weight.device)

    @torch.no_grad()
    def fold(self, moments: torch.Tensor, wanted: torch.Tensor | bool = True) -> None:
        """Move the running statistics by a whole batch's (3, C) moments, if `wanted`.

        A single row says nothing of the variance, and moves nothing.
        """
        total, sums, squares = moments
        mean = sums / total
        variance = (squares / total - mean.square()).clamp(min=0) * (total / (total - 1).clamp(min=1))
        moves = (total > 1) & wanted
        for name, value in (("running_mean", mean), ("running_var", variance)):
            running: torch.Tensor = getattr(self, name)
            running.copy_(torch.where(moves, running.lerp(value.float(), self.momentum or 0.0), running))
        self.get_buffer("num_batches_tracked").add_(1)
        self.moments.clear()

    def _check_input_dim(self, x: torch.Tensor) -> None:
        """Any number of dimensions from 2 will do."""


def fold_by_step(model: nn.Module, over_ranks: bool, waiting: Waiting | None = None) -> Sequence[StepBatchNorm]:
    """Turn the batch normalisation layers of `model` into such ones, in place; they are returned.

    Their time in collectives is added to `waiting`.
    """
    layers: list[StepBatchNorm] = []
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.__class__ = StepBatchNorm  # type: ignore[assignment]
            assert isinstance(layer, StepBatchNorm)
            layer.over_ranks, layer.moments, layer.waiting = over_ranks, [], waiting or Waiting()
            layers.append(layer)
    return layers


def _like(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(C,) as (1, C, 1, ...) to go with x (B, C, ...)."""
    return values.reshape(1, -1, *[1] * (x.dim() - 2))
