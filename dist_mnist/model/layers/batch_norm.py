"""Synchronised batch normalisation over the global batch: one GPU and N GPUs compute the same network.

torch's SyncBatchNorm runs on GPUs only. This one uses torch's operations for one process, so it also runs over gloo on
CPUs, and the ranks' parts of a batch may differ in size or be empty. Each of several microbatches is normalised by its
own statistics. The forward pass does not update the running statistics: `collect_moments` collects its moments, and
one update per step uses those of the whole batch, for all layers together.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from dist_mnist.distributed.collectives import CollectiveTimer, gather_rows


class Moments(NamedTuple):
    """The moments of a layer's input in one forward pass."""

    rows: torch.Tensor | float  # (), the number of values per channel
    mean: torch.Tensor  # (C,)
    rstd: torch.Tensor  # (C,), 1 / sqrt(biased variance + eps)


Seen = dict["GlobalBatchNorm", list[Moments]]


@dataclass(frozen=True)
class _Pass:
    """The state of a forward pass; `counts` says whether its rows are real samples."""

    counts: bool = True
    seen: Seen | None = None


_NOT_COLLECTED = _Pass()
_current: ContextVar[_Pass] = ContextVar("current", default=_NOT_COLLECTED)


class _NormaliseGlobally(torch.autograd.Function):
    """(x - mean) / std * weight + bias, with statistics over the rows of x (B, C, ...) of all ranks that count.

    Forward and backward are collective. The gradients of weight and bias are those of this rank's rows, as usual.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        eps: float,
        counts: bool,
        timer: CollectiveTimer,
    ) -> tuple[torch.Tensor, ...]:
        channels = x.shape[1]
        unused = torch.zeros_like(weight), torch.ones_like(weight)  # only their dtype is used: it computes in it
        local_mean, local_variance = torch.ops.aten.batch_norm_update_stats(x, *unused, 1.0)
        count = torch.full((1,), x.numel() / channels, dtype=weight.dtype, device=x.device)
        row = torch.cat([count, local_mean, local_variance * count])
        with timer:
            rows = gather_rows(row if counts else torch.zeros_like(row))
        of_ranks, means, squares = rows.split([1, channels, channels], dim=1)
        total = of_ranks.sum()
        mean = (of_ranks * means).sum(0) / total
        # Chan, Golub and LeVeque (1979): exact combination of the ranks' squared deviations, without cancellation.
        variance = (squares + of_ranks * (means - mean).square()).sum(0) / total
        rstd = (variance + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, variance, rstd, total)
        ctx.eps, ctx.counts, ctx.timer = eps, counts, timer
        ctx.mark_non_differentiable(mean, rstd, total)
        return _by_channel(x, weight, bias, mean, variance, eps), mean, rstd, total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        x, weight, mean, variance, rstd, total = ctx.saved_tensors
        _, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, variance, mean, rstd, True, ctx.eps, [False, True, True]
        )
        sums = torch.stack([grad_weight, grad_bias])
        with ctx.timer:
            dist.all_reduce(sums)
        # Per channel: weight * rstd * (grad - sum(grad) / total - normal * sum(grad * normal) / total)
        slope, zero, one = weight * rstd, torch.zeros_like(mean), torch.ones_like(mean)
        of_normal, of_one = -slope * sums / total
        if not ctx.counts:  # the statistics do not depend on these rows
            of_normal, of_one = zero, zero
        of_x = _by_channel(x, of_normal, zero, mean, variance, ctx.eps)
        of_x += _by_channel(grad, slope, of_one, zero, one, 0.0)
        return of_x, grad_weight, grad_bias, None, None, None


def _by_channel(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor, eps: float
) -> torch.Tensor:
    """Return (x - mean) / sqrt(variance + eps) * weight + bias in one pass over x (B, C, ...), in its dtype."""
    return torch.native_batch_norm(x, weight, bias, mean, variance, False, 0.0, eps)[0]


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation with the statistics of the global batch, or, without `over_ranks`, of this process's part.

    With `over_ranks` a forward pass in train mode is collective. State dicts are compatible with torch's layers.
    """

    over_ranks: bool
    timer: CollectiveTimer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        current = _current.get()
        rows: torch.Tensor | float
        if self.over_ranks:
            result, mean, rstd, rows = self._normalise_globally(x, current.counts)
        else:
            result, mean, rstd = torch.native_batch_norm(x, self.weight, self.bias, None, None, True, 0.0, self.eps)
            rows = x.numel() / x.shape[1] * current.counts
        if current.seen is not None:
            current.seen.setdefault(self, []).append(Moments(rows, mean.detach(), rstd.detach()))
        return result

    def _normalise_globally(self, x: torch.Tensor, counts: bool) -> tuple[torch.Tensor, ...]:
        """Return the result, mean (C,), rstd (C,) and number of rows (). Collective."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        if self.affine:
            weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        else:
            weight = torch.ones(self.num_features, dtype=dtype, device=x.device)
            bias = torch.zeros_like(weight)
        return _NormaliseGlobally.apply(x, weight, bias, self.eps, counts, self.timer)

    def _check_input_dim(self, x: torch.Tensor) -> None:
        """Accept any number of dimensions from 2."""


class _GlobalBatchNormAct(GlobalBatchNorm):
    """timm's BatchNormAct2d, which contains dropout and an activation, modelled on timm's synchronised layer."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(super().forward(x)))


