"""Dropout by random numbers of each sample's own key: the same units drop in any part of a batch, and after a restart.

torch's layers draw from one generator, so that what drops depends on how much was drawn before, by this process alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn

from dist_mnist.model.stateless_rng import fold_in, keep_mask, key_of

SELU_FLOOR = -1.7580993408473766  # -scale * alpha of SELU, to which AlphaDropout sets what it drops


class _Keys:
    """The keys of a forward pass; each dropout layer that is called takes the next stream of random numbers."""

    def __init__(self, keys: torch.Tensor):
        self.keys, self.calls = keys, 0  # (B,) int64

    def keep(self, shape: torch.Size, drop: float) -> torch.Tensor:
        """What to keep of as many rows for each sample as `shape` has; of random numbers that no other call has.

        Those of the first call are of the pass's own keys.
        """
        self.calls += 1
        keys = self.keys if self.calls == 1 else fold_in(key_of("dropout", self.calls), self.keys)
        return keep_mask(keys, shape.numel() // len(keys), drop).reshape(shape)


_current: ContextVar[_Keys | None] = ContextVar("current", default=None)


@contextmanager
def dropout_keys(keys: torch.Tensor | None) -> Iterator[None]:
    """Let dropout layers in a `with` block, which is one forward pass, use the samples' keys (B,) int64.

    Without keys they draw from torch's generator.
    """
    token = _current.set(None if keys is None else _Keys(keys))
    try:
        yield
    finally:
        _current.reset(token)


def _keys_for(x: torch.Tensor) -> _Keys | None:
    """The keys to use for x, if there are any and it has as many rows for each."""
    current = _current.get()
    return current if current and len(current.keys) and len(x) % len(current.keys) == 0 else None


class _Keyed(nn.modules.dropout._DropoutNd):
    """Of torch's dropout layers, with keys. An input has the samples along its first axis, or several rows for each."""

    whole_channels = False  # whether what drops are channels, not units

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (current := _keys_for(x)) is None or not self.training or self.p == 0:
            return super().forward(x)
        drop = round(self.p * 2**16) / 2**16
        shape = x.shape[:2] + (1,) * (x.dim() - 2) if self.whole_channels else x.shape
        return self.dropped(x, current.keep(shape, drop), drop)

    def dropped(self, x: torch.Tensor, keep: torch.Tensor, drop: float) -> torch.Tensor:
        """What is kept, scaled so that the expected value stays."""
        return x * keep / (1 - drop) if drop < 1 else x * 0  # masked_fill takes twice as long on CPUs


class _KeyedAlpha(_Keyed):
    def dropped(self, x: torch.Tensor, keep: torch.Tensor, drop: float) -> torch.Tensor:
        """Mean and variance stay: Klambauer et al., "Self-Normalizing Neural Networks", NeurIPS 2017."""
        if drop == 1:
            return x * 0
        scale = ((1 - drop) * (1 + drop * SELU_FLOOR**2)) ** -0.5
        return scale * (torch.where(keep, x, SELU_FLOOR) - drop * SELU_FLOOR)


class KeyedDropout(_Keyed, nn.Dropout):
    """nn.Dropout, keyed by sample; probabilities are rounded to the nearest 2^-16."""


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
    """Of libraries' layers that drop a branch of the network for a sample (stochastic depth), with keys."""

    p: float  # of torchvision's
    drop_prob: float  # of timm's

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
    """What a layer of this class is to become: the class itself, if it drops nothing."""
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
    """Turn the dropout layers of `model` into keyed ones, in place."""
    for layer in model.modules():
        layer.__class__ = _keyed_kind(type(layer))
