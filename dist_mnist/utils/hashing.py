"""Hashes for counter-based random numbers: keys from a purpose, and SplitMix64's finalizer."""

import hashlib
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch

GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64; products and sums wrap around
MULTIPLY_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
MULTIPLY_2 = -7723592293110705685  # 0x94D049BB133111EB
T = TypeVar("T", np.ndarray, "torch.Tensor")


def key_bytes(*what: object) -> bytes:
    """Return 64 bytes, a pure function of a purpose such as `("order", seed, epoch)`."""
    return hashlib.blake2b("/".join(map(str, what)).encode()).digest()


def mix(values: T) -> T:
    """Apply SplitMix64's finalizer to an int64 array or tensor; masking the sign bits makes the shifts logical.

    Source: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.
    """
    values = (values ^ (values >> 30 & (1 << 34) - 1)) * MULTIPLY_1
    values = (values ^ (values >> 27 & (1 << 37) - 1)) * MULTIPLY_2
    return values ^ (values >> 31 & (1 << 33) - 1)
