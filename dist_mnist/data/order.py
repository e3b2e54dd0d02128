"""The global order of samples and its shards: pure functions of (seed, epoch, position) that hold no list of indices.

A permutation of n items is computed for the positions asked for, by a Feistel network on the next power of two with
cycle walking for the rest (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002), so that a set of
10^9 samples costs no more memory than one of 10^4 and resuming at any position is immediate.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from dist_mnist.errors import UserError

STEPS_AT_ONCE = 32  # how far ahead the sampler computes: enough to hide the cost of a call into numpy


def address_key(*address: object) -> bytes:
    """64 bytes that are a pure function of what they are for, such as `("order", seed, epoch)`."""
    return hashlib.blake2b("/".join(map(str, address)).encode()).digest()


class Permutation:
    """A bijection on range(size) keyed by an address; calling it costs O(positions) in time and memory.

    A size may be up to 2^62. Halves of an item fit 32 bits, in which processors compute several at once.
    """

    def __init__(self, size: int, *address: object):
        self.size = size
        bits = max(6, (size - 1).bit_length())  # on fewer bits, eight rounds are visibly not uniform
        self._low_bits = bits // 2
        self._low_mask = np.uint32((1 << bits // 2) - 1)
        self._high_mask = np.uint32((1 << (bits - bits // 2)) - 1)
        self._round_keys = np.frombuffer(address_key(*address), "<u4")[:8]

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Map positions (int64, each in range(size)) to distinct items (int64, each in range(size)).

        Raises:
            IndexError: a position is outside the range.
        """
        positions = np.asarray(positions, np.int64)
        if positions.size and (positions.min() < 0 or positions.max() >= self.size):
            raise IndexError(f"positions must be in range({self.size})")
        items = self._encrypt(positions)
        while (outside := np.flatnonzero(items >= self.size)).size:  # cycle walking: under one more pass on average
            items[outside] = self._encrypt(items[outside])
        return items

    def _encrypt(self, values: np.ndarray) -> np.ndarray:
        """Eight rounds of an alternating Feistel network: each changes one half by a keyed function of the other."""
        low = values.astype(np.uint32) & self._low_mask
        high = (values >> self._low_bits).astype(np.uint32)
        for even_key, odd_key in self._round_keys.reshape(-1, 2):
            low ^= _hash(high ^ even_key) & self._low_mask
            high ^= _hash(low ^ odd_key) & self._high_mask
        return (high.astype(np.int64) << self._low_bits) | low


def _hash(values: np.ndarray) -> np.ndarray:
    """A hash of each uint32, in place: two rounds of xor-shift and multiply.

    Constants: C. Wellons and T. Ettinger, "hash-prospector", which found them by search for the least bias.
    """
    values ^= values >> np.uint32(16)
    values *= np.uint32(0x21F0AAAD)
    values ^= values >> np.uint32(15)
    values *= np.uint32(0x735A2D97)
    values ^= values >> np.uint32(15)
    return values


