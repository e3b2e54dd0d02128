"""Batch normalisation over the global batch: one GPU and N GPUs compute the same network.

torch's SyncBatchNorm runs on GPUs alone; this one is plain tensor operations, so it also runs over gloo on CPUs, and
the ranks' parts of a batch may differ in size and be empty.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dist_mnist.distributed import gather_rows


class _NormaliseGlobally(torch.autograd.Function):
    """(x - mean) * rstd, the statistics over all ranks' rows of x (B, C, ...). Collective, in both directions."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, eps: float) -> tuple[torch.Tensor, ...]:
        axes = [axis for axis in range(x.dim()) if axis != 1]
        values = x.float()
        count = torch.full((1,), x.numel() / x.shape[1], device=x.device)
        local_mean = values.sum(axes) / count.clamp(min=1)
        local_squares = (values - _like(local_mean, x)).square().sum(axes)
        counts, means, squares = gather_rows(torch.cat([count, local_mean, local_squares])).split(
            [1, x.shape[1], x.shape[1]], dim=1
        )
        total = counts.sum()
        mean = (counts * means).sum(0) / total
        # Chan, Golub and LeVeque (1979): exact combination of the parts' squared deviations, without cancellation.
        variance = (squares + counts * (means - mean).square()).sum(0) / total
        rstd = (variance + eps).rsqrt()
        normal = (values - _like(mean, x)) * _like(rstd, x)
        ctx.save_for_backward(normal, rstd, total)
        ctx.mark_non_differentiable(mean, variance, total)
        return normal, mean, variance, total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor, None]:
        normal, rstd, total = ctx.saved_tensors
        axes = [axis for axis in range(grad.dim()) if axis != 1]
        sums = torch.cat([grad.sum(axes), (grad * normal).sum(axes)])
        dist.all_reduce(sums)
        grad_mean, grad_normal = (sums / total).chunk(2)
        return _like(rstd, grad) * (grad - _like(grad_mean, grad) - normal * _like(grad_normal, grad)), None


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """nn.BatchNorm1d or 2d whose training statistics are those of the global batch.

    Collective in training: every rank must call it, with an empty part too; without effect on names in state dicts.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        normal, mean, variance, total = _NormaliseGlobally.apply(x, self.eps)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (total / (total - 1).clamp(min=1)), self.momentum)
        return (normal * _like(self.weight, x) + _like(self.bias, x)).to(x.dtype)

    def _check_input_dim(self, x: torch.Tensor) -> None:
        """Any number of dimensions from 2 will do."""


def make_global(model: nn.Module) -> None:
    """Turn the batch normalisation layers of `model` into global ones, in place."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.__class__ = GlobalBatchNorm


def _like(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(C,) as (1, C, 1, ...) to go with x (B, C, ...)."""
    return values.reshape(1, -1, *[1] * (x.dim() - 2))
