"""Batches of this rank on this rank's device, one for each step of a run."""

import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

from dist_mnist.data.dataset import Address, IdxDataset, Samples
from dist_mnist.data.order import GlobalOrder, ShardedBatchSampler
from dist_mnist.distributed import World

BLOCK_BYTES = 1 << 23  # of images that are gathered at once: much more would not stay in a cache until they are used
RESIDENT_SHARE = 0.25  # of the device's free memory that a data set may take without being asked


class Batch(NamedTuple):
    """This rank's part of a global batch, on the device. B may differ between ranks and may be 0."""

    images: torch.Tensor  # (B, C, H, W) in the file's dtype, channels-last in memory
    labels: torch.Tensor  # (B,) int64
    ids: torch.Tensor  # (B,) int64, numbers of the samples in their split

    def split(self, sizes: list[int]) -> Iterator["Batch"]:
        """The batches that lie in this one, of so many samples each."""
        return map(Batch, *(tensor.split(sizes) for tensor in self))


class Loader:
    """Iterates over this rank's batches for `steps` of a run, in the global order.

    One gather fetches a block of batches, so that small ones cost little more than their bytes: in this process with
    all its threads, or in `workers`, the processes of a torch DataLoader. A CUDA device is sent each block, from pinned
    memory, while it works on the one before. With `resident` all images live on the device and are gathered there; then
    only row numbers cross to it, and there is nothing for workers to do.
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
        self.sampler = ShardedBatchSampler(order, steps, world.rank, world.size)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        return self._from_device() if self.resident else self._from_host()

    def _from_host(self) -> Iterator[Batch]:
        on_the_way: deque[list[int]] = deque()  # the sizes of the batches in each block that is being gathered

        def addresses() -> Iterator[Address]:
            for sizes, address in self._blocks():
                on_the_way.append(sizes)
                yield address

        if self.workers:
            blocks: Iterable[Batch] = DataLoader(
                self.dataset,
                batch_sampler=addresses(),
                collate_fn=_to_tensors,
                num_workers=self.workers,
                pin_memory=self.device.type == "cuda",
            )
        else:
            blocks = map(_Rows(self.dataset).gather, addresses())
        for block in send(blocks, self.device):
            yield from block.split(on_the_way.popleft())

    def _blocks(self) -> Iterator[tuple[list[int], Address]]:
        """What is gathered at once: the sizes of some batches, and where their samples are."""
        most = max(1, BLOCK_BYTES // self.dataset.images[:1].nbytes)
        for sizes, ids in self.sampler.blocks():
            rows, start = self.dataset.address(ids).rows, 0
            count, remaining = max(1, most // max(1, max(sizes))), iter(sizes)
            while some := list(islice(remaining, count)):
                stop = start + sum(some)
                yield some, Address(ids[start:stop], rows[start:stop])
                start = stop

    def _from_device(self) -> Iterator[Batch]:
        assert self.resident is not None
        for sizes, ids in self.sampler.blocks():
            address = torch.from_numpy(np.stack(self.dataset.address(ids)))
            if self.device.type == "cuda":
                address = address.pin_memory()
            on_device = address.to(self.device, non_blocking=True)
            for ids_and_rows in on_device.split(sizes, dim=1):
                yield self.resident.gather(*ids_and_rows)


def send(blocks: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Blocks in host memory, on the device; a GPU is sent the next one while it works on the one before."""
    if device.type != "cuda":
        yield from blocks
        return
    copying, waiting = torch.cuda.Stream(device), None
    for block in blocks:
        with torch.cuda.stream(copying):
            sent = Batch(*(tensor.pin_memory().to(device, non_blocking=True) for tensor in block))
        arrived = copying.record_event()
        if waiting:
            yield _receive(*waiting)
        waiting = sent, arrived
    if waiting:
        yield _receive(*waiting)


def _receive(block: Batch, arrived: torch.cuda.Event) -> Batch:
    computing = torch.cuda.current_stream(block.images.device)
    computing.wait_event(arrived)
    for tensor in block:
        tensor.record_stream(computing)  # whose memory is not to be used again before that
    return block


class ResidentImages:
    """All images and labels of a dataset's files in a device's memory."""

    def __init__(self, dataset: IdxDataset, device: torch.device | str):
        images = dataset.images.astype(dataset.images.dtype.newbyteorder("="), copy=True)
        self.images = torch.from_numpy(images).to(device)
        self.labels = torch.from_numpy(dataset.labels.astype(np.int64)).to(device)

    def gather(self, ids: torch.Tensor, rows: torch.Tensor) -> Batch:
        """The batch of the samples in `rows` ((B,) int64, on the device)."""
        return Batch(self.images.index_select(0, rows).permute(0, 3, 1, 2), self.labels.index_select(0, rows), ids)


def keep_on_device(wanted: str, dataset: IdxDataset, device: torch.device) -> ResidentImages | None:
    """The images in device memory if that is `wanted`: "yes", "no", or "auto" for where they fit easily on a GPU."""
    fits = device.type == "cuda" and dataset.images.nbytes <= RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]
    return ResidentImages(dataset, device) if wanted == "yes" or (wanted == "auto" and fits) else None


def _to_tensors(samples: Samples) -> Batch:
    images, labels, ids = map(torch.from_numpy, samples)
    return Batch(images.permute(0, 3, 1, 2), labels, ids)


class _Rows:
    """A dataset's images as rows of bytes, which torch gathers with all its threads, from the files' own pages."""

    def __init__(self, dataset: IdxDataset):
        self.dataset, images = dataset, dataset.images
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the map is for reading only, and is only read
            self.rows = torch.from_numpy(images.reshape(len(images), -1).view(np.uint8))

    def gather(self, address: Address) -> Batch:
        """What `_to_tensors(dataset.__getitems__(address))` is."""
        images = self.dataset.images
        gathered = self.rows.index_select(0, torch.from_numpy(address.rows)).numpy().view(images.dtype)
        return _to_tensors(self.dataset.samples(address, gathered.reshape(len(address.rows), *images.shape[1:])))