class RunningStatistics:
    """The running statistics of all layers that track them, updated together by a few operations."""

    def __init__(self, layers: Sequence[GlobalBatchNorm], device: torch.device):
        self.layers = [layer for layer in layers if layer.track_running_stats]
        self.sizes = [layer.num_features for layer in self.layers]
        self.nothing = torch.zeros(3, sum(self.sizes), dtype=torch.float64, device=device)

    def moments(self, seen: Seen) -> torch.Tensor:
        """Return the sums over rows of 1, x and x squared: (3, C) float64, all layers' channels concatenated.

        The sums of a layer that was not called are 0.
        """
        if not any(layer in seen for layer in self.layers):
            return self.nothing.clone()
        passes = [seen.get(layer) or [self._no_rows(layer)] for layer in self.layers]
        each = [one for of in passes for one in of]
        count = torch.cat([self._counts(one) for one in each])
        mean, rstd = (torch.cat(parts).double() for parts in ([one.mean for one in each], [one.rstd for one in each]))
        variance = rstd**-2 - self._eps(passes)
        sums = torch.stack([count, count * mean, count * (variance + mean.square())])
        if len(each) == len(passes):
            return sums
        of_passes = iter(sums.split([len(one.mean) for one in each], dim=1))
        return torch.cat([torch.stack([next(of_passes) for _ in of]).sum(0) for of in passes], dim=1)

    def _no_rows(self, layer: GlobalBatchNorm) -> Moments:
        mean = self.nothing[0, : layer.num_features]
        return Moments(0.0, mean, torch.ones_like(mean))

    def _counts(self, one: Moments) -> torch.Tensor:
        """Return the number of rows for each channel: (C,) float64."""
        if isinstance(one.rows, torch.Tensor):
            return one.rows.double().expand(len(one.mean))
        return self._filled(len(one.mean), one.rows)

    def _eps(self, passes: Sequence[list[Moments]]) -> Any:
        """Return eps: a number, or (C,) float64 if layers differ."""
        if len(every := {layer.eps for layer in self.layers}) == 1:
            return every.pop()
        return torch.cat(
            [
                self._filled(len(one.mean), layer.eps)
                for layer, of in zip(self.layers, passes, strict=True)
                for one in of
            ]
        )

    def _filled(self, channels: int, value: float) -> torch.Tensor:
        """Return (C,) float64, created on the device: the capture of a CUDA graph allows no copies from the host."""
        return torch.full((channels,), value, dtype=torch.float64, device=self.nothing.device)

    @torch.no_grad()
    def update(self, moments: torch.Tensor, wanted: torch.Tensor | bool = True) -> None:
        """Update them by a whole batch's moments, if `wanted`, () bool.

        A single row has no variance and updates nothing.
        """
        if not self.layers:
            return
        torch._foreach_add_([layer.get_buffer("num_batches_tracked") for layer in self.layers], 1)
        count, sums, squares = moments
        mean = sums / count
        variance = (squares / count - mean.square()).clamp(min=0) * (count / (count - 1).clamp(min=1))
        moves, weight = (count > 1) & wanted, self._weight()
        for name, value in (("running_mean", mean), ("running_var", variance)):
            buffers = [layer.get_buffer(name) for layer in self.layers]
            running = torch.cat(buffers)
            moved = torch.where(moves, running.lerp(value.to(running.dtype), weight), running)
            torch._foreach_copy_(buffers, moved.split(self.sizes))

    def _weight(self) -> Any:
        """Return the weight of the new batch in the running statistics: a number, or (C,) if layers differ."""
        momenta = {layer.momentum for layer in self.layers}
        if len(momenta) == 1 and None not in momenta:
            return momenta.pop()
        # With momentum=None, torch's layers keep the mean over all batches.
        of_layers = [
            1 / layer.get_buffer("num_batches_tracked") if layer.momentum is None else layer.momentum
            for layer in self.layers
        ]
        full = [
            torch.as_tensor(weight, dtype=torch.float32, device=self.nothing.device).expand(size)
            for weight, size in zip(of_layers, self.sizes, strict=True)
        ]
        return torch.cat(full)


@contextmanager
def collect_moments(counts: bool = True) -> Iterator[Seen]:
    """Collect the moments of all layers called in a `with` block, by layer, in order of the calls.

    Args:
        counts: False if this process's rows are placeholders because its part of the batch is empty.
    """
    seen: Seen = {}
    token = _current.set(_Pass(counts, seen))
    try:
        yield seen
    finally:
        _current.reset(token)


def synchronise_batch_norm(
    model: nn.Module, over_ranks: bool, timer: CollectiveTimer | None = None
) -> Sequence[GlobalBatchNorm]:
    """Replace the batch normalisation layers of `model` that are in train mode, in place; return the new ones.

    Layers of other classes, including subclasses of torch's, are not changed. The time in collectives is added to
    `timer`.
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
    """Return the class that replaces a batch normalisation layer's; None for other layers."""
    if isinstance(layer, GlobalBatchNorm):
        return type(layer)
    if type(layer) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
        return GlobalBatchNorm
    if type(layer).__name__ == "BatchNormAct2d" and type(layer).__module__.startswith("timm."):
        return _GlobalBatchNormAct
    return None
