"""The conventional way compared with dist_mnist: input pipeline and training, same network, data and batch size.

    python tests/benchmarks/conventional.py --data-dir DIR [--part input|training] [--device cuda] [--batch-size N ...]

Input: batches of normalised float images and labels on the CPU, in one thread.
- per sample, by picture: a dataset whose `__getitem__` makes a PIL image, converts and normalises it, like
  torchvision's MNIST with ToTensor and Normalize; torch's default collation, a shuffled DataLoader;
- per sample: the same without PIL: from the array straight to a tensor;
- Loader, as float: one gather from the memory map, then conversion and normalisation of the whole batch;
- Loader: the same without the conversion: uint8, as the loader hands batches to the device;
- a memory copy: the upper bound, a plain copy of as many bytes from consecutive places of the mapped file.

Training: whole epochs, without process start and evaluation.
- usual: the dataset above without PIL, worker processes, an eager loop in fp32 that reads the loss at each step;
- dist_mnist: a run of this package.
"""

import argparse
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from dist_mnist import GlobalOrder, IdxDataset, Loader, World, open_data
from dist_mnist.config.settings import Config
from dist_mnist.model.build import build_model
from dist_mnist.tools.bench import sizes_of
from dist_mnist.tools.measure import Way, by_turns, print_rows, rate, train

MEAN, STD = 0.1307, 0.3081
MEASURED_S = 0.5
LOG_EVERY = 10


class PerSample(Dataset):
    """A dataset that converts one image at a time: array to tensor, to float, scaled, normalised."""

    def __init__(self, data: IdxDataset, by_picture: bool = False):
        self.images, self.labels, self.by_picture = data.images[..., 0], data.labels, by_picture

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = self.images[index]
        pixels = np.array(Image.fromarray(image)) if self.by_picture else image.copy()
        return torch.from_numpy(pixels).unsqueeze(0).float().div(255).sub(MEAN).div(STD), int(self.labels[index])


def per_sample(data: IdxDataset, batch_size: int, by_picture: bool) -> Iterator[int]:
    for images, _ in DataLoader(PerSample(data, by_picture), batch_size, shuffle=True):
        yield len(images)


def loader(data: IdxDataset, batch_size: int, as_float: bool) -> Iterator[int]:
    order = GlobalOrder(num_samples=len(data), global_batch_size=batch_size)
    batches = Loader(data, order, range(1 << 40), World(0, 1, 0, 1, torch.device("cpu")))
    for batch, size in zip(batches, sizes_of(order), strict=False):
        if as_float:
            batch.images.float().sub_(MEAN * 255).div_(STD * 255)
        yield size


def copies(data: IdxDataset, batch_size: int) -> Iterator[int]:
    while True:
        for start in range(0, len(data) - batch_size + 1, batch_size):
            yield len(data.images[start : start + batch_size].copy())


def usual_rate(data: IdxDataset, batch_size: int, epochs: int, device: str) -> float:
    """Return the images per second of whole epochs, after a few warm-up steps."""
    batches = DataLoader(
        PerSample(data), batch_size, shuffle=True, num_workers=min(4, len(os.sched_getaffinity(0))),
        pin_memory=device == "cuda", persistent_workers=True,
    )  # fmt: skip
    model = build_model(Config(channels_last=False), data.image_shape, 10).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)

    def epoch(most: int) -> None:
        for _, (images, labels) in zip(range(most), batches, strict=False):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
            loss.item()

    epoch(5)
    began = time.perf_counter()
    for _ in range(epochs):
        epoch(len(batches))
    return epochs * len(data) / (time.perf_counter() - began)


def run_rate(data_dir: Path, num_images: int, batch_size: int, epochs: int, device: str) -> float:
    """Return the images per second of a run's steps, without those before its first log line."""
    lines = train(
        f"--data-dir={data_dir}", f"--device={device}", f"--batch-size={batch_size}", f"--epochs={epochs}",
        f"--log-every={LOG_EVERY}", "--validation-fraction=0",
    )  # fmt: skip
    first, last = lines[0], lines[-1]
    return num_images * (last.epoch - first.epoch) / (last.elapsed_s - first.elapsed_s)


def compare_input(data: IdxDataset, batch_size: int, rounds: int) -> None:
    pipelines = {
        "per sample, by picture": partial(per_sample, data, batch_size, by_picture=True),
        "per sample": partial(per_sample, data, batch_size, by_picture=False),
        "Loader, as float": partial(loader, data, batch_size, as_float=True),
        "Loader": partial(loader, data, batch_size, as_float=False),
        "a memory copy": partial(copies, data, batch_size),
    }
    ways: dict[str, Way] = {name: partial(rate, pipeline, MEASURED_S) for name, pipeline in pipelines.items()}
    rows = by_turns(ways, rounds, "per sample, by picture")
    print_rows(f"input, batch {batch_size}, images/s", rows, rounds)


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--part", choices=["input", "training"], help="default: both")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument(
        "--batch-size", type=int, nargs="+", help="default: 100, 250 and 1000 for the input; 256 (GPU: 1024)"
    )
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    data = open_data(given.data_dir).train
    if given.part != "training":
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        for batch_size in given.batch_size or [100, 250, 1000]:
            compare_input(data, batch_size, given.rounds)
        torch.set_num_threads(threads)
    if given.part != "input":
        for batch_size in given.batch_size or [1024 if given.device == "cuda" else 256]:
            ways: dict[str, Way] = {
                "usual": partial(usual_rate, data, batch_size, given.epochs, given.device),
                "dist_mnist": partial(run_rate, given.data_dir, len(data), batch_size, given.epochs, given.device),
            }
            print_rows(f"training, batch {batch_size}, images/s", by_turns(ways, given.rounds, "usual"), given.rounds)


if __name__ == "__main__":
    main()
