"""The CNN family: the notebook's network and its relatives."""

from collections.abc import Callable, Sequence
from itertools import chain, pairwise

import torch
from numpy.typing import ArrayLike
from torch import nn
from torch.nn import functional as F

from dist_mnist.config.settings import Config, check_depth
from dist_mnist.model.augment import RandomAffine
from dist_mnist.model.losses import average_predictions
from dist_mnist.model.stateless_rng import keep_mask, key_of


class CNN(nn.Module):
    """Convolution stages that each end in 2x2 max-pooling, then dense layers, dropout and a linear head.

    With the defaults this is the notebook's network on 28x28 images in 10 classes, with 3 274 634 parameters. Pixels
    enter as they stand in the file: their normalisation is part of the network.

    Args:
        image_shape: channels, height, width.
        num_classes: outputs.
        conv_channels: output channels of each stage's convolutions.
        conv_layers: convolutions in each stage.
        kernel_size: side of the kernels (odd); images keep their size.
        dense_units: units of each dense layer.
        dropout: fraction of the last dense layer's units that is dropped in training, to the nearest 2^-16.
        batch_norm: "none", "dense" or "all".
        pixel_mean, pixel_std: (C,) each; pixels become (pixel - mean) / std.
        views: test-time augmentation (TTA): so many views of each image are averaged in eval mode, the image itself and
            pairs of changed ones; 1 for none.
        warp: the others' changes.
        seed: of the initial weights.

    Raises:
        UserError: the images are too small for that many pooling stages.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (1, 28, 28),
        num_classes: int = 10,
        *,
        conv_channels: Sequence[int] = (32, 64),
        conv_layers: int = 1,
        kernel_size: int = 5,
        dense_units: Sequence[int] = (1024,),
        dropout: float = 0.4,
        batch_norm: str = "none",
        pixel_mean: ArrayLike = (0.0,),
        pixel_std: ArrayLike = (1.0,),
        views: int = 1,
        warp: RandomAffine | None = None,
        seed: int = 0,
    ):
        super().__init__()
        channels, height, width = image_shape
        check_depth(len(conv_channels), height, width)
        self.image_shape = image_shape
        self.pixel_mean: torch.Tensor
        self.pixel_std: torch.Tensor
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean, dtype=torch.float32).reshape(-1, 1, 1))
        self.register_buffer("pixel_std", torch.tensor(pixel_std, dtype=torch.float32).reshape(-1, 1, 1))
        self.drop = round(dropout * 2**16) / 2**16
        self.warp = warp or RandomAffine()
        self.changes: torch.Tensor | None
        self.register_buffer("changes", self.warp.antithetic(views // 2) if views > 1 else None, persistent=False)

        norm = batch_norm == "all"
        stages = []
        for out_channels in conv_channels:
            widths = [channels] + [out_channels] * conv_layers
            stages.append(_conv_stage(widths, kernel_size, norm))
            channels = out_channels
        self.stages = nn.Sequential(*stages)

        self.height = height >> len(conv_channels)  # of what the dense layers see
        features = channels * self.height * (width >> len(conv_channels))
        dense = []
        for units in dense_units:
            dense.append(_dense_layer(features, units, batch_norm != "none"))
            features = units
        self.dense = nn.Sequential(*dense)
        self.head = nn.Linear(features, num_classes)
        _glorot_uniform(self, seed)

    def forward(self, images: torch.Tensor, dropout_keys: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (B, num_classes) of images (B, C, H, W), any dtype, as they stand in the file.

        In eval mode with test-time augmentation they are of the mean of the probabilities over the views.

        Of images that are cropped on all sides alike, by a multiple of 2^stages, the features beyond count as zero.

        Args:
            dropout_keys: (B,) int64, each sample's key for its dropped units (see `stateless_rng`); without, torch's
                own generator is used in train mode, and none are dropped in eval mode.
        """
        if self.training or self.changes is None:
            return self.forward_single(images, dropout_keys)
        others = (self.warp.transform(images, numbers) for numbers in self.changes.split(1))
        return average_predictions([self.forward_single(view) for view in chain([images], others)]).float()

    def forward_single(self, images: torch.Tensor, dropout_keys: torch.Tensor | None = None) -> torch.Tensor:
        """The same without test-time augmentation."""
        features = self.stages((images.float() - self.pixel_mean) / self.pixel_std)
        if margin := (self.height - features.shape[2]) // 2:
            features = F.pad(features, [margin] * 4)
        # Flattened in H, W, C order, as TensorFlow does: of a channels-last tensor that is a view.
        features = self.dense(features.permute(0, 2, 3, 1).flatten(1))
        if dropout_keys is not None and self.drop:
            keep = keep_mask(dropout_keys, features.shape[1], self.drop)
            features = features * keep / (1 - self.drop)  # masked_fill takes twice as long on CPUs
        elif self.training:
            features = F.dropout(features, self.drop)
        return self.head(features)

    @property
    def views(self) -> int:
        """Of each image in eval mode; 1 without test-time augmentation."""
        return 1 if self.changes is None else 1 + len(self.changes)

    def num_parameters(self) -> int:
        """Trainable numbers in the network."""
        return sum(parameter.numel() for parameter in self.parameters())


