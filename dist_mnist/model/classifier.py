"""What every network here is: pixels as they stand in the file go in, logits come out."""

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
    """A network with the normalisation of its pixels, and test-time augmentation (TTA).

    Subclasses have `logits`, which are given normalised images.

    Args:
        image_shape: channels, height, width.
        pixel_mean, pixel_std: (C,) each; pixels become (pixel - mean) / std.
        views: of each image, which are averaged in eval mode, the image itself and pairs of changed ones; 1 for none.
        warp: the others' changes.
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
        self.changes: torch.Tensor | None
        self.register_buffer("changes", self.warp.antithetic(views // 2) if views > 1 else None, persistent=False)

        self.frozen_norms: list[nn.Module] = []  # layers whose running statistics stay

    @property
    def inner(self) -> nn.Module:
        """The module by whose names parameters are known to users."""
        return self

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """(B, num_classes) of normalised images (B, C, H, W) float32."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> "Classifier":
        """As every module's, but that frozen layers stay in eval mode."""
        super().train(mode)
        for norm in self.frozen_norms:
            norm.eval()
        return self

    def forward(self, images: torch.Tensor, dropout_keys: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (B, num_classes) of images (B, C, H, W), any dtype, as they stand in the file.

        In eval mode with test-time augmentation they are of the mean of the probabilities over the views.

        Args:
            dropout_keys: (B,) int64, each sample's key for its dropped units (see `stateless_rng`); without, torch's
                own generator is used.
        """
        if self.training or self.changes is None:
            return self.forward_single(images, dropout_keys)
        others = (self.warp.transform(images, numbers) for numbers in self.changes.split(1))
        return average_predictions([self.forward_single(view) for view in chain([images], others)]).float()

    def forward_single(self, images: torch.Tensor, dropout_keys: torch.Tensor | None = None) -> torch.Tensor:
        """The same without test-time augmentation."""
        with using_keys(dropout_keys):
            return self.logits((images.float() - self.pixel_mean) / self.pixel_std)

    @property
    def views(self) -> int:
        """Of each image in eval mode; 1 without test-time augmentation."""
        return 1 if self.changes is None else 1 + len(self.changes)

    def trained_parameters(self) -> list[nn.Parameter]:
        """The parameters that are not frozen, each once."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def num_parameters(self) -> int:
        """Numbers in the network that are trained, or could be."""
        return sum(parameter.numel() for parameter in self.parameters())


class Wrapped(Classifier):
    """Any module that makes logits of normalised images, as a classifier.

    `channels_last` says whether the module is given images in that memory order, as the loader has them.
    """

    channels_last = True

    def __init__(self, module: nn.Module, *arguments: Any, **more: Any):
        super().__init__(*arguments, **more)
        self.module = module

    @property
    def inner(self) -> nn.Module:
        """The module itself."""
        return self.module

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """What the module gives."""
        if not self.channels_last:  # of images of one channel, which are in either order, a view has the usual strides
            images = images.contiguous().view(images.shape)
        return self.module(images)


M = TypeVar("M", bound=nn.Module)


def copy_network(model: M) -> M:
    """A copy of a module, without the history by which a tensor that it keeps from a forward pass has a gradient."""
    kept = [value for layer in model.modules() for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    return copy.deepcopy(model, {id(value): value.detach() for value in kept if not value.is_leaf})


@contextmanager
def unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """Leave all buffers of a model as they were before a `with` block."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    yield
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(before.get(name, buffer))  # what is new stays


def to_device(model: Classifier, device: torch.device) -> Classifier:
    """The network on a device, its weights laid out as is fastest there.

    cuDNN has faster kernels for weights of one input channel if they stand row by row. Channels-last they are in the
    same order, but for a stride that is never used; CPUs are faster with that.
    """
    model = model.to(device)
    for parameter in model.parameters():
        if parameter.is_cuda and parameter.dim() == 4 and parameter.shape[1] == 1:
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    return model
