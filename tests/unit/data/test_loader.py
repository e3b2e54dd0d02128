"""Batches on the device: the dataset's rows in the global order, whichever way they come."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from dist_mnist.data.dataset import IdxDataset
from dist_mnist.data.loader import Loader, keep_on_device
from dist_mnist.data.sampler import GlobalOrder
from dist_mnist.distributed.world import World

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)
IMAGES = {
    "uint8": RNG.integers(0, 256, (50, 4, 6), np.uint8),
    "int16 big-endian": RNG.integers(-999, 999, (50, 4, 6)).astype(">i2"),
    "float64, 3 channels": RNG.normal(size=(50, 4, 6, 3)).astype(">f8"),
}


@pytest.fixture(params=IMAGES)
def dataset(request) -> IdxDataset:
    """A training part, so that ids are not rows."""
    return IdxDataset(IMAGES[request.param], np.arange(50, dtype=np.uint8)).split(0.2, seed=3)[0]


def twin(channels: int, dtype: str = "u1") -> tuple[IdxDataset, IdxDataset]:
    """The same images with their channels last and first in memory."""
    images = RNG.integers(0, 99, (50, 8, 6, channels)).astype(dtype)
    first = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    labels = np.arange(50, dtype=np.uint8)
    return IdxDataset(images, labels), IdxDataset(first, labels, channels_first=True)


def load(dataset: IdxDataset, way: str, world: World, steps: range = range(2, 15), workers: int = 0) -> list:
    order = GlobalOrder(num_samples=len(dataset), global_batch_size=7, seed=9)
    resident = keep_on_device(way, dataset, CPU)
    assert (resident is None) == (way == "no")
    return list(Loader(dataset, order, steps, world, workers=workers, resident=resident))


@pytest.fixture(params=[1, 2])
def threads(request) -> Iterator[int]:
    """As many threads of torch as that."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("way", ["no", "yes"], ids=["host", "resident"])
@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 3), (2, 3), (0, 8)])
def test_loader_batches_are_the_datasets_rows_in_the_global_order(dataset, way, rank, size):
    batches = load(dataset, way, World(rank, size, rank, size, CPU))
    order = GlobalOrder(num_samples=40, global_batch_size=7, seed=9)
    for batch, ids in zip(batches, order.ids(range(2, 15), rank, size), strict=True):
        expected = dataset.__getitems__(ids)
        np.testing.assert_array_equal(batch.images.permute(0, 2, 3, 1), expected.images)
        np.testing.assert_array_equal(batch.labels, expected.labels)
        np.testing.assert_array_equal(batch.ids, ids)
        channels, height, width = dataset.image_shape
        assert batch.images.shape == (len(ids), channels, height, width)
        assert batch.images.dtype == torch.from_numpy(expected.images).dtype
        assert batch.labels.dtype == batch.ids.dtype == torch.int64


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("way", ["no", "yes"], ids=["host", "resident"])
def test_loader_images_lie_channels_last(dataset, way, alone):
    channels, _, width = dataset.image_shape
    for batch in load(dataset, way, alone):
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.images.stride()[1:] == (1, width * channels, channels)


