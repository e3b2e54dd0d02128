"""The loader: this rank's batches on this rank's device, one for each step of a run."""

import os
import warnings
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import tee
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dist_mnist.data.dataset import IdxDataset, SampleRows, Samples, native
from dist_mnist.data.sampler import GlobalOrder, ShardedBatchSampler
from dist_mnist.distributed.world import World
from dist_mnist.utils.errors import UserError

BLOCK_BYTES = 1 << 23  # images gathered at once: large blocks keep threads from waiting for each other on shared cores
CACHED_BYTES = 1 << 19  # the same with one thread: the images stay in the core's caches until they are used
RESIDENT_SHARE = 0.25  # fraction of the device's free memory that --data-on-device auto may use


class Batch(NamedTuple):
    """This rank's part of a global batch, on the device. B may differ between ranks and may be 0.

    With partners (mixup, cutmix), images and labels are (2B, ...): samples first, then their partners.

    Attributes:
        images: (B, C, H, W) in the file's dtype, channels-last in memory.
        labels: (B,) int64.
        ids: (B,) int64, indices of the samples in their split.

    Example:
        >>> from dist_mnist import collate, open_data
        >>> batch = collate(open_data("data/mnist").train.__getitems__([5, 3]))
        >>> batch.images.shape, batch.labels.dtype, batch.ids
        (torch.Size([2, 1, 28, 28]), torch.int64, tensor([5, 3]))
    """

    images: torch.Tensor
    labels: torch.Tensor
    ids: torch.Tensor

    def without_ids_of_partners(self) -> "Batch":
        """Return the batch with the ids of its samples only; `ids` holds those of the partners in its second half."""
        return self._replace(ids=self.ids[: len(self.ids) // 2])


def collate(samples: Samples) -> Batch:
    """Convert the result of `IdxDataset.__getitems__` to CPU tensors: the `collate_fn` for torch's DataLoader.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> from dist_mnist import collate, open_data
        >>> loader = DataLoader(open_data("data/mnist").train, batch_size=32, collate_fn=collate)
        >>> next(iter(loader)).images.shape
        torch.Size([32, 1, 28, 28])
    """
    images, labels, ids = map(torch.from_numpy, samples)
    return Batch(images.permute(0, 3, 1, 2), labels, ids)


class Loader:
    """An iterator over this rank's batches for `steps` of a run, in the global order.

    One gather fetches the images of a block of batches, so that small batches have little overhead: in this process
    with all its threads, or in `workers`, the processes of a torch DataLoader. Labels are small and are gathered in
    this process for many blocks at once. Blocks are copied to a CUDA device from pinned memory while it computes on the
    previous block. With `resident`, all images live on the device and are gathered there: only row numbers are copied,
    and workers are not used. `on_device` ("yes", "auto" or "no") makes this loader keep the images there.

    Example:
        >>> from dist_mnist import GlobalOrder, Loader, World, open_data, use_device
        >>> data = open_data("data/mnist")  # 600 training images
        >>> order = GlobalOrder(num_samples=len(data.train), global_batch_size=250, seed=0)
        >>> world = use_device(World.from_environment(), "cpu")
        >>> [len(batch.ids) for batch in Loader(data.train, order, range(1, 4), world)]
        [250, 100, 250]
    """

    def __init__(
        self,
        dataset: IdxDataset,
        order: GlobalOrder,
        steps: range,
        world: World,
        *,
        workers: int = 0,
        on_device: str = "no",
        resident: "ResidentImages | None" = None,
    ):
        self.dataset, self.device, self.workers = dataset, world.device, workers
        self.resident = resident or keep_on_device(on_device, dataset, world.device)
        self.batch_sampler = ShardedBatchSampler(order, steps, world.rank, world.size)
        by_one_thread = world.device.type == "cpu" and not workers and torch.get_num_threads() == 1
        self.block_bytes = CACHED_BYTES if by_one_thread else BLOCK_BYTES

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        batches = self._from_device() if self.resident else self._from_host()
        return map(Batch.without_ids_of_partners, batches) if self.batch_sampler.order.partners else batches

    def _from_host(self) -> Iterator[Batch]:
        here, ahead = tee(self._blocks())  # images are prefetched
        images = send(self._gathered(ahead), self.device)
        for sizes, (ids, rows) in here:
            labels_of, ids_of = (
                iter(self._on_device(array).split_with_sizes(sizes)) for array in (self.dataset.labels_at(rows), ids)
            )
            for together in self._together(sizes):
                yield from map(Batch, next(images).split_with_sizes(together), labels_of, ids_of)

    def _gathered(self, blocks: Iterable[tuple[list[int], SampleRows]]) -> Iterator[torch.Tensor]:
        """Yield images (B, C, H, W) in host memory, several batches per block."""
        images, rows = _HostImages(self.dataset), self._rows_together(blocks)
        if not self.workers:
            return map(images.__getitem__, rows)
        loader = DataLoader(
            _OrError(images), sampler=rows, batch_size=None, num_workers=self.workers,
            pin_memory=self.device.type == "cuda", worker_init_fn=_leave_signals_to_the_rank,
            multiprocessing_context="fork",  # workers share the memory maps
        )  # fmt: skip
        return map(_raised, loader)

    def _rows_together(self, blocks: Iterable[tuple[list[int], SampleRows]]) -> Iterator[np.ndarray]:
        for sizes, (_, rows) in blocks:
            stop = 0
            for together in self._together(sizes):
                start, stop = stop, stop + sum(together)
                yield rows[start:stop]

    def _together(self, sizes: list[int]) -> Iterator[list[int]]:
        """Yield the batch sizes in lists, one for each group of batches gathered together."""
        count = max(1, self.block_bytes // (self.dataset.images[:1].nbytes * max(1, max(sizes))))
        return (sizes[first : first + count] for first in range(0, len(sizes), count))

    def _from_device(self) -> Iterator[Batch]:
        assert self.resident is not None
        for sizes, located in self._blocks():
            for ids_and_rows in self._on_device(np.stack(located)).split(sizes, dim=1):
                yield self.resident.gather(*ids_and_rows)

    def _blocks(self) -> Iterator[tuple[list[int], SampleRows]]:
        """Yield the sizes of several batches, and the rows of their samples."""
        for sizes, ids in self.batch_sampler.blocks():
            yield sizes, self.dataset.rows_of(ids)

    def _on_device(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return (tensor.pin_memory() if self.device.type == "cuda" else tensor).to(self.device, non_blocking=True)


def send(blocks: Iterable[torch.Tensor], device: torch.device) -> Iterator[torch.Tensor]:
    """Yield blocks of host memory on the device; a GPU receives the next block while it computes on this one."""
    if device.type != "cuda":
        yield from blocks
        return
    copying, waiting = torch.cuda.Stream(device), None
    for block in blocks:
        with torch.cuda.stream(copying):
            sent = block.pin_memory().to(device, non_blocking=True)
        arrived = copying.record_event()
        if waiting:
            yield _receive(*waiting)
        waiting = sent, arrived
    if waiting:
        yield _receive(*waiting)


def _receive(block: torch.Tensor, arrived: torch.cuda.Event) -> torch.Tensor:
    computing = torch.cuda.current_stream(block.device)
    computing.wait_event(arrived)
    block.record_stream(computing)  # its memory must not be reused before that stream is done
    return block


class ResidentImages:
    """All images and labels of a dataset's files, held in device memory."""

    def __init__(self, dataset: IdxDataset, device: torch.device | str):
        dataset.check_files()
        images = dataset.images.astype(dataset.images.dtype.newbyteorder("="), order="C", copy=True)
        self.images = torch.from_numpy(images).to(device)
        self.labels = torch.from_numpy(dataset.labels.astype(np.int64)).to(device)

    def gather(self, ids: torch.Tensor, rows: torch.Tensor) -> Batch:
        """Return the batch of the samples in `rows` ((B,) int64, on the device)."""
        return Batch(self.images.index_select(0, rows).permute(0, 3, 1, 2), self.labels.index_select(0, rows), ids)


def keep_on_device(wanted: str, dataset: IdxDataset, device: torch.device) -> ResidentImages | None:
    """Copy the images to device memory if `wanted`: "yes", "no", or "auto" (if they easily fit on a GPU)."""
    fits = device.type == "cuda" and dataset.images.nbytes <= RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]
    return ResidentImages(dataset, device) if wanted == "yes" or (wanted == "auto" and fits) else None


class _OrError(Dataset):
    """The dataset of workers. It returns UserErrors as values: torch would add tracebacks to raised ones."""

    def __init__(self, images: "_HostImages"):
        self.images = images

    def __getitem__(self, rows: np.ndarray) -> torch.Tensor | UserError:
        try:
            return self.images[rows]
        except UserError as error:
            return error


def _raised(found: torch.Tensor | UserError) -> torch.Tensor:
    if isinstance(found, UserError):
        raise found
    return found


def _leave_signals_to_the_rank(_: int) -> None:
    """Put a worker into its own process group: torchrun signals a rank's group, but the worker is still needed."""
    os.setpgrp()


class _HostImages(Dataset):
    """A dataset's images, gathered directly from the mapped pages, in this process or in a worker."""

    def __init__(self, dataset: IdxDataset):
        self.dataset = dataset

    def __getitem__(self, rows: np.ndarray) -> torch.Tensor:
        """Return images (B, C, H, W), channels-last in memory, from rows (B,) int64 of the files."""
        if torch.get_num_threads() == 1 and len(rows):  # for no rows, numpy gives other strides
            # With one thread, numpy is faster than torch, also in transposing.
            return torch.from_numpy(self.dataset.images_at(rows).transpose(0, 3, 1, 2))
        self.dataset.check_files()
        images = self._bytes.index_select(0, torch.from_numpy(rows))
        if self.dataset.images.dtype != np.uint8:
            images = torch.from_numpy(native(images.numpy().view(self.dataset.images.dtype)))
        if self.dataset.channels_first:
            images = torch.stack(images.unbind(1), -1)  # faster than copying the transposed tensor
        return images.permute(0, 3, 1, 2)

    @cached_property
    def _bytes(self) -> torch.Tensor:
        """The file's images as uint8 (the last axis in bytes), since torch lacks some dtypes and byte orders."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that the map is read-only; it is only read
            return torch.from_numpy(self.dataset.stored.view(np.uint8))
