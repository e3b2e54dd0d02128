"""The conventional trainer of `peers.py`, a standalone script: MNIST as most scripts train it, in plain PyTorch.

    python tests/benchmarks/conventional_trainer.py --data-dir DIR [--epochs 4] [--seed 0]

A dataset that converts one picture at a time to a normalised float tensor; a DataLoader with batches of 64 (no worker
processes on a CPU, one with a GPU); two 3 x 3 convolutions and dropout; Adadelta, its learning rate multiplied by 0.7
after each epoch; the loss of every tenth batch on the terminal; a test after each epoch.
"""

import argparse
import gzip
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, Dataset


class Digits(Dataset):
    """Images and labels in memory; each sample is converted through a PIL image."""

    def __init__(self, folder: Path, split: str):
        self.images = np.frombuffer(read(folder / f"{split}-images-idx3-ubyte")[16:], np.uint8).reshape(-1, 28, 28)
        self.labels = np.frombuffer(read(folder / f"{split}-labels-idx1-ubyte")[8:], np.uint8)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        picture = Image.fromarray(self.images[index])
        pixels = torch.from_numpy(np.array(picture)).unsqueeze(0).float().div(255)
        return pixels.sub(0.1307).div(0.3081), int(self.labels[index])


def read(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else gzip.decompress(path.with_name(f"{path.name}.gz").read_bytes())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 32, 3), nn.Conv2d(32, 64, 3)
        self.dropout1, self.dropout2 = nn.Dropout(0.25), nn.Dropout(0.5)
        self.dense, self.out = nn.Linear(12 * 12 * 64, 128), nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        x = self.dropout1(F.max_pool2d(x, 2))
        x = F.relu(self.dense(torch.flatten(x, 1)))
        return F.log_softmax(self.out(self.dropout2(x)), dim=1)


def train(model: nn.Module, device: torch.device, loader: DataLoader, optimizer: torch.optim.Optimizer, epoch: int):
    model.train()
    for number, (images, labels) in enumerate(loader):
        images, labels = images.to(device), labels.to(device)
        optimizer.zero_grad()
        loss = F.nll_loss(model(images), labels)
        loss.backward()
        optimizer.step()
        if number % 10 == 0:
            print(f"epoch {epoch}, batch {number} of {len(loader)}: loss {loss.item():.6f}")


@torch.no_grad()
def test(model: nn.Module, device: torch.device, loader: DataLoader) -> tuple[float, int]:
    """Return the mean loss and the number of correct predictions."""
    model.eval()
    total, correct = 0.0, 0
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        output = model(images)
        total += F.nll_loss(output, labels, reduction="sum").item()
        correct += (output.argmax(1) == labels).sum().item()
    return total / len(loader.dataset), correct  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    beside_gpu = {"num_workers": 1, "pin_memory": True} if device.type == "cuda" else {}
    train_set, test_set = Digits(given.data_dir, "train"), Digits(given.data_dir, "t10k")
    train_loader = DataLoader(train_set, batch_size=64, shuffle=True, **beside_gpu)
    test_loader = DataLoader(test_set, batch_size=1000, **beside_gpu)
    model = Net().to(device)
    optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
    scheduler = StepLR(optimizer, step_size=1, gamma=0.7)
    for epoch in range(1, given.epochs + 1):
        train(model, device, train_loader, optimizer, epoch)
        loss, correct = test(model, device, test_loader)
        print(f"test loss {loss:.4f}, accuracy {correct / len(test_set):.4%}", flush=True)
        scheduler.step()


if __name__ == "__main__":
    main()
