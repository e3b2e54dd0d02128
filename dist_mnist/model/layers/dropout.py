"""Dropout keyed by sample: a sample's units drop in the same way on any rank, in any microbatch and after a restart.

torch's layers draw from one generator per process, so that their masks depend on all earlier draws of that process.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn

from dist_mnist.model.stateless_rng import fold_in, keep_mask, key_of

SELU_FLOOR = -1.7580993408473766  # -scale * alpha of SELU, the value of units that AlphaDropout drops


class _Keys:
    """The keys of a forward pass; each call of a dropout layer uses the next stream of random numbers."""

    def __init__(self, keys: torch.Tensor):
        self.keys, self.calls = keys, 0  # (B,) int64

    def keep(self, shape: torch.Size, drop: float) -> torch.Tensor:
        """Return a mask of `shape`, which may have several rows per sample, from a stream for this call alone.

        The first call's stream uses the keys of the pass directly.
        """
        self.calls += 1
        keys = self.keys if self.calls == 1 else fold_in(key_of("dropout", self.calls), self.keys)
        return keep_mask(keys, shape.numel() // len(keys), drop).reshape(shape)


_current: ContextVar[_Keys | None] = ContextVar("current", default=None)


@contextmanager
def dropout_keys(keys: torch.Tensor | None) -> Iterator[None]:
    """Give dropout layers the samples' keys (B,) int64, for a `with` block of one forward pass.

    With None they draw from torch's generator.
    """
    token = _current.set(None if keys is None else _Keys(keys))
    try:
        yield
    finally:
        _current.reset(token)


def _keys_for(x: torch.Tensor) -> _Keys | None:
    """Return the keys for x, if there are any and x has the same number of rows for each."""
    current = _current.get()
    return current if current and len(current.keys) and len(x) % len(current.keys) == 0 else None


class _Keyed(nn.modules.dropout._DropoutNd):
    """Base of keyed dropout layers. An input's first axis holds the samples, or several rows for each."""

    whole_channels = False  # whether channels drop, not units

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (current := _keys_for(x)) is None or not self.training or self.p == 0:
            return super().forward(x)
        drop = round(self.p * 2**16) / 2**16
        shape = x.shape[:2] + (1,) * (x.dim() - 2) if self.whole_channels else x.shape
        return self.dropped(x, current.keep(shape, drop), drop)

    def dropped(self, x: torch.Tensor, keep: torch.Tensor, drop: float) -> torch.Tensor:
        """Return x with its dropped units set to zero, scaled to keep the expected value."""
        return x * keep / (1 - drop) if drop < 1 else x * 0  # masked_fill takes twice as long on CPUs


class _KeyedAlpha(_Keyed):
    def dropped(self, x: torch.Tensor, keep: torch.Tensor, drop: float) -> torch.Tensor:
        """Keep mean and variance: Klambauer et al., "Self-Normalizing Neural Networks", NeurIPS 2017."""
        if drop == 1:
            return x * 0
        scale = ((1 - drop) * (1 + drop * SELU_FLOOR**2)) ** -0.5
        return scale * (torch.where(keep, x, SELU_FLOOR) - drop * SELU_FLOOR)


class KeyedDropout(_Keyed, nn.Dropout):
    """nn.Dropout keyed by sample; probabilities are rounded to the nearest 2^-16."""


class _KeyedDropout1d(_Keyed, nn.Dropout1d):
    whole_channels = True


class _KeyedDropout2d(_Keyed, nn.Dropout2d):
    whole_channels = True


class _KeyedDropout3d(_Keyed, nn.Dropout3d):
    whole_channels = True


class _KeyedAlphaDropout(_KeyedAlpha, nn.AlphaDropout):
    pass


class _KeyedFeatureAlphaDropout(_KeyedAlpha, nn.FeatureAlphaDropout):
    whole_channels = True


class _KeyedPath(nn.Module):
    """Base of keyed stochastic depth layers, which drop a branch of the network for a sample."""

    p: float  # in torchvision
    drop_prob: float  # in timm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rate = self.drop_prob if hasattr(self, "drop_prob") else self.p
        drop = round(rate * 2**16) / 2**16
        by_batch = getattr(self, "mode", "row") != "row"
        if (current := _keys_for(x)) is None or not self.training or drop == 0 or by_batch:
            return super().forward(x)
        keep = current.keep(torch.Size([len(x), *[1] * (x.dim() - 1)]), drop)
        return x * keep / (1 - drop if drop < 1 and getattr(self, "scale_by_keep", True) else 1)


KEYED = _Keyed | _KeyedPath  # for isinstance


def _keyed_kind(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the keyed class for a layer's class; for other layers, the class itself."""
    if kind not in _KEYED and (kind.__module__.partition(".")[0], kind.__name__) in _PATHS:
        _KEYED[kind] = type(f"_Keyed{kind.__name__}", (_KeyedPath, kind), {})
    return _KEYED.get(kind, kind)


_PATHS = {("timm", "DropPath"), ("torchvision", "StochasticDepth")}
_KEYED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Dropout: KeyedDropout,
    nn.Dropout1d: _KeyedDropout1d,
    nn.Dropout2d: _KeyedDropout2d,
    nn.Dropout3d: _KeyedDropout3d,
    nn.AlphaDropout: _KeyedAlphaDropout,
    nn.FeatureAlphaDropout: _KeyedFeatureAlphaDropout,
}


def key_dropout(model: nn.Module) -> None:
    """Replace the dropout layers of `model` by keyed ones, in place."""
    for layer in model.modules():
        layer.__class__ = _keyed_kind(type(layer))