def shard(start: int, stop: int, rank: int, world_size: int) -> range:
    """This rank's part of positions [start, stop): contiguous, complete over ranks, equal to within one."""
    size = stop - start
    return range(start + size * rank // world_size, start + size * (rank + 1) // world_size)


@dataclass(frozen=True, kw_only=True)
class GlobalOrder:
    """Which samples make up global batch `step` of a run, for all steps; the same for every world size.

    An epoch is a fresh permutation of range(num_samples), cut into batches of `global_batch_size`; its last, shorter
    batch is used too unless `drop_last`. With `shuffle=False` every epoch is 0, 1, 2, ...: the order for evaluation.
    """

    num_samples: int
    global_batch_size: int
    seed: int = 0
    shuffle: bool = True
    drop_last: bool = False

    def __post_init__(self) -> None:
        if self.num_samples < 1 or self.global_batch_size < 1 or self.steps_per_epoch < 1:
            raise UserError(
                f"a batch size of {self.global_batch_size} cannot be drawn from {self.num_samples} samples"
                f"{' when the last, shorter batch is dropped' if self.drop_last else ''}: give a batch size from 1 to "
                f"{self.num_samples}"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in one epoch."""
        return (self.num_samples + (0 if self.drop_last else self.global_batch_size - 1)) // self.global_batch_size

    @property
    def samples_per_epoch(self) -> int:
        """Samples used in one epoch: all of them, unless the last, shorter batch is dropped."""
        return min(self.num_samples, self.steps_per_epoch * self.global_batch_size)

    def epoch(self, step: int) -> int:
        """The epoch that global batch `step` belongs to."""
        return step // self.steps_per_epoch

    def bounds(self, step: int) -> tuple[int, int]:
        """Start and stop of global batch `step` among the positions of its epoch."""
        start = step % self.steps_per_epoch * self.global_batch_size
        return start, min(start + self.global_batch_size, self.num_samples)

    def batch_size(self, step: int) -> int:
        """Samples in global batch `step`, over all ranks."""
        start, stop = self.bounds(step)
        return stop - start

    def part(self, step: int, rank: int, world_size: int) -> range:
        """This rank's part of global batch `step`, as positions of its epoch."""
        return shard(*self.bounds(step), rank, world_size)

    def ids(self, steps: range, rank: int = 0, world_size: int = 1) -> list[np.ndarray]:
        """Sample ids (int64) of this rank's part of each global batch of `steps`; with the defaults, of whole batches.

        Several steps cost little more than one: neighbours of one epoch go through the permutation together.
        """
        parts = [self.part(step, rank, world_size) for step in steps]
        positions = [np.arange(part.start, part.stop) for part in parts]
        if not self.shuffle:
            return positions
        ids: list[np.ndarray] = []
        for epoch, group in groupby(zip(steps, positions, strict=True), key=lambda pair: self.epoch(pair[0])):
            ids += self._permute(epoch, [positions for _, positions in group])
        return ids

    def dropped(self, epoch: int) -> np.ndarray:
        """Ids (int64) of the samples that an epoch leaves out: those of its last, shorter batch where it is dropped."""
        positions = np.arange(self.samples_per_epoch, self.num_samples)
        return self._permute(epoch, [positions])[0] if self.shuffle else positions

    def _permute(self, epoch: int, positions: list[np.ndarray]) -> list[np.ndarray]:
        permutation = Permutation(self.num_samples, "order", self.seed, epoch)
        lengths = [len(part) for part in positions]
        return np.split(permutation(np.concatenate(positions)), np.cumsum(lengths)[:-1])


class ShardedBatchSampler:
    """Yields this rank's sample ids (int64 array) for each of `steps`; a `batch_sampler` for torch's DataLoader.

    With `address`, a function from a list of batches of ids to as many addresses, it yields these instead: what can be
    looked up for many batches at once is cheaper than batch by batch.
    """

    def __init__(
        self,
        order: GlobalOrder,
        steps: range,
        rank: int = 0,
        world_size: int = 1,
        address: Callable[[list[np.ndarray]], list] = list,
    ):
        self.order, self.steps, self.rank, self.world_size, self.address = order, steps, rank, world_size, address

    def __len__(self) -> int:
        return len(self.steps)

    def sizes(self) -> Iterator[int]:
        """How many samples each batch has."""
        return (len(self.order.part(step, self.rank, self.world_size)) for step in self.steps)

    def largest(self) -> int:
        """The most samples that a batch can have."""
        return -(-self.order.global_batch_size // self.world_size)

    def __iter__(self) -> Iterator:
        for first in range(self.steps.start, self.steps.stop, STEPS_AT_ONCE):
            steps = range(first, min(first + STEPS_AT_ONCE, self.steps.stop))
            yield from self.address(self.order.ids(steps, self.rank, self.world_size))
