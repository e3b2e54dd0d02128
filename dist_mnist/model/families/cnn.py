"""The CNN family: the notebook's network and its variants."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from numpy.typing import ArrayLike
from torch import nn
from torch.nn import functional as F

from dist_mnist.config.stages import Stages
from dist_mnist.model.augment.affine import RandomAffine
from dist_mnist.model.classifier import Classifier
from dist_mnist.model.layers.dropout import KeyedDropout
from dist_mnist.model.stateless_rng import key_of


class CNN(Classifier):
    """Convolution stages that each halve an image, then dense layers, dropout and a linear head.

    The defaults are the notebook's network for 28x28 images in 10 classes, with 3 274 634 parameters. The input is raw
    pixels: their normalisation is part of the network.

    Args:
        image_shape: channels, height, width.
        num_classes: number of outputs.
        conv_channels: output channels of each stage's convolutions.
        strided_stages: number of first stages that end in a convolution of stride 2; the others end in 2x2 max-pooling.
        conv_layers: convolutions in each stage.
        kernel_size: side of the kernels (odd).
        padding: "same" (convolutions keep the image size) or "valid" (no padding).
        dense_units: units of each dense layer.
        dropout: dropout probability after the last dense layer, to the nearest 2^-16.
        batch_norm: "none", "dense" or "all".
        pool_first: whether a stage's pooling comes before its last batch normalisation.
        weight_init: "glorot" or "fan_in".
        pixel_mean, pixel_std: (C,) each; pixels become (pixel - mean) / std.
        views: test-time augmentation (TTA): number of views of each image whose predictions are averaged in eval mode,
            the image itself and pairs of transformed ones; 1 turns TTA off.
        warp: the transform of the other views.
        seed: seed of the initial weights.

    Raises:
        UserError: the images are too small for the number of stages.

    Example:
        >>> import torch
        >>> from dist_mnist import CNN
        >>> network = CNN((1, 28, 28), num_classes=10, conv_channels=(8, 16), dense_units=(32,))
        >>> network(torch.zeros(5, 1, 28, 28, dtype=torch.uint8)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (1, 28, 28),
        num_classes: int = 10,
        *,
        conv_channels: Sequence[int] = (32, 64),
        strided_stages: int = 0,
        conv_layers: int = 1,
        kernel_size: int = 5,
        padding: str = "same",
        dense_units: Sequence[int] = (1024,),
        dropout: float = 0.4,
        batch_norm: str = "none",
        pool_first: bool = False,
        weight_init: str = "glorot",
        pixel_mean: ArrayLike = (0.0,),
        pixel_std: ArrayLike = (1.0,),
        views: int = 1,
        warp: RandomAffine | None = None,
        seed: int = 0,
    ):
        super().__init__(image_shape, pixel_mean, pixel_std, views, warp)
        channels, height, width = image_shape
        halving = Stages.of(len(conv_channels), strided_stages, conv_layers, kernel_size, padding)
        halving.check(height, width)
        norm = batch_norm == "all"
        pixels_beyond = kernel_size // 2 if padding == "same" else 0
        stages = []
        for stage, out_channels in enumerate(conv_channels):
            widths = [channels] + [out_channels] * conv_layers
            layers = _conv_stage(widths, kernel_size, pixels_beyond, norm, strided=stage < strided_stages)
            if stage >= strided_stages:
                # ReLU and max-pooling commute: in this order ReLU works on a quarter of the values.
                layers.insert(-2 if norm and pool_first else -1, nn.MaxPool2d(2))
            stages.append(nn.Sequential(*layers))
            channels = out_channels
        self.stages = nn.Sequential(*stages)

        self.height = halving.output(height)
        features = channels * self.height * halving.output(width)  # inputs of the dense layers
        dense = []
        for units in dense_units:
            dense.append(_dense_layer(features, units, batch_norm != "none"))
            features = units
        self.dense = nn.Sequential(*dense)
        self.dropout = KeyedDropout(dropout) if dropout else nn.Identity()
        self.head = nn.Linear(features, num_classes)
        _initialise(self, weight_init, seed)

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits; features of images that are cropped on all sides by a multiple of 2^stages are zero-padded."""
        features = self.stages(images)
        if margin := (self.height - features.shape[2]) // 2:
            features = F.pad(features, [margin] * 4)
        # Flattened in H, W, C order, as in TensorFlow: for a channels-last tensor that is a view.
        features = self.dense(features.permute(0, 2, 3, 1).flatten(1))
        return self.head(self.dropout(features))


def _conv_stage(widths: list[int], kernel_size: int, padding: int, norm: bool, strided: bool) -> list[nn.Module]:
    layers: list[nn.Module] = []
    last = len(widths) - 1
    for number, (fan_in, fan_out) in enumerate(pairwise(widths), 1):
        stride = 2 if strided and number == last else 1
        layers.append(nn.Conv2d(fan_in, fan_out, kernel_size, stride, padding, bias=not norm))
        if norm:
            layers.append(nn.BatchNorm2d(fan_out))
        layers.append(nn.ReLU())
    return layers


def _dense_layer(fan_in: int, fan_out: int, norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(fan_in, fan_out, bias=not norm)]
    if norm:
        layers.append(nn.BatchNorm1d(fan_out))
    return nn.Sequential(*layers, nn.ReLU())


@torch.no_grad()
def _initialise(model: nn.Module, weight_init: str, seed: int) -> None:
    """Initialise weights uniformly in ±sqrt(6 / (fan_in + fan_out)), TensorFlow's default (Glorot and Bengio, 2010), or
    in ±sqrt(1 / fan_in), torch's (LeCun et al., 1998); biases to zero.

    Each layer has its own generator, so that its weights depend only on the seed and its name.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            generator = torch.Generator().manual_seed(key_of("init", seed, name) & (1 << 63) - 1)
            if weight_init == "glorot":
                nn.init.xavier_uniform_(layer.weight, generator=generator)
            else:
                nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
