"""A small residual network for small images.

After He, Zhang, Ren and Sun: "Identity Mappings in Deep Residual Networks", ECCV 2016 (normalisation and ReLU before
each convolution), with three stages like their networks for CIFAR.
"""

import torch
from torch import nn
from torch.nn import functional as F

from dist_mnist.utils.errors import UserError


class ResNet(nn.Module):
    """A convolution, three stages of residual blocks with 1, 2 and 4 times `width` channels, and a linear head.

    The second and third stage halve the image's sides. The defaults have 695 658 parameters for one channel and 10
    classes.

    Args:
        image_shape: channels, height, width.
        num_classes: number of outputs.
        width: channels of the first stage.
        depth: blocks in each stage.
        dropout: dropout probability of the head's inputs.

    Raises:
        UserError: `depth` is above 100.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        width: int = 32,
        depth: int = 2,
        dropout: float = 0.0,
    ):
        super().__init__()
        if depth > 100:
            raise UserError(f"--model-args: depth is {depth}; the limit is 100 blocks per stage")
        self.stem = nn.Conv2d(image_shape[0], width, 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        channels = width
        for stage in range(3):
            for block in range(depth):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(Block(channels, width << stage, stride))
                channels = width << stage
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.head = nn.Linear(channels, num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits (B, num_classes) for images (B, C, H, W) float32."""
        features = F.relu(self.norm(self.blocks(self.stem(images)))).mean((2, 3))
        return self.head(self.dropout(features))


class Block(nn.Module):
    """Two 3x3 convolutions with a skip connection, which is a 1x1 convolution where size or channels change."""

    def __init__(self, fan_in: int, fan_out: int, stride: int):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(fan_in)
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(fan_out)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, padding=1, bias=False)
        same = stride == 1 and fan_in == fan_out
        self.shortcut = None if same else nn.Conv2d(fan_in, fan_out, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, fan_in, H, W) to (B, fan_out, H / stride, W / stride)."""
        normal = F.relu(self.norm1(x))
        around = x if self.shortcut is None else self.shortcut(normal)
        return around + self.conv2(F.relu(self.norm2(self.conv1(normal))))
