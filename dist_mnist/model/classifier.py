"""The base class of all networks: raw pixels in, logits out."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, TypeVar

import torch
from numpy.typing import ArrayLike
from torch import nn

from dist_mnist.model.augment.affine import RandomAffine
from dist_mnist.model.layers.dropout import dropout_keys as using_keys
from dist_mnist.model.losses import average_predictions

Predictor = Callable[[torch.Tensor], torch.Tensor]


class Classifier(nn.Module):
    """A network that normalises its pixels and can use test-time augmentation (TTA).

    Subclasses implement `logits` for normalised images.

    Args:
        image_shape: channels, height, width.
        pixel_mean, pixel_std: (C,) each; pixels become (pixel - mean) / std.
        views: number of views of each image whose predictions are averaged in eval mode: the image itself and pairs of
            transformed ones; 1 turns TTA off.
        warp: the transform of the other views.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        pixel_mean: ArrayLike = (0.0,),
        pixel_std: ArrayLike = (1.0,),
        views: int = 1,
        warp: RandomAffine | None = None,
    ):
        super().__init__()
        self.image_shape = image_shape
        self.pixel_mean: torch.Tensor
        self.pixel_std: torch.Tensor
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean, dtype=torch.float32).reshape(-1, 1, 1))
        self.register_buffer("pixel_std", torch.tensor(pixel_std, dtype=torch.float32).reshape(-1, 1, 1))
        self.warp = warp or RandomAffine()
        self.changes: torch.Tensor | None  # of the other views: random transforms in pairs, each with its opposite
        self.register_buffer("changes", self.warp.antithetic(views // 2) if views > 1 else None, persistent=False)

        self.frozen_norms: list[nn.Module] = []  # layers whose running statistics are frozen

    @property
    def inner(self) -> nn.Module:
        """The module whose parameter names users know."""
        return self

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits (B, num_classes) for normalised images (B, C, H, W) float32."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> "Classifier":
        """Set train or eval mode, as `nn.Module.train` does; frozen layers stay in eval mode."""
        super().train(mode)
        for norm in self.frozen_norms:
            norm.eval()
        return self

    def forward(self, images: torch.Tensor, dropout_keys: torch.Tensor | None = None) -> torch.Tensor:
        """Return logits (B, num_classes) for raw images (B, C, H, W) of any dtype.

        In eval mode with test-time augmentation they are the logits of the mean probabilities over the views.

        Args:
            dropout_keys: (B,) int64, each sample's key for dropout (see `stateless_rng`); None uses torch's generator.
        """
        if self.training or self.changes is None:
            return self.forward_single(images, dropout_keys)
        others = (self.warp.transform(images, numbers) for numbers in self.changes.split(1))
        return average_predictions([self.forward_single(view) for view in chain([images], others)]).float()

    def forward_single(self, images: torch.Tensor, dropout_keys: torch.Tensor | None = None) -> torch.Tensor:
        """Return logits as `forward` does, without test-time augmentation."""
        with using_keys(dropout_keys):
            return self.logits((images.float() - self.pixel_mean) / self.pixel_std)

    @property
    def views(self) -> int:
        """The number of views of each image in eval mode; 1 without test-time augmentation."""
        return 1 if self.changes is None else 1 + len(self.changes)

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that are not frozen, each once."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def num_parameters(self) -> int:
        """Return the number of scalars in all parameters, frozen ones included."""
        return sum(parameter.numel() for parameter in self.parameters())


class Wrapped(Classifier):
    """A classifier around any module that returns logits for normalised images.

    `channels_last` says whether the module gets images in that memory format, which is the loader's.
    """

    channels_last = True

    def __init__(self, module: nn.Module, *arguments: Any, **more: Any):
        super().__init__(*arguments, **more)
        self.module = module

    @property
    def inner(self) -> nn.Module:
        """The wrapped module."""
        return self.module

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Return the module's output."""
        if not self.channels_last:  # images of one channel count as contiguous; the view gives them the usual strides
            images = images.contiguous().view(images.shape)
        return self.module(images)


M = TypeVar("M", bound=nn.Module)


def copy_network(model: M) -> M:
    """Return a copy of a module; tensors that it keeps from a forward pass are detached."""
    kept = [value for layer in model.modules() for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    return copy.deepcopy(model, {id(value): value.detach() for value in kept if not value.is_leaf})


@contextmanager
def unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """Restore all buffers of a model after a `with` block."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    yield
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(before.get(name, buffer))  # new buffers are kept


def to_device(model: Classifier, device: torch.device) -> Classifier:
    """Move a network to a device, with the memory format of its weights that is fastest there.

    cuDNN has faster kernels for contiguous weights of one input channel. In channels-last format they lie in the same
    order and differ only in a stride that is never used; CPUs are faster with that one.
    """
    model = model.to(device)
    for parameter in model.parameters():
        if parameter.is_cuda and parameter.dim() == 4 and parameter.shape[1] == 1:
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    return model
