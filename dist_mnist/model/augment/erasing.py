"""Random erasing: a box of some images becomes noise."""

import math
from dataclasses import dataclass

import torch

from dist_mnist.model.augment.boxes import box_mask
from dist_mnist.model.stateless_rng import noise, uniform

AREA = 0.02, 0.4  # of a box, as a fraction of the image's
ASPECT = 1 / 0.3  # the most that a box is higher than wide, or wider than high, relative to the image
TRIES = 5  # boxes that are drawn until one fits inside the image, as 97 of 100 do; without, the image stays


@dataclass(frozen=True)
class RandomErasing:
    """Erase a random box of each image with a probability: its pixels become noise between the image's extremes.

    After Zhong, Zheng, Kang, Li and Yang: "Random Erasing Data Augmentation", 2017 (AAAI 2020): their limits of area
    and aspect ratio, and their best filling, random values. The aspect ratio is drawn by its logarithm, so that boxes
    are as often high as wide.
    """

    probability: float = 0.0

    def __call__(self, images: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) of any dtype, erased by random numbers of the keys (B,) int64; float32 if at all."""
        if not self.probability or len(images) == 0:
            return images
        images = images.float()
        coin, down, across, *tries = uniform(keys, 3 + 2 * TRIES).unbind(1)
        height, width, fits = _box(torch.stack(tries, 1).reshape(-1, TRIES, 2), *images.shape[2:])
        top = (down * (images.shape[2] + 1 - height)).long()
        left = (across * (images.shape[3] + 1 - width)).long()
        mask = box_mask((top, top + height), (left, left + width), images)
        mask &= (fits & (coin < self.probability))[:, None, None, None]
        return torch.where(mask, _filling(images, keys), images)


def _box(numbers: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From numbers (B, TRIES, 2) the height and width in pixels (B,) int64 of the first box that fits, if any does."""
    area = AREA[0] + (AREA[1] - AREA[0]) * numbers[..., 0]
    stretch = torch.exp((numbers[..., 1] - 0.5) * math.log(ASPECT))  # the root of height over width
    down, across = area.sqrt() * stretch, area.sqrt() / stretch  # (B, TRIES), of the image's sides
    fits = (down <= 1) & (across <= 1)
    first = fits.byte().argmax(1, keepdim=True)
    down, across = down.gather(1, first)[:, 0], across.gather(1, first)[:, 0]
    return _pixels(down, height), _pixels(across, width), fits.any(1)


def _pixels(fraction: torch.Tensor, side: int) -> torch.Tensor:
    return (fraction * side).round().clamp(min=1, max=side).long()


def _filling(images: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Noise in the shape of images (B, C, H, W) float32, evenly spread between the extremes of each."""
    low, high = (extreme((1, 2, 3), keepdim=True) for extreme in (images.amin, images.amax))
    # ~: other numbers than the box's
    return low + (high - low) * noise(~keys, images[0].numel()).reshape(images.shape)
