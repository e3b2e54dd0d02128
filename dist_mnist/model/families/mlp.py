"""A multilayer perceptron."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from dist_mnist.utils.errors import UserError


class MLP(nn.Module):
    """Dense layers over all pixels, each with layer normalisation, GELU and dropout; then a linear head.

    Args:
        image_shape: channels, height, width.
        num_classes: outputs.
        widths: units of each hidden layer.
        dropout: fraction of each hidden layer's units that is dropped in training.

    Raises:
        UserError: there are more than 100 layers.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        widths: Sequence[int] = (512, 256),
        dropout: float = 0.1,
    ):
        super().__init__()
        if len(widths) > 100:
            raise UserError(f"--model-args: widths has {len(widths)} layers; at most 100 are built")
        layers: list[nn.Module] = [nn.Flatten()]
        features = math.prod(image_shape)
        for width in widths:
            layers += [nn.Linear(features, width), nn.LayerNorm(width), nn.GELU(), nn.Dropout(dropout)]
            features = width
        self.layers = nn.Sequential(*layers, nn.Linear(features, num_classes))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (B, num_classes) of images (B, C, H, W) float32."""
        return self.layers(images)
