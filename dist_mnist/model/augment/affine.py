"""Random affine transforms of whole batches on their device."""

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from dist_mnist.config.settings import Config
from dist_mnist.model.stateless_rng import key_of, uniform


@dataclass(frozen=True)
class RandomAffine:
    """A random affine transform of each image: rotation, scaling, shear and translation, and a horizontal flip.

    Pixels from outside the image are zeros, MNIST's background.

    Args:
        rotate: largest rotation, in degrees.
        scale: largest relative change of size.
        shear: largest shear, in degrees.
        shift: largest translation along each axis, in pixels.
        flip: whether half of the images are flipped horizontally.
    """

    rotate: float = 0.0
    scale: float = 0.0
    shear: float = 0.0
    shift: float = 0.0
    flip: bool = False

    @classmethod
    def of(cls, config: Config) -> "RandomAffine":
        """Return the transform that a run's settings describe."""
        return cls(config.rotate, config.scale, config.shear, config.shift, config.flip)

    def __call__(self, images: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Transform images (B, C, H, W) of any dtype by random numbers from keys (B,) int64; float32 unless off."""
        if self == RandomAffine() or len(images) == 0:
            return images
        return self.transform(images, _numbers(keys))

    def antithetic(self, pairs: int) -> torch.Tensor:
        """Return fixed numbers (2 * pairs, 6) in -1 to 1 for `transform`: each row, and its negative."""
        numbers = _numbers(torch.tensor([key_of("view", pair) for pair in range(pairs)], dtype=torch.int64))
        return torch.cat([numbers, -numbers])

    def transform(self, images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Transform images (B, C, H, W) by numbers (B, 6) in -1 to 1, or all in the same way by (1, 6); float32."""
        height, width = images.shape[2:]
        matrices = self._matrices(numbers, height, width)
        grid = F.affine_grid(matrices, [len(numbers), 1, height, width], align_corners=False)
        grid = grid.expand(images.shape[0], -1, -1, -1)
        return F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    def _matrices(self, numbers: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Return matrices (B, 2, 3) for numbers (B, 6) in -1 to 1: from new to old points, in units of half a side."""
        turn, grow, slant, right, down, coin = numbers.unbind(1)
        angle, slope = turn * math.radians(self.rotate), torch.tan(slant * math.radians(self.shear))
        zoom = 1 / (1 + grow * self.scale)
        cosine, sine = zoom * torch.cos(angle), zoom * torch.sin(angle)
        across, along = right * (2 * self.shift / width), down * (2 * self.shift / height)
        aspect = height / width
        rows = [cosine, (cosine * slope - sine) * aspect, across, sine / aspect, sine * slope + cosine, along]
        matrices = torch.stack(rows, 1).reshape(-1, 2, 3)
        if self.flip:
            matrices[:, 0] *= torch.where(coin < 0, -1.0, 1.0)[:, None]
        return matrices


def _numbers(keys: torch.Tensor) -> torch.Tensor:
    """Return numbers (B, 6) float32 in -1 to 1 from keys (B,) int64."""
    return uniform(keys, 6) * 2 - 1
