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

from dist_mnist.distributed import Waiting, gather_rows


class _NormaliseGlobally(torch.autograd.Function):
    """Batch normalisation of x (B, C, ...) by the statistics of all ranks' rows. Collective, in both directions.

    All passes over x are torch's own kernels for batch normalisation: one for the statistics and one for the result;
    backward one for the sums and two for the gradient, which for given sums is linear in x and in the result's.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, waiting: Waiting
    ) -> tuple[torch.Tensor, ...]:
        count = torch.full((1,), x.numel() / x.shape[1], device=x.device)
        zeros, ones = torch.zeros_like(weight), torch.ones_like(weight)  # in the precision of the statistics
        local_mean, local_variance = zeros, zeros
        if len(x):
            local_mean, local_variance = torch.batch_norm_update_stats(x, zeros, ones, 0.0)
        with waiting:
            rows = gather_rows(torch.cat([count, local_mean, count * local_variance]))
        counts, means, squares = rows.split([1, x.shape[1], x.shape[1]], dim=1)
        total = counts.sum()
        mean = (counts * means).sum(0) / total
        # Chan, Golub and LeVeque (1979): exact combination of the parts' squared deviations, without cancellation.
        variance = (squares + counts * (means - mean).square()).sum(0) / total
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt(), total)
        ctx.waiting = waiting
        ctx.mark_non_differentiable(mean, variance, total)
        return _scaled(x, weight, bias, mean, variance, eps), mean, variance, total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        x, weight, mean, rstd, total = ctx.saved_tensors
        of_weight, of_bias = torch.zeros_like(weight), torch.zeros_like(weight)
        if len(x):
            sums_only = [False, True, True]
            _, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
                grad, x, weight, None, None, mean, rstd, True, 0.0, sums_only
            )
        sums = torch.cat([of_bias, of_weight])
        with ctx.waiting:
            dist.all_reduce(sums)
        mean_grad, slope = (sums / total).chunk(2)
        # weight * rstd * (grad - mean_grad - slope * (x - mean) * rstd)
        scale, offset = weight * rstd, torch.zeros_like(weight)
        result = _scaled(grad, scale, offset)
        result += _scaled(x, -scale * slope * rstd, -scale * mean_grad, mean)
        return result, of_weight, of_bias, None, None


def _scaled(
    x: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor,
    mean: torch.Tensor | None = None,
    variance: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """(x - mean) / sqrt(variance + eps) * scale + offset by channel, in x's precision, in one pass."""
    mean = torch.zeros_like(scale) if mean is None else mean
    variance = torch.ones_like(scale) if variance is None else variance
    return torch.native_batch_norm(x, scale, offset, mean, variance, False, 0.0, eps)[0]


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
            result, mean, variance, total = _NormaliseGlobally.apply(x, self.weight, self.bias, self.eps, self.waiting)
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
