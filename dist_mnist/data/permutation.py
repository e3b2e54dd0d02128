"""A keyed permutation of n items, computed for the requested positions: O(positions) time, no list of indices."""

import math
from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np

from dist_mnist.utils.hashing import key_bytes, mix

TABLE = 1 << 12  # largest domain of a round function that is stored as a table, small enough for a core's caches
CACHED = 1 << 13  # positions that pass through the rounds together, few enough for a core's caches


class Permutation:
    """A keyed bijection on range(size), size up to 2^62; a call costs O(positions). The key names its purpose.

    A generalised Feistel network (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002): an item is
    a pair (low, high) in range(a) x range(b). In each of six rounds, each half is shifted by a random function of the
    other. Such a permutation is indistinguishable from a random one (Patarin, "Security of Random Feistel Schemes with
    5 or More Rounds", CRYPTO 2004). The functions are hashes; on small domains they are stored as tables, for speed.
    """

    def __init__(self, size: int, *key: object):
        self.size = size
        root = max(8, math.isqrt(max(size - 1, 0)) + 1)  # on fewer than 64 items, six rounds are visibly not uniform
        self._a = min(range(root, root + 64), key=lambda a: -size % a)  # a divisor of size needs no cycle walking
        self._b = max(8, -(-size // self._a))
        low_and_high_keys = np.frombuffer(key_bytes(*key), "<i8")[:6].reshape(3, 2)
        self._rounds = [
            (_periodic(_shifts(of_low, self._a), self._b), _periodic(_shifts(of_high, self._b), self._a))
            for of_low, of_high in low_and_high_keys
        ]
        self._low, self._high = _periodic(lambda low: low, self._a), _periodic(lambda high: high * self._a, self._b)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Map positions (int64, each in range(size)) to distinct items (int64, each in range(size)).

        Raises:
            IndexError: a position is outside the range.
        """
        positions = np.asarray(positions, np.int64)
        if positions.size and positions.view(np.uint64).max() >= self.size:  # as uint64, negative ones are huge
            raise IndexError(f"positions must be in range({self.size})")
        items = np.empty_like(positions)
        for start in range(0, len(positions), CACHED):
            items[start : start + CACHED] = self._shuffle(positions[start : start + CACHED])
        while self._a * self._b > self.size and (outside := np.flatnonzero(items >= self.size)).size:
            items[outside] = self._shuffle(items[outside])  # cycle walking: again, until it is in the range
        return items

    def _shuffle(self, values: np.ndarray) -> np.ndarray:
        high = values // self._a
        low = values - high * self._a
        for shifts_of_low, shifts_of_high in self._rounds:  # sums are not reduced modulo a and b: see _periodic
            low += shifts_of_low(high)
            high += shifts_of_high(low)
        return self._high(high) + self._low(low)


Function = Callable[[np.ndarray], np.ndarray]  # of int64s, element by element


def _shifts(key: np.int64, modulus: int) -> Function:
    """Return a random function to range(modulus)."""
    return lambda values: _modulo(mix(values ^ key), modulus)


def _periodic(function: Function, period: int) -> Function:
    """Extend a function on range(period) to range(4 * period), the range of a number plus three shifts."""
    if period > TABLE:
        return lambda values: function(_modulo(values, period))
    return partial(np.concatenate([function(np.arange(period))] * 4).take, mode="clip")


def _modulo(values: np.ndarray, modulus: int) -> np.ndarray:
    """Return values % modulus, several times faster than numpy's operator."""
    return values - values // modulus * modulus


@lru_cache(maxsize=8)
def permutation_of_epoch(size: int, purpose: str, seed: int, epoch: int) -> Permutation:
    """Return an epoch's permutation for a purpose, such as its order; the last few are cached."""
    return Permutation(size, purpose, seed, epoch)
