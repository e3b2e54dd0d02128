"""Random erasing: a box in some images is replaced by noise."""

import math
from dataclasses import dataclass

import torch

from dist_mnist.model.augment.boxes import box_mask
from dist_mnist.model.stateless_rng import noise, uniform

AREA = 0.02, 0.4  # limits of a box's area, as a fraction of the image's
ASPECT = 1 / 0.3  # largest ratio of a box's height to its width, or width to height, relative to the image's
TRIES = 5  # boxes drawn until one fits inside the image (97 of 100 do); if none does, the image is not changed


@dataclass(frozen=True)
class RandomErasing:
    """Replace a random box of each image, with a probability, by noise between the image's minimum and maximum.

    After Zhong, Zheng, Kang, Li and Yang: "Random Erasing Data Augmentation", 2017 (AAAI 2020), with their limits of
    area and aspect ratio and their best filling, random values. The aspect ratio is log-uniform, so that tall and wide
    boxes are equally likely.
    """

    probability: float = 0.0

    def __call__(self, images: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Erase boxes of images (B, C, H, W), any dtype, by random numbers from keys (B,) int64; float32 unless off."""
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
    """Return height and width in pixels, (B,) int64, of the first box that fits, and whether any does, (B,) bool.

    The boxes come from numbers (B, TRIES, 2) in [0, 1).
    """
    area = AREA[0] + (AREA[1] - AREA[0]) * numbers[..., 0]
    stretch = torch.exp((numbers[..., 1] - 0.5) * math.log(ASPECT))  # square root of height / width
    down, across = area.sqrt() * stretch, area.sqrt() / stretch  # (B, TRIES), as fractions of the image's sides
    fits = (down <= 1) & (across <= 1)
    first = fits.byte().argmax(1, keepdim=True)
    down, across = down.gather(1, first)[:, 0], across.gather(1, first)[:, 0]
    return _pixels(down, height), _pixels(across, width), fits.any(1)


def _pixels(fraction: torch.Tensor, side: int) -> torch.Tensor:
    return (fraction * side).round().clamp(min=1, max=side).long()


def _filling(images: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return noise with the shape of images (B, C, H, W) float32, uniform between the extremes of each image."""
    low, high = (extreme((1, 2, 3), keepdim=True) for extreme in (images.amin, images.amax))
    # ~: a different stream from the box's
    return low + (high - low) * noise(~keys, images[0].numel()).reshape(images.shape)
