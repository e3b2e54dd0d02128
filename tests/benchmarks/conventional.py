"""Training as it is usually written against this trainer: the same network, data and batch size, by turns.

    python tests/benchmarks/conventional.py --data-dir DIR [--device cuda] [--batch-size 256] [--epochs 1] [--rounds 5]

The usual way: a Dataset that gives one normalised image at a time, a shuffling DataLoader with worker processes, an
eager loop in fp32 that asks for the loss at each step. Both are whole epochs of training; the start of the process and
the evaluation are left out. Printed are seconds per epoch, images per second, and their ratio with its range.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from dist_mnist.config.settings import Config
from dist_mnist.data.dataset import IdxDataset
from dist_mnist.data.splits import open_data
from dist_mnist.model.cnn import build_model

TIMEOUT_S = 3600


class OneByOne(Dataset):
    """One normalised image and its label at a time."""

    def __init__(self, dataset: IdxDataset):
        self.images, self.labels = dataset.images, dataset.labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = torch.from_numpy(self.images[index].copy()).permute(2, 0, 1).float().div(255)
        return image.sub(0.1307).div(0.3081), int(self.labels[index])


def conventional(arguments: argparse.Namespace) -> float:
    """Seconds of an epoch, after the first few steps of another."""
    dataset = open_data(arguments.data_dir, 0.0, 0).train
    workers, pinned = min(4, len(os.sched_getaffinity(0))), arguments.device == "cuda"
    loader = DataLoader(
        OneByOne(dataset), arguments.batch_size, shuffle=True, num_workers=workers, pin_memory=pinned,
        persistent_workers=True,
    )  # fmt: skip
    model = build_model(Config(channels_last=False), dataset.image_shape, 10).to(arguments.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)

    def epoch(most: int) -> None:
        for _, (images, labels) in zip(range(most), loader, strict=False):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images.to(arguments.device)), labels.to(arguments.device))
            loss.backward()
            optimizer.step()
            loss.item()

    epoch(5)
    began = time.perf_counter()
    for _ in range(arguments.epochs):
        epoch(len(loader))
    return (time.perf_counter() - began) / arguments.epochs


def ours(arguments: argparse.Namespace) -> float:
    """Seconds of an epoch: the steps of a run, without those of its first log line."""
    log_every = 10
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "dist_mnist.train", f"--data-dir={arguments.data_dir}", f"--run-dir={folder}/run",
            f"--device={arguments.device}", f"--batch-size={arguments.batch_size}", f"--epochs={arguments.epochs}",
            f"--log-every={log_every}", "--validation-fraction=0", "--no-tensorboard",
        ]  # fmt: skip
        subprocess.run(command, check=True, timeout=TIMEOUT_S, stdout=subprocess.DEVNULL)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    first, last = records[0], records[-1]
    return (last["elapsed_s"] - first["elapsed_s"]) / (last["epoch"] - first["epoch"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, default=1024 if torch.cuda.is_available() else 256)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    images = len(open_data(arguments.data_dir, 0.0, 0).train)
    rounds = [(conventional(arguments), ours(arguments)) for _ in range(arguments.rounds)]
    for name, seconds in zip(
        ("conventional", "dist_mnist"), map(statistics.median, zip(*rounds, strict=True)), strict=True
    ):
        print(f"{name:13} {seconds:8.3f} s an epoch  {images / seconds:12,.0f} images/s")
    ratios = sorted(usual / mine for usual, mine in rounds)
    print(f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) times as fast, {len(rounds)} rounds")


if __name__ == "__main__":
    main()
