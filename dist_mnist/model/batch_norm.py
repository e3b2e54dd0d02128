"""Synchronised batch normalisation over the global batch: one GPU and N GPUs compute the same network.

torch's SyncBatchNorm runs on GPUs alone; this one is plain tensor operations, so it also runs over gloo on CPUs, and
the ranks' parts of a batch may differ in size and be empty. Where a batch is taken in several microbatches, each is
normalised by its own statistics. The running statistics do not move in the forward pass: that gives the moments of what
it has seen to whoever collects them, and they move once a step, by the moments of the whole batch.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dist_mnist.distributed.collectives import CollectiveTimer, gather_rows

# By layer, the moments of one forward pass: (3, C) float64 sums of 1, x and x squared.
Moments = dict["GlobalBatchNorm", torch.Tensor]
_collecting: ContextVar[Moments | None] = ContextVar("collecting", default=None)


class _NormaliseGlobally(torch.autograd.Function):
    """(x - mean) * rstd, the statistics over all ranks' rows of x (B, C, ...). Collective, in both directions."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, eps: float, timer: CollectiveTimer) -> tuple[torch.Tensor, ...]:
        axes = [axis for axis in range(x.dim()) if axis != 1]
        values = x.float()
        count = torch.full((1,), x.numel() / x.shape[1], device=x.device)
        local_mean = values.sum(axes) / count.clamp(min=1)
        local_squares = (values - _like(local_mean, x)).square().sum(axes)
        with timer:
            rows = gather_rows(torch.cat([count, local_mean, local_squares]))
        counts, means, squares = rows.split([1, x.shape[1], x.shape[1]], dim=1)
        total = counts.sum()
        mean = (counts * means).sum(0) / total
        # Chan, Golub and LeVeque (1979): exact combination of the parts' squared deviations, without cancellation.
        variance = (squares + counts * (means - mean).square()).sum(0) / total
        rstd = (variance + eps).rsqrt()
        normal = (values - _like(mean, x)) * _like(rstd, x)
        ctx.save_for_backward(normal, rstd, total)
        ctx.timer = timer
        ctx.mark_non_differentiable(mean, variance, total)
        return normal, mean, variance, total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor, None, None]:
        normal, rstd, total = ctx.saved_tensors
        axes = [axis for axis in range(grad.dim()) if axis != 1]
        sums = torch.cat([grad.sum(axes), (grad * normal).sum(axes)])
        with ctx.timer:
            dist.all_reduce(sums)
        grad_mean, grad_normal = (sums / total).chunk(2)
        return _like(rstd, grad) * (grad - _like(grad_mean, grad) - normal * _like(grad_normal, grad)), None, None


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """nn.BatchNorm1d or 2d with the statistics of the global batch, or of this process's part of it alone.

    In training it must be called on every rank (it is collective if `over_ranks`), with an empty part too. State dicts
    are those of torch's layers.
    """

    over_ranks: bool
    timer: CollectiveTimer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        if self.over_ranks:
            normal, mean, variance, total = _NormaliseGlobally.apply(x, self.eps, self.timer)
            result = (normal * _like(self.weight, x) + _like(self.bias, x)).to(x.dtype)
        else:
            result, mean, rstd = torch.native_batch_norm(x, self.weight, self.bias, None, None, True, 0.0, self.eps)
            variance = rstd.detach().double() ** -2 - self.eps
            total = torch.full((), x.numel() / x.shape[1], device=x.device)
        if (collected := _collecting.get()) is not None:
            mean, total = mean.detach().double(), total.double()
            moments = torch.stack([total.expand_as(mean), total * mean, total * (variance + mean.square())])
            collected[self] = collected[self] + moments if self in collected else moments
        return result

    def no_moments(self) -> torch.Tensor:
        """The moments of no rows, (3, C) float64."""
        return torch.zeros(3, self.num_features, dtype=torch.float64, device=self.weight.device)

    @torch.no_grad()
    def update_running_statistics(self, moments: torch.Tensor, wanted: torch.Tensor | bool = True) -> None:
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

    def _check_input_dim(self, x: torch.Tensor) -> None:
        """Any number of dimensions from 2 will do."""


@contextmanager
def collect_moments() -> Iterator[Moments]:
    """The moments that the layers called in a `with` block give, by layer; a layer called twice gives their sum."""
    moments: Moments = {}
    token = _collecting.set(moments)
    try:
        yield moments
    finally:
        _collecting.reset(token)


def synchronise_batch_norm(
    model: nn.Module, over_ranks: bool, timer: CollectiveTimer | None = None
) -> Sequence[GlobalBatchNorm]:
    """Turn the batch normalisation layers of `model` into such ones, in place; they are returned.

    Their time in collectives is added to `timer`.
    """
    layers: list[GlobalBatchNorm] = []
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.__class__ = GlobalBatchNorm  # type: ignore[assignment]
            assert isinstance(layer, GlobalBatchNorm)
            layer.over_ranks, layer.timer = over_ranks, timer or CollectiveTimer()
            layers.append(layer)
    return layers


def _like(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(C,) as (1, C, 1, ...) to go with x (B, C, ...)."""
    return values.reshape(1, -1, *[1] * (x.dim() - 2))
