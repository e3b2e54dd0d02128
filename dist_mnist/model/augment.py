"""Augmentation of whole batches on their device, each sample by random numbers of its own."""

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from dist_mnist.config.settings import Config
from dist_mnist.model.stateless_rng import key_of, uniform

POINTS = 5  # control points of an elastic change along each side


@dataclass(frozen=True)
class Warp:
    """A random rotation, change of size, shear, shift and elastic change of each image; half of them mirrored.

    The elastic change moves a grid of 5 x 5 points at random, and what is between them smoothly with them (after
    Simard, Steinkraus and Platt: "Best Practices for Convolutional Neural Networks", ICDAR 2003, who smooth a field of
    random displacements of all pixels instead). Zeros, which are MNIST's background, move in from outside.

    Args:
        rotate: largest rotation, in degrees.
        scale: largest change of size, as a part of 1.
        shear: largest shear, in degrees.
        shift: largest shift along each axis, in pixels.
        elastic: largest elastic displacement of a point along each axis, in pixels.
        flip: whether half of the images are mirrored, left to right.
    """

    rotate: float = 0.0
    scale: float = 0.0
    shear: float = 0.0
    shift: float = 0.0
    elastic: float = 0.0
    flip: bool = False

    @classmethod
    def of(cls, config: Config) -> "Warp":
        """As a run's settings say."""
        return cls(config.rotate, config.scale, config.shear, config.shift, config.elastic, config.flip)

    def __call__(self, images: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) of any dtype, changed as the keys (B,) int64 say; float32 if changed."""
        return images if self == Warp() or len(images) == 0 else self.change(images, self._numbers(keys))

    def opposites(self, pairs: int) -> torch.Tensor:
        """Changes in pairs, once one way and once the other, always the same ones: (2 * pairs, N) in -1 to 1."""
        numbers = self._numbers(torch.tensor([key_of("view", pair) for pair in range(pairs)], dtype=torch.int64))
        return torch.cat([numbers, -numbers])

    def _numbers(self, keys: torch.Tensor) -> torch.Tensor:
        """(B, N) float32 in -1 to 1, which make up a change."""
        return uniform(keys, 6 + 2 * POINTS**2 * bool(self.elastic)) * 2 - 1

    def change(self, images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W), changed as numbers (B, N) in -1 to 1 say, or all alike as (1, N) do; float32."""
        height, width = images.shape[2:]
        affine, elastic = numbers[:, :6], numbers[:, 6:]
        grid = F.affine_grid(
            self._matrices(affine, height, width), [len(numbers), 1, height, width], align_corners=False
        )
        if self.elastic:
            across, along = elastic.reshape(-1, 2, POINTS, POINTS).unbind(1)
            points = torch.stack([across * (2 * self.elastic / width), along * (2 * self.elastic / height)], 1)
            bends = F.interpolate(points, (height, width), mode="bicubic", align_corners=True)
            grid = grid + bends.permute(0, 2, 3, 1)
        grid = grid.expand(images.shape[0], -1, -1, -1)
        return F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    def _matrices(self, numbers: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """(B, 2, 3) from (B, 6) in -1 to 1: for each new point, in units of half a side, the point of the old image."""
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
