"""Your own network, trained with everything the command offers: exact resume, any number of processes, a report.

torchrun --nproc_per_node=2 tests/examples/own_network.py data/mnist

The same from the command line: dist-mnist train --model tests/examples/own_network.py:Net --data-dir data/mnist
"""

import sys

import torch
from torch import nn

from dist_mnist import train


class Net(nn.Module):
    """Two convolutions, self-attention between their 49 positions, dropout, and a linear head."""

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, width: int = 32):
        super().__init__()
        self.patches = nn.Sequential(
            nn.Conv2d(image_shape[0], width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
        )  # fmt: skip
        self.attention = nn.MultiheadAttention(width, num_heads=4, batch_first=True)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        attended, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        return self.head(self.drop((tokens + attended).mean(1)))


if __name__ == "__main__":
    torch.manual_seed(0)  # the same initial weights on all ranks
    run = train(Net((1, 28, 28), 10), data_dir=sys.argv[1], steps=int(sys.argv[2]) if len(sys.argv) > 2 else 700)
    if run and run.result:
        print(f"test accuracy {run.result.accuracy:.2%}, in {run.path}")
