"""Networks as users write them, each with a feature that a trainer may mishandle; passed to `--model` by file name."""

import random

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


class BatchNormDropout(nn.Module):
    """Batch normalisation in 2D and 1D, dropout of channels and of units."""

    def __init__(self, image_shape, num_classes, width: int = 8, drop: float = 0.2):
        super().__init__()
        self.conv = nn.Conv2d(image_shape[0], width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.drop2d = nn.Dropout2d(drop)
        self.dense = nn.Linear(width * 9, 16)
        self.norm1d = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(drop)
        self.head = nn.Linear(16, num_classes)

    def forward(self, x):
        x = (x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), keepdim=True)  # NaN for a constant image
        x = F.adaptive_avg_pool2d(self.drop2d(F.relu(self.norm(self.conv(x)))), 3)
        x = x.view(x.size(0), -1)  # fails on an empty batch
        return self.head(self.drop(F.relu(self.norm1d(self.dense(x)))))


class LayerNormed(nn.Module):
    """Layer normalisation, and a dropout module called twice in a forward pass."""

    def __init__(self, image_shape, num_classes):
        super().__init__()
        channels, height, width = image_shape
        self.dense = nn.Linear(channels * height * width, 24)
        self.norm = nn.LayerNorm(24)
        self.again = nn.Linear(24, 24)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(24, num_classes)

    def forward(self, x):
        x = self.drop(F.gelu(self.norm(self.dense(x.flatten(1)))))
        return self.head(self.drop(F.gelu(self.again(x))))


class GroupNormed(nn.Module):
    """Group normalisation, strided convolutions, and a buffer of integers."""

    def __init__(self, image_shape, num_classes, groups: int = 2):
        super().__init__()
        self.conv = nn.Conv2d(image_shape[0], 8, 3, 2, 1)
        self.norm = nn.GroupNorm(groups, 8)
        self.head = nn.Linear(8, num_classes)
        self.register_buffer("channels", torch.arange(8))

    def forward(self, x):
        return self.head(F.silu(self.norm(self.conv(x))).mean((2, 3))[:, self.channels])


class Projected(nn.Module):
    """Fixed random projections, drawn from numpy's and Python's generators at construction and not saved."""

    def __init__(self, image_shape, num_classes):
        super().__init__()
        channels, height, width = image_shape
        order = list(range(channels * height * width))
        random.shuffle(order)
        self.order = order[:64]
        noise = torch.from_numpy(np.random.randn(64, 16)).float()
        self.register_buffer("noise", noise, persistent=False)
        self.head = nn.Linear(16, num_classes)

    def forward(self, x):
        return self.head(F.relu(x.flatten(1)[:, self.order] @ self.noise))


class Attention(nn.Module):
    """Self-attention between the rows of an image as tokens."""

    def __init__(self, image_shape, num_classes, width: int = 16, heads: int = 2):
        super().__init__()
        channels, height, columns = image_shape
        self.embed = nn.Linear(channels * columns, width)
        self.position = nn.Parameter(torch.randn(height, width) * 0.02)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        tokens = self.embed(x.transpose(1, 2).flatten(2)) + self.position
        return self.head(self.norm(tokens + self.attention(tokens, tokens, tokens)[0]).mean(1))


class TiedWeights(nn.Module):
    """An autoencoder with a head, whose encoder and decoder share one matrix; the matrix has two names.

    It is also in a plain list, which torch does not track, and has a hook that halves its gradient.
    """

    def __init__(self, image_shape, num_classes):
        super().__init__()
        pixels = image_shape[0] * image_shape[1] * image_shape[2]
        self.encode = nn.Linear(pixels, 12, bias=False)
        self.again = nn.Linear(pixels, 12, bias=False)
        self.again.weight = self.encode.weight
        self.matrices = [self.encode.weight]
        self.encode.weight.register_hook(lambda gradient: gradient / 2)
        self.head = nn.Linear(12, num_classes)

    def forward(self, x):
        hidden = torch.tanh(self.encode(x.flatten(1)))
        back = F.linear(hidden, self.matrices[0].T)
        return self.head(torch.tanh(self.again(back)))


class OneParameter(nn.Module):
    """A network of one parameter: logits from the distance of the scaled mean brightness to a constant per class."""

    def __init__(self, num_classes):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("classes", torch.arange(num_classes).float())

    def forward(self, x):
        return -(x.mean((1, 2, 3))[:, None] * self.scale - self.classes / len(self.classes)).square()


class Lazy(nn.Module):
    """Lazy modules, whose sizes are inferred from the first batch."""

    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Sequential(
            nn.LazyConv2d(6, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(num_classes)
        )

    def forward(self, x):
        return self.body(x)


def function(image_shape, num_classes, width: int = 6):
    """Return a partly frozen module: a function instead of a class."""
    model = nn.Sequential(
        nn.Conv2d(image_shape[0], width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(4 * width, num_classes),
    )  # fmt: skip
    model[0].weight.requires_grad_(False)
    return model
