"""Synchronised batch normalisation over the global batch: one GPU and N GPUs compute the same network.

torch's SyncBatchNorm runs on GPUs alone; this one is plain tensor operations, so it also runs over gloo on CPUs, and
the ranks' parts of a batch may differ in size and be empty. Where a batch is taken in several microbatches, each is
normalised by its own statistics. The running statistics do not move in the forward pass: that gives the moments of what
it has seen to whoever collects them, and they move once a step, by the moments of the whole batch.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dist_mnist.distributed.collectives import CollectiveTimer, gather_rows

# By layer, the moments of one forward pass: (3, C) float64 sums of 1, x and x squared.
Moments = dict["GlobalBatchNorm", torch.Tensor]


@dataclass(frozen=True)
class _Pass:
    """A forward pass, and whether its rows count."""

    counts: bool = True
    moments: Moments | None = None


_NOBODY_ASKS = _Pass()
_current: ContextVar[_Pass] = ContextVar("current", default=_NOBODY_ASKS)


class _NormaliseGlobally(torch.autograd.Function):
    """(x - mean) * rstd, the statistics over all ranks' rows of x (B, C, ...) that count. Collective, both ways."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, eps: float, counts: bool, timer: CollectiveTimer
    ) -> tuple[torch.Tensor, ...]:
        axes = [axis for axis in range(x.dim()) if axis != 1]
        values = x.float()
        count = torch.full((1,), x.numel() / x.shape[1], device=x.device)
        local_mean = values.sum(axes) / count.clamp(min=1)
        local_squares = (values - _like(local_mean, x)).square().sum(axes)
        row = torch.cat([count, local_mean, local_squares])
        with timer:
            rows = gather_rows(row if counts else torch.zeros_like(row))
        of_ranks, means, squares = rows.split([1, x.shape[1], x.shape[1]], dim=1)
        total = of_ranks.sum()
        mean = (of_ranks * means).sum(0) / total
        # Chan, Golub and LeVeque (1979): exact combination of the parts' squared deviations, without cancellation.
        variance = (squares + of_ranks * (means - mean).square()).sum(0) / total
        rstd = (variance + eps).rsqrt()
        normal = (values - _like(mean, x)) * _like(rstd, x)
        ctx.save_for_backward(normal, rstd, total)
        ctx.counts, ctx.timer = counts, timer
        ctx.mark_non_differentiable(mean, variance, total)
        return normal, mean, variance, total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor, None, None, None]:
        normal, rstd, total = ctx.saved_tensors
        axes = [axis for axis in range(grad.dim()) if axis != 1]
        sums = torch.cat([grad.sum(axes), (grad * normal).sum(axes)])
        with ctx.timer:
            dist.all_reduce(sums)
        grad_mean, grad_normal = (sums / total).chunk(2)
        if ctx.counts:  # else the statistics do not depend on these rows
            grad = grad - _like(grad_mean, grad) - normal * _like(grad_normal, grad)
        return _like(rstd, grad) * grad, None, None, None


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """A batch normalisation layer of torch's with the statistics of the global batch, or of this process's part alone.

    In training it must be called on every rank (it is collective if `over_ranks`). State dicts are those of torch's
    layers.
    """

    over_ranks: bool
    timer: CollectiveTimer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        current = _current.get()
        if self.over_ranks:
            normal, mean, variance, total = _NormaliseGlobally.apply(x, self.eps, current.counts, self.timer)
            if self.affine:
                normal = normal * _like(self.weight, x) + _like(self.bias, x)
            result = normal.to(x.dtype)
        else:
            result, mean, rstd = torch.native_batch_norm(x, self.weight, self.bias, None, None, True, 0.0, self.eps)
            variance = rstd.detach().double() ** -2 - self.eps
            total = torch.full((), x.numel() / x.shape[1] * current.counts, device=x.device)
        if current.moments is not None:
            mean, total = mean.detach().double(), total.double()
            moments = torch.stack([total.expand_as(mean), total * mean, total * (variance + mean.square())])
            earlier = current.moments.get(self)
            current.moments[self] = moments if earlier is None else earlier + moments
        return result

    def no_moments(self, device: torch.device) -> torch.Tensor:
        """The moments of no rows, (3, C) float64."""
        return torch.zeros(3, self.num_features, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update_running_statistics(self, moments: torch.Tensor, wanted: torch.Tensor | bool = True) -> None:
        """Move the running statistics, if there are any, by a whole batch's (3, C) moments, if `wanted`.

        A single row says nothing of the variance, and moves nothing.
        """
        if not self.track_running_stats:
            return
        self.get_buffer("num_batches_tracked").add_(1)
        total, sums, squares = moments
        mean = sums / total
        variance = (squares / total - mean.square()).clamp(min=0) * (total / (total - 1).clamp(min=1))
        moves = (total > 1) & wanted
        # Without a momentum, torch's layers keep the mean over all batches.
        weight = 1 / self.get_buffer("num_batches_tracked") if self.momentum is None else self.momentum
        for name, value in (("running_mean", mean), ("running_var", variance)):
            running: torch.Tensor = getattr(self, name)
            running.copy_(torch.where(moves, running.lerp(value.float(), weight), running))

    def _check_input_dim(self, x: torch.Tensor) -> None:
        """Any number of dimensions from 2 will do."""


class _GlobalBatchNormAct(GlobalBatchNorm):
    """timm's BatchNormAct2d, which has dropout and an activation inside, made as its own synchronised layer is."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(super().forward(x)))


@contextmanager
def collect_moments(counts: bool = True) -> Iterator[Moments]:
    """The moments that the layers called in a `with` block give, by layer; a layer called twice gives their sum.

    If this process's rows are there only because its part of the batch is empty, they do not count.
    """
    moments: Moments = {}
    token = _current.set(_Pass(counts, moments))
    try:
        yield moments
    finally:
        _current.reset(token)


def synchronise_batch_norm(
    model: nn.Module, over_ranks: bool, timer: CollectiveTimer | None = None
) -> Sequence[GlobalBatchNorm]:
    """Turn the batch normalisation layers of `model` into such ones, in place; those that train are returned.

    Layers of other classes, and such as are derived from torch's, are left as they are. Their time in collectives is
    added to `timer`.
    """
    layers: list[GlobalBatchNorm] = []
    for layer in model.modules():
        if (kind := _global_kind(layer)) and layer.training:
            layer.__class__ = kind
            assert isinstance(layer, GlobalBatchNorm)
            layer.over_ranks, layer.timer = over_ranks, timer or CollectiveTimer()
            layers.append(layer)
    return layers


def _global_kind(layer: nn.Module) -> type[GlobalBatchNorm] | None:
    """What a layer is to become, if it is batch normalisation."""
    if isinstance(layer, GlobalBatchNorm):
        return type(layer)
    if type(layer) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
        return GlobalBatchNorm
    if type(layer).__name__ == "BatchNormAct2d" and type(layer).__module__.startswith("timm."):
        return _GlobalBatchNormAct
    return None


def _like(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(C,) as (1, C, 1, ...) to go with x (B, C, ...)."""
    return values.reshape(1, -1, *[1] * (x.dim() - 2))
