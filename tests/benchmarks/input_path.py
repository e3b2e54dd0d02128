"""Images per second of the input path alone: a conventional per-sample pipeline against this package's loader.

    python tests/benchmarks/input_path.py [--data-dir DIR] [--rounds 7]

Both give batches of normalised float images and labels on the CPU, in the same run, by turns:

- conventional: a dataset whose `__getitem__` makes a picture of one image and converts and normalises it, as
  torchvision's MNIST with ToTensor and Normalize does; torch's default collation, a shuffled DataLoader;
- tensors: the same without the picture: the array's row straight to a tensor;
- ours: `Loader` (global order, one gather from the memory map), then conversion and normalisation of the whole batch;
- gathered: the same without the conversion, uint8 as the loader hands it to the device;
- copied: the bound: a plain copy of as many bytes, from one place of the mapped file after another.

The ratios are those of each round; the table shows their median and range.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from dist_mnist.data.dataset import IdxDataset
from dist_mnist.data.loader import Loader
from dist_mnist.data.sampler import GlobalOrder
from dist_mnist.data.sources.synthetic import write_digits
from dist_mnist.data.splits import open_data
from dist_mnist.distributed.world import World

MEAN, STD = 0.1307, 0.3081
WORLD = World(0, 1, 0, 1, torch.device("cpu"))


class PerSample(Dataset):
    """One image at a time: array to tensor, to float, scaled, normalised."""

    def __init__(self, data: IdxDataset, through_picture: bool):
        self.images, self.labels, self.through_picture = data.images[..., 0], data.labels, through_picture

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = self.images[index]
        pixels = np.array(Image.fromarray(image)) if self.through_picture else image.copy()
        return torch.from_numpy(pixels).unsqueeze(0).float().div(255).sub(MEAN).div(STD), int(self.labels[index])


def per_sample(data: IdxDataset, batch_size: int, num_batches: int, through_picture: bool) -> Iterator[torch.Tensor]:
    loader = DataLoader(PerSample(data, through_picture), batch_size=batch_size, shuffle=True)
    for (images, _), _ in zip(loader, range(num_batches), strict=False):
        yield images


def conventional(data: IdxDataset, batch_size: int, num_batches: int) -> Iterator[torch.Tensor]:
    return per_sample(data, batch_size, num_batches, through_picture=True)


def tensors(data: IdxDataset, batch_size: int, num_batches: int) -> Iterator[torch.Tensor]:
    return per_sample(data, batch_size, num_batches, through_picture=False)


def gathered(data: IdxDataset, batch_size: int, num_batches: int) -> Iterator[torch.Tensor]:
    order = GlobalOrder(num_samples=len(data), global_batch_size=batch_size)
    for batch in Loader(data, order, range(num_batches), WORLD):
        yield batch.images


def ours(data: IdxDataset, batch_size: int, num_batches: int) -> Iterator[torch.Tensor]:
    for images in gathered(data, batch_size, num_batches):
        yield images.float().sub_(MEAN * 255).div_(STD * 255)


def copied(data: IdxDataset, batch_size: int, num_batches: int) -> Iterator[torch.Tensor]:
    for start in range(0, num_batches * batch_size, batch_size):
        yield data.images[start : start + batch_size].copy()


def rate(pipeline: Callable, data: IdxDataset, batch_size: int, seconds: float = 0.5) -> float:
    """Images per second over a number of batches that takes about `seconds`; a first pass sets the number."""
    num_batches = 2
    while True:
        began = time.perf_counter()
        images = sum(len(batch) for batch in pipeline(data, batch_size, num_batches))
        elapsed = time.perf_counter() - began
        if elapsed >= seconds or images >= len(data) - batch_size:
            return images / elapsed
        wanted = int(num_batches * 1.3 * seconds / elapsed) + 1
        num_batches = min(max(wanted, num_batches + 1), len(data) // batch_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="folder of idx files; default: generated digits")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[100, 250, 1000])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.data_dir is None:
            arguments.data_dir = Path(scratch)
            write_digits(arguments.data_dir, num_train=60_000, num_test=100)
        data = open_data(arguments.data_dir, 0.1, 0).train
        print(f"torch {torch.__version__}, 1 thread, {len(data)} images of {data.image_shape}")
        for batch_size in arguments.batch_size:
            report(data, batch_size, arguments.rounds)


def report(data: IdxDataset, batch_size: int, rounds: int) -> None:
    pipelines = [conventional, tensors, ours, gathered, copied]
    measured = [[rate(pipeline, data, batch_size) for pipeline in pipelines] for _ in range(rounds)]
    print(f"\nbatch {batch_size}: images/s, median of {rounds} rounds (range)")
    for pipeline, rates in zip(pipelines, zip(*measured, strict=True), strict=True):
        ratios = [mine / row[0] for mine, row in zip(rates, measured, strict=True)]
        of_copy = statistics.median(mine / row[-1] for mine, row in zip(rates, measured, strict=True))
        print(
            f"  {pipeline.__name__:<13} {statistics.median(rates):>12,.0f}  = {statistics.median(ratios):7.1f} x "
            f"conventional ({min(ratios):.1f} to {max(ratios):.1f}), {of_copy:.1%} of a copy"
        )


if __name__ == "__main__":
    main()
