"""Counter-based (stateless) random numbers: each is a pure function of a key and a counter.

A sample's stream in an epoch is SplitMix64 (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number Generators",
OOPSLA 2014), keyed by (purpose, seed, epoch, sample id). So augmentation and dropout are the same for any number of
ranks and microbatches, and after any restart; no generator state is saved.
"""

import torch

from dist_mnist.utils.hashing import GOLDEN, key_bytes, mix


def key_of(*what: object) -> int:
    """Return the key (int64) of a purpose, such as `("dropout", seed, epoch)`."""
    return int.from_bytes(key_bytes(*what)[:8], "little", signed=True)


def fold_in(base: int | torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return a key for each sample: (B,) int64 from a purpose's key and sample ids (B,) int64.

    Keys (K,) of K purposes and ids (B, 1) give (B, K).
    """
    return mix(ids * GOLDEN ^ base)


def uniform(keys: torch.Tensor, count: int) -> torch.Tensor:
    """Return uniform numbers in [0, 1) from each key's stream: keys (B,) to (B, count) float32."""
    return _stream(keys, count).bitwise_right_shift_(40).bitwise_and_(0xFFFFFF).float() * 2**-24


def keep_mask(keys: torch.Tensor, count: int, drop: float) -> torch.Tensor:
    """Return a dropout mask: keys (B,) to (B, count) bool, False with probability `drop`, to the nearest 2^-16."""
    return _short_draws(keys, count) >= round(drop * 2**16) - 2**15


def noise(keys: torch.Tensor, count: int) -> torch.Tensor:
    """Return uniform 16-bit numbers in [0, 1), for pixels: keys (B,) to (B, count) float32."""
    return (_short_draws(keys, count).float() + 2**15) * 2**-16


def _short_draws(keys: torch.Tensor, count: int) -> torch.Tensor:
    """Return (B, count) int16 from each key's stream, four from each 64-bit output."""
    return _stream(keys, -(-count // 4)).view(torch.int16)[:, :count]


def _stream(keys: torch.Tensor, count: int) -> torch.Tensor:
    """Return the first `count` outputs of each key's SplitMix64 generator: (B, count) int64."""
    counters = torch.arange(1, count + 1, device=keys.device) * GOLDEN
    return mix(keys[:, None] + counters)
