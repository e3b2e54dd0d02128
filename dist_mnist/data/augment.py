"""Augmentation of whole batches on their device, each sample by random numbers of its own."""

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from dist_mnist.draws import uniform


@dataclass(frozen=True)
class Affine:
    """A random rotation, change of size, shear and shift of each image.

    Zeros, which are MNIST's background, move in from outside.

    Args:
        rotate: largest rotation, in degrees.
        scale: largest change of size, as a part of 1.
        shear: largest shear, in degrees.
        shift: largest shift along each axis, in pixels.
    """

    rotate: float = 0.0
    scale: float = 0.0
    shear: float = 0.0
    shift: float = 0.0

    def __call__(self, images: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) of any dtype, changed as the keys (B,) int64 say; float32 if changed."""
        if not (self.rotate or self.scale or self.shear or self.shift) or len(images) == 0:
            return images
        grid = F.affine_grid(self._matrices(keys, *images.shape[2:]), list(images.shape), align_corners=False)
        return F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    def _matrices(self, keys: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """(B, 2, 3): for each point of the new image, in units of half its side, the point of the old one."""
        turn, grow, slant, right, down = (uniform(keys, 5) * 2 - 1).unbind(1)
        angle, slope = turn * math.radians(self.rotate), torch.tan(slant * math.radians(self.shear))
        zoom = 1 / (1 + grow * self.scale)
        cosine, sine = zoom * torch.cos(angle), zoom * torch.sin(angle)
        across, along = right * (2 * self.shift / width), down * (2 * self.shift / height)
        aspect = height / width
        rows = [cosine, (cosine * slope - sine) * aspect, across, sine / aspect, sine * slope + cosine, along]
        return torch.stack(rows, 1).reshape(-1, 2, 3)