def test_loader_with_workers_gives_the_same_batches(alone):
    dataset = IdxDataset(IMAGES["uint8"], np.arange(50, dtype=np.uint8))
    for one, other in zip(load(dataset, "no", alone), load(dataset, "no", alone, workers=2), strict=True):
        assert all(a.equal(b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_batches_of_several_blocks_are_whole(alone, workers):
    """More images than are gathered at once, over the end of an epoch, whose batch is a shorter one."""
    images = RNG.integers(0, 256, (3000, 28, 28), np.uint8)
    dataset = IdxDataset(images, np.arange(3000))
    order, steps = GlobalOrder(num_samples=3000, global_batch_size=256, seed=9), range(7, 40)
    batches = list(Loader(dataset, order, steps, alone, workers=workers))
    for batch, ids in zip(batches, order.ids(steps), strict=True):
        np.testing.assert_array_equal(batch.images[:, 0], images[ids])
        assert batch.labels.tolist() == batch.ids.tolist() == ids.tolist()


def partners_of_samples(dataset: IdxDataset, steps: range, world: World, **how) -> dict[tuple[int, int], int]:
    """By epoch and sample the label of its partner, whose image has to be the partner's, too."""
    order = GlobalOrder(num_samples=40, global_batch_size=7, seed=9, partners=True)
    found = {}
    for step, batch in zip(steps, Loader(dataset, order, steps, world, **how), strict=True):
        assert len(batch.ids) == len(order.part(step, world.rank, world.size))
        expected = np.asarray(dataset.images)[batch.labels.numpy()]  # the labels are the rows
        np.testing.assert_array_equal(batch.images.permute(0, 2, 3, 1), expected)
        ids, partners = batch.ids.tolist(), batch.labels[len(batch.ids) :].tolist()
        assert batch.labels[: len(ids)].tolist() == dataset.labels_at(dataset.rows_of(batch.ids.numpy()).rows).tolist()
        found |= {(order.epoch(step), sample): partner for sample, partner in zip(ids, partners, strict=True)}
    return found


WAYS = [{}, {"on_device": "yes"}, {"workers": 2}]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_loader_partners_are_each_sample_once_an_epoch_for_any_number_of_ranks(dataset, way, alone):
    steps = range(12)  # two epochs
    whole = partners_of_samples(dataset, steps, alone, **way)
    rows = sorted(dataset.rows_of(np.arange(40)).rows.tolist())
    epochs = [[whole[epoch, sample] for sample in range(40)] for epoch in (0, 1)]
    assert [sorted(partners) for partners in epochs] == [rows, rows] and epochs[0] != epochs[1]
    for size in (2, 3, 8):
        ranks = [World(rank, size, rank, size, CPU) for rank in range(size)]
        shared = [partners_of_samples(dataset, steps, rank) for rank in ranks]
        assert {sample: partner for part in shared for sample, partner in part.items()} == whole
    assert partners_of_samples(dataset, range(4, 9), alone).items() < whole.items()  # resumed in mid-epoch


def test_loader_gone_through_again_gives_the_same_batches(alone):
    dataset = IdxDataset(IMAGES["uint8"], np.arange(50, dtype=np.uint8))
    loader = Loader(dataset, GlobalOrder(num_samples=50, global_batch_size=20), range(5), alone)
    first, again = ([batch.ids.tolist() for batch in loader] for _ in range(2))
    assert first == again and len(first) == len(loader) == 5


def test_keep_on_device_auto_on_a_cpu_keeps_nothing():
    assert keep_on_device("auto", IdxDataset(IMAGES["uint8"], np.zeros(50, np.uint8)), CPU) is None


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("way", ["no", "yes"], ids=["host", "resident"])
@pytest.mark.parametrize(("channels", "dtype"), [(1, "u1"), (3, "u1"), (3, ">i2"), (4, "f4")])
def test_loader_images_with_channels_first_are_those_with_channels_last_in_memory_too(way, channels, dtype, alone):
    last, first = (dataset.split(0.2, seed=3)[0] for dataset in twin(channels, dtype))
    assert first.image_shape == last.image_shape == (channels, 8, 6)
    for one, other in zip(load(last, way, alone), load(first, way, alone), strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
        assert one.images.stride() == other.images.stride() and one.images.dtype == other.images.dtype
    ids = np.array([3, 0, 3])
    np.testing.assert_array_equal(first.__getitems__(ids).images, last.__getitems__(ids).images)
    assert first.__getitems__(ids).images.flags.c_contiguous
    assert [a.tolist() for a in first.pixel_statistics()] == [a.tolist() for a in last.pixel_statistics()]


def test_loader_workers_read_images_with_channels_first(alone):
    last, first = twin(3)
    for one, other in zip(load(last, "no", alone), load(first, "no", alone, workers=1), strict=True):
        assert torch.equal(one.images, other.images) and one.images.stride() == other.images.stride()
