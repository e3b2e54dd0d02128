"""Hashes as sources of random numbers: keys made of what a number is for, and SplitMix64's finalizer."""

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
    """64 bytes that are a pure function of what they are for, such as `("order", seed, epoch)`."""
    return hashlib.blake2b("/".join(map(str, what)).encode()).digest()


def mix(values: T) -> T:
    """SplitMix64's finalizer, of int64s in an array or a tensor; shifts are made logical by masking the sign's copies.

    Source: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.
    """
    values = (values ^ (values >> 30 & (1 << 34) - 1)) * MULTIPLY_1
    values = (values ^ (values >> 27 & (1 << 37) - 1)) * MULTIPLY_2
    return values ^ (values >> 31 & (1 << 33) - 1)
