"""Counter-based (stateless) random numbers: each is a pure function of a key, not of how many were drawn before.

A sample's stream in an epoch is SplitMix64 (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number Generators",
OOPSLA 2014) from a key made of (purpose, seed, epoch, sample id). So augmentation and dropout are the same for any
number of ranks and parts of a batch, and after any restart, without a generator's state.
"""

import torch

from dist_mnist.utils.hashing import GOLDEN, key_bytes, mix


def key_of(*what: object) -> int:
    """A key (int64) for what a draw is for, such as `("dropout", seed, epoch)`."""
    return int.from_bytes(key_bytes(*what)[:8], "little", signed=True)


def fold_in(base: int | torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """One key for each sample: (B,) int64 from the key of a purpose and sample ids (B,) int64.

    Of the keys of K purposes (K,) and ids (B, 1) they are (B, K).
    """
    return mix(ids * GOLDEN ^ base)


def uniform(keys: torch.Tensor, count: int) -> torch.Tensor:
    """Numbers in [0, 1) from each sample's stream: (B,) keys to (B, count) float32."""
    return _stream(keys, count).bitwise_right_shift_(40).bitwise_and_(0xFFFFFF).float() * 2**-24


def keep_mask(keys: torch.Tensor, count: int, drop: float) -> torch.Tensor:
    """True where a unit is kept: (B,) keys to (B, count) bool, False with probability `drop` to the nearest 2^-16."""
    return _short_draws(keys, count) >= round(drop * 2**16) - 2**15


def noise(keys: torch.Tensor, count: int) -> torch.Tensor:
    """Numbers in [0, 1) of 16 bits, for pixels: (B,) keys to (B, count) float32."""
    return (_short_draws(keys, count).float() + 2**15) * 2**-16


def _short_draws(keys: torch.Tensor, count: int) -> torch.Tensor:
    """(B, count) int16 from each key's stream: four from each 64-bit draw."""
    return _stream(keys, -(-count // 4)).view(torch.int16)[:, :count]


def _stream(keys: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` outputs of each key's SplitMix64 generator: (B, count) int64."""
    counters = torch.arange(1, count + 1, device=keys.device) * GOLDEN
    return mix(keys[:, None] + counters)
