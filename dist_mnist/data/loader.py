"""Batches of this rank on this rank's device, one for each step of a run."""

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

from dist_mnist.data.dataset import Address, IdxDataset, Samples
from dist_mnist.data.order import STEPS_AT_ONCE, GlobalOrder, ShardedBatchSampler
from dist_mnist.distributed import World

BLOCK_BYTES = 1 << 20  # of images that are gathered at once: more would not stay in a core's cache until they are used
RESIDENT_SHARE = 0.25  # of the device's free memory that a data set may take without being asked


class Batch(NamedTuple):
    """This rank's part of a global batch, on the device. B may differ between ranks and may be 0."""

    images: torch.Tensor  # (B, C, H, W) in the file's dtype, channels-last in memory
    labels: torch.Tensor  # (B,) int64
    ids: torch.Tensor  # (B,) int64, numbers of the samples in their split


class Loader:
    """Iterates over this rank's batches for `steps` of a run, in the global order.

    Images that stay in host memory come through a torch DataLoader, pinned and copied asynchronously to a CUDA device.
    One gather fetches a block of batches, so that small ones cost little more than their bytes. With `resident` all
    images live on the device and are gathered there; then only row numbers cross to it, and there is nothing for loader
    processes to do.
    """

    def __init__(
        self,
        dataset: IdxDataset,
        order: GlobalOrder,
        steps: range,
        world: World,
        *,
        workers: int = 0,
        resident: "ResidentImages | None" = None,
    ):
        self.dataset, self.device, self.workers, self.resident = dataset, world.device, workers, resident
        self.sampler = ShardedBatchSampler(order, steps, world.rank, world.size, dataset.addresses)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        return self._from_device() if self.resident else self._from_host()

    def _from_host(self) -> Iterator[Batch]:
        on_gpu = self.device.type == "cuda"
        blocks = _Blocks(self.sampler, self._batches_in_a_block())
        samples = DataLoader(
            self.dataset,
            batch_sampler=blocks,
            collate_fn=_to_tensors,
            num_workers=self.workers,
            pin_memory=on_gpu,
        )
        sizes = self.sampler.sizes()
        for block in samples:
            on_device = Batch(*(tensor.to(self.device, non_blocking=on_gpu) for tensor in block))
            mine = list(islice(sizes, blocks.size))
            yield from map(Batch, *(tensor.split(mine) for tensor in on_device))

    def _batches_in_a_block(self) -> int:
        images = self.dataset.images
        batch_bytes = self.sampler.largest() * images[:1].nbytes
        return max(1, min(STEPS_AT_ONCE, BLOCK_BYTES // max(1, batch_bytes)))

    def _from_device(self) -> Iterator[Batch]:
        assert self.resident is not None
        for ids, rows in self.sampler:
            ids_and_rows = torch.from_numpy(np.stack([ids, rows]))
            if self.device.type == "cuda":
                ids_and_rows = ids_and_rows.pin_memory()
            on_device = ids_and_rows.to(self.device, non_blocking=True)
            yield self.resident.gather(*on_device)


class _Blocks:
    """Joins the addresses of several batches into one, for one gather."""

    def __init__(self, batches: ShardedBatchSampler, size: int):
        self.batches, self.size = batches, size

    def __len__(self) -> int:
        return -(-len(self.batches) // self.size)

    def __iter__(self) -> Iterator[Address]:
        batches = iter(self.batches)
        while block := list(islice(batches, self.size)):
            yield block[0] if len(block) == 1 else Address(*map(np.concatenate, zip(*block, strict=True)))


class ResidentImages:
    """All images and labels of a dataset's files in a device's memory."""

    def __init__(self, dataset: IdxDataset, device: torch.device | str):
        images = dataset.images.astype(dataset.images.dtype.newbyteorder("="), copy=True)
        self.images = torch.from_numpy(images).to(device)
        self.labels = torch.from_numpy(dataset.labels.astype(np.int64)).to(device)

    def gather(self, ids: torch.Tensor, rows: torch.Tensor) -> Batch:
        """The batch of the samples in `rows` ((B,) int64, on the device)."""
        return Batch(self.images[rows].permute(0, 3, 1, 2), self.labels[rows], ids)


def keep_on_device(wanted: str, dataset: IdxDataset, device: torch.device) -> ResidentImages | None:
    """The images in device memory if that is `wanted`: "yes", "no", or "auto" for where they fit easily on a GPU."""
    fits = device.type == "cuda" and dataset.images.nbytes <= RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]
    return ResidentImages(dataset, device) if wanted == "yes" or (wanted == "auto" and fits) else None


def _to_tensors(samples: Samples) -> Batch:
    images, labels, ids = map(torch.from_numpy, samples)
    return Batch(images.permute(0, 3, 1, 2), labels, ids)
