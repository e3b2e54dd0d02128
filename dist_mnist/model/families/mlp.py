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
        num_classes: number of outputs.
        widths: units of each hidden layer.
        dropout: dropout probability of each hidden layer.

    Raises:
        UserError: there are more than 100 hidden layers.
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
            raise UserError(f"--model-args: widths has {len(widths)} layers; the limit is 100")
        layers: list[nn.Module] = [nn.Flatten()]
        features = math.prod(image_shape)
        for width in widths:
            layers += [nn.Linear(features, width), nn.LayerNorm(width), nn.GELU(), nn.Dropout(dropout)]
            features = width
        self.layers = nn.Sequential(*layers, nn.Linear(features, num_classes))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits (B, num_classes) for images (B, C, H, W) float32."""
        return self.layers(images)
