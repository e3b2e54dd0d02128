"""The global order of samples and its shards: pure functions of (seed, epoch, position), without a list of indices.

Permutations are computed for the requested positions: a dataset of 10^9 samples needs no more memory than one of 10^4,
and resuming at any position is immediate.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dist_mnist.data.permutation import permutation_of_epoch
from dist_mnist.utils.errors import UserError

POSITIONS_AT_ONCE = 1 << 16  # positions permuted together, enough to make numpy's call overhead negligible


def shard(start: int, stop: int, rank: int, world_size: int) -> range:
    """Return this rank's part of positions [start, stop): contiguous, complete over ranks, sizes equal to within 1."""
    size = stop - start
    return range(start + size * rank // world_size, start + size * (rank + 1) // world_size)


@dataclass(frozen=True, kw_only=True)
class GlobalOrder:
    """The samples of each global batch `step` of a run, the same for every world size.

    An epoch is a fresh permutation of range(num_samples), cut into batches.

    Args:
        num_samples: size of the dataset.
        global_batch_size: samples per step, over all ranks.
        seed: key of the permutations.
        shuffle: if False, every epoch is 0, 1, 2, ...: the order for evaluation.
        drop_last: whether to drop the last batch of an epoch if it is shorter.
        partners: whether to pair each sample with another, as mixup needs. Pairs come from a second permutation of the
            epoch: each sample is a partner exactly once, and pairs do not depend on batches or ranks.

    Raises:
        UserError: the batch size is below 1 or leaves no step per epoch.

    Example:
        >>> from dist_mnist import GlobalOrder
        >>> order = GlobalOrder(num_samples=10, global_batch_size=4, seed=0)
        >>> [ids.tolist() for ids in order.ids(range(order.steps_per_epoch))]
        [[7, 2, 5, 1], [6, 3, 9, 8], [4, 0]]
        >>> [order.ids(range(1), rank, 2)[0].tolist() for rank in (0, 1)]  # the first batch on two ranks
        [[7, 2], [5, 1]]
    """

    num_samples: int
    global_batch_size: int
    seed: int = 0
    shuffle: bool = True
    drop_last: bool = False
    partners: bool = False

    def __post_init__(self) -> None:
        if self.num_samples < 1 or self.global_batch_size < 1 or self.steps_per_epoch < 1:
            raise UserError(
                f"{self.num_samples} samples do not make a batch of {self.global_batch_size}"
                f"{' when the last, shorter batch is dropped' if self.drop_last else ''}: give a batch size from 1 to "
                f"{self.num_samples}"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Number of global batches in one epoch."""
        return (self.num_samples + (0 if self.drop_last else self.global_batch_size - 1)) // self.global_batch_size

    @property
    def samples_per_epoch(self) -> int:
        """Number of samples used in one epoch: all, unless the last, shorter batch is dropped."""
        return min(self.num_samples, self.steps_per_epoch * self.global_batch_size)

    def epoch(self, step: int) -> int:
        """Return the epoch of global batch `step`."""
        return step // self.steps_per_epoch

    def bounds(self, step: int) -> tuple[int, int]:
        """Return start and stop of global batch `step`, as positions in its epoch."""
        start = step % self.steps_per_epoch * self.global_batch_size
        return start, min(start + self.global_batch_size, self.num_samples)

    def batch_size(self, step: int) -> int:
        """Return the number of samples in global batch `step`, over all ranks."""
        start, stop = self.bounds(step)
        return stop - start

    def part(self, step: int, rank: int, world_size: int) -> range:
        """Return this rank's part of global batch `step`, as positions in its epoch."""
        return shard(*self.bounds(step), rank, world_size)

    def ids(self, steps: range, rank: int = 0, world_size: int = 1) -> list[np.ndarray]:
        """Return the sample ids (int64) of this rank's part of each global batch in `steps`."""
        return [self.ids_together(range(step, step + 1), rank, world_size) for step in steps]

    def sizes(self, steps: range, rank: int = 0, world_size: int = 1) -> list[int]:
        """Return the size of this rank's part of each global batch, for steps of one epoch."""
        first, last = (len(self.part(step, rank, world_size)) for step in (steps[0], steps[-1]))
        return [first] * (len(steps) - 1) + [last]  # only an epoch's last batch may be shorter than the others

    def ids_together(self, steps: range, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """Return the ids of several steps of one epoch in one array (n,); many steps cost little more than one."""
        first, last = (self.part(step, rank, world_size) for step in (steps[0], steps[-1]))
        if world_size == 1:  # successive batches are adjacent
            return self._permute(steps[0], np.arange(first.start, last.stop))
        starts = first.start + self.global_batch_size * np.arange(len(steps) - 1)
        others = (starts[:, np.newaxis] + np.arange(len(first))).ravel()
        return self._permute(steps[0], np.concatenate([others, np.arange(last.start, last.stop)]))

    def dropped(self, epoch: int) -> np.ndarray:
        """Return the ids (int64) of the samples that an epoch drops with its last, shorter batch."""
        return self._permute(epoch * self.steps_per_epoch, np.arange(self.samples_per_epoch, self.num_samples))

    def _permute(self, step: int, positions: np.ndarray) -> np.ndarray:
        if not self.shuffle:
            return positions
        return permutation_of_epoch(self.num_samples, "order", self.seed, self.epoch(step))(positions)

    def partners_of(self, ids: np.ndarray, epoch: int) -> np.ndarray:
        """Return the ids of the partners of samples (n,) in an epoch."""
        return permutation_of_epoch(self.num_samples, "partner", self.seed, epoch)(ids)


class ShardedBatchSampler:
    """Iterates over this rank's sample ids (int64 array) for each of `steps`; a `batch_sampler` for torch's DataLoader.

    If samples have partners, the ids of a batch are followed by those of the partners.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> from dist_mnist import GlobalOrder, ShardedBatchSampler, collate, open_data
        >>> data = open_data("data/mnist")
        >>> order = GlobalOrder(num_samples=len(data.train), global_batch_size=250, seed=0)
        >>> sampler = ShardedBatchSampler(order, range(3), rank=0, world_size=2)
        >>> [len(batch.ids) for batch in DataLoader(data.train, batch_sampler=sampler, collate_fn=collate)]
        [125, 125, 50]
    """

    def __init__(self, order: GlobalOrder, steps: range, rank: int = 0, world_size: int = 1):
        self.order, self.steps, self.rank, self.world_size = order, steps, rank, world_size

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[np.ndarray]:
        for sizes, ids in self.blocks():
            yield from np.split(ids, np.cumsum(sizes)[:-1])

    def blocks(self) -> Iterator[tuple[list[int], np.ndarray]]:
        """Yield the sizes of several batches of an epoch, and their ids in one array (n,)."""
        order, per_epoch = self.order, self.order.steps_per_epoch
        at_once = max(1, POSITIONS_AT_ONCE * self.world_size // order.global_batch_size)
        start = self.steps.start
        while start < self.steps.stop:
            steps = range(start, min(start + at_once, start - start % per_epoch + per_epoch, self.steps.stop))
            who = self.rank, self.world_size
            sizes, ids = order.sizes(steps, *who), order.ids_together(steps, *who)
            yield self._with_partners(sizes, ids, order.epoch(start)) if order.partners else (sizes, ids)
            start = steps.stop

    def _with_partners(self, sizes: list[int], ids: np.ndarray, epoch: int) -> tuple[list[int], np.ndarray]:
        samples, partners = (np.split(of, np.cumsum(sizes)[:-1]) for of in (ids, self.order.partners_of(ids, epoch)))
        each = [part for pair in zip(samples, partners, strict=True) for part in pair]
        return [2 * size for size in sizes], np.concatenate(each)