def _conv_stage(widths: list[int], kernel_size: int, norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers.append(nn.Conv2d(fan_in, fan_out, kernel_size, padding="same", bias=not norm))
        if norm:
            layers.append(nn.BatchNorm2d(fan_out))
        layers.append(nn.ReLU())
    # ReLU and max-pooling commute: in this order ReLU works on a quarter of the values.
    layers.insert(-1, nn.MaxPool2d(2))
    return nn.Sequential(*layers)


def _dense_layer(fan_in: int, fan_out: int, norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(fan_in, fan_out, bias=not norm)]
    if norm:
        layers.append(nn.BatchNorm1d(fan_out))
    return nn.Sequential(*layers, nn.ReLU())


@torch.no_grad()
def _glorot_uniform(model: nn.Module, seed: int) -> None:
    """Weights uniform in ±sqrt(6 / (fan_in + fan_out)), biases zero: TensorFlow's defaults (Glorot and Bengio, 2010).

    Each layer draws from a generator of its own, so that a layer's weights depend on the seed and its name alone.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            generator = torch.Generator().manual_seed(key_of("init", seed, name) & (1 << 63) - 1)
            nn.init.xavier_uniform_(layer.weight, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def build_model(
    config: Config,
    image_shape: tuple[int, int, int],
    num_classes: int,
    pixel_mean: ArrayLike | None = None,
    pixel_std: ArrayLike | None = None,
) -> CNN:
    """The network that `config` describes; without pixel statistics, for weights that bring their own."""
    model = CNN(
        image_shape,
        num_classes,
        conv_channels=config.conv_channels,
        conv_layers=config.conv_layers,
        kernel_size=config.kernel_size,
        dense_units=config.dense_units,
        dropout=config.dropout,
        batch_norm=config.batch_norm,
        pixel_mean=[0.0] * image_shape[0] if pixel_mean is None else pixel_mean,
        pixel_std=[1.0] * image_shape[0] if pixel_std is None else pixel_std,
        views=config.views,
        warp=RandomAffine.of(config),
        seed=config.seed,
    )
    return model.to(memory_format=torch.channels_last) if config.channels_last else model  # type: ignore[call-overload]


def to_device(model: CNN, device: torch.device) -> CNN:
    """The network on a device, its weights laid out as is fastest there.

    cuDNN has faster kernels for weights of one input channel if they stand row by row. Channels-last they are in the
    same order, but for a stride that is never used; CPUs are faster with that.
    """
    model = model.to(device)
    for parameter in model.parameters():
        if parameter.is_cuda and parameter.dim() == 4 and parameter.shape[1] == 1:
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    return model


Predictor = Callable[[torch.Tensor], torch.Tensor]
