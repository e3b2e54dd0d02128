"""Pictures in and out: what people draw and photograph as images that a network knows, and images as a sheet to see.

MNIST's digits were "size normalized to fit in a 20x20 pixel box while preserving their aspect ratio" and "centered in a
28x28 image by computing the center of mass of the pixels" (LeCun, Cortes, Burges: http://yann.lecun.com/exdb/mnist/);
light on a dark ground that is zero. `as_network_sees` does the same, or its negative for a network that knows that.
"""

import warnings
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from dist_mnist.data.convert.pictures import MOST_PIXELS, eight_bits, is_transparent, load_picture
from dist_mnist.evaluation.choices import Fit
from dist_mnist.utils.errors import UserError

BOX = 20 / 28  # of an image's side, which a digit fills
FAINT = 0.15  # of the strongest ink, below which it is the paper's grain
BLANK = "{}: nothing stands out from its ground, so there is no digit to see"
CONTRAST = 16  # of 255, the least between ink and paper
ENOUGH = 1024  # pixels of the longer side, which a large picture keeps at least when it is reduced


def read_picture(file: BinaryIO, name: str, most_pixels: int = MOST_PIXELS) -> np.ndarray:
    """The pixels of a picture in any usual format, upright: (H, W, 3) uint8; what is transparent shows the contrast.

    Raises:
        UserError: it is none, is damaged, or has more than `most_pixels`, which is told before it is decoded.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of large pictures and oddities; load_picture refuses what is too large
        picture = eight_bits(load_picture(file, name, most_pixels=most_pixels), name)
        if not is_transparent(picture):
            return np.asarray(picture.convert("RGB"))
        picture = picture.convert("RGBA")
        grey, alpha = np.asarray(picture.convert("L")), np.asarray(picture.getchannel("A"))
        light = np.multiply(grey, alpha, dtype=np.uint16).sum() > 127.5 * max(alpha.sum(), 1)
        ground = Image.new("RGBA", picture.size, "black" if light else "white")
        return np.asarray(Image.alpha_composite(ground, picture).convert("RGB"))


def as_network_sees(
    pixels: np.ndarray, shape: tuple[int, int, int], fit: Fit, name: str, light_ground: bool = False
) -> np.ndarray:
    """A picture (H, W) or (H, W, C) uint8 as an image of a network's `shape` (C, H, W): (H, W, C) uint8.

    Args:
        fit: "digit" finds what is drawn, then scales and centres it as MNIST's digits; "whole" scales the whole
            picture; "auto" is "digit", but leaves pictures alone that have the network's size already.
        light_ground: whether the network's images are dark on light. In grey, a picture becomes like them in each
            case: where its edge is light and theirs are dark, or the other way round, it is turned into its negative.

    Raises:
        UserError: nothing stands out from the ground, or networks of so many channels know no pictures.
    """
    channels, height, width = shape
    pixels = pixels if pixels.ndim == 3 else pixels[:, :, np.newaxis]
    if channels not in (1, 3) or pixels.shape[2] not in (1, 3):
        raise UserError(f"{name}: pictures have 1 or 3 channels; this network's images have {channels}")
    if channels == 3:
        whole = Image.fromarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)).copy())
        return np.asarray(ImageOps.pad(whole, (width, height)))
    grey = pixels[:, :, 0] if pixels.shape[2] == 1 else np.asarray(Image.fromarray(pixels).convert("L"))
    image = _on_dark(grey, height, width, fit, name)[:, :, np.newaxis]
    return 255 - image if light_ground else image


def _on_dark(grey: np.ndarray, height: int, width: int, fit: Fit, name: str) -> np.ndarray:
    """A picture (h, w) as an image (height, width) with a dark ground."""
    ground = np.median(np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]]))
    grey, ground = (255 - grey, 255 - ground) if ground > 127.5 else (grey, ground)
    if fit == Fit.AUTO and grey.shape == (height, width):
        if np.ptp(grey) < CONTRAST:
            raise UserError(BLANK.format(name))
        return grey
    if fit == Fit.WHOLE:
        return np.asarray(ImageOps.pad(Image.fromarray(grey), (width, height), color=int(ground)))
    grey = _reduced(grey)
    return _as_digit(_ink(grey - _lighting(grey), name), height, width)


def _reduced(grey: np.ndarray) -> np.ndarray:
    """A picture (h, w) in which a digit is looked for; if it is large, with fewer pixels, for less time and memory."""
    factor = max(grey.shape) // ENOUGH
    return np.asarray(Image.fromarray(grey).reduce(factor)) if factor > 1 else grey


def _lighting(grey: np.ndarray) -> np.ndarray:
    """The ground (h, w) as if the picture were empty: the plane that fits its edge best, for light from one side."""
    rows, columns = np.indices(grey.shape)
    edge = np.ones(grey.shape, bool)
    edge[1:-1, 1:-1] = False
    coordinates = np.stack([np.ones_like(rows), rows, columns], -1).astype(float)
    plane, *_ = np.linalg.lstsq(coordinates[edge], grey[edge].astype(float), rcond=None)
    return coordinates @ plane


def _ink(above: np.ndarray, name: str) -> np.ndarray:
    """(h, w) in 0 to 1, cut to where something is, of values above the ground's."""
    strongest = np.percentile(above, 99.9) if above.size > 10_000 else above.max()
    if strongest < CONTRAST:
        raise UserError(BLANK.format(name))
    ink = np.clip((above / strongest - FAINT) / (1 - FAINT), 0, 1)
    rows, columns = (np.flatnonzero((ink > FAINT).any(axis)) for axis in (1, 0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _as_digit(ink: np.ndarray, height: int, width: int) -> np.ndarray:
    """Ink scaled to the box, its centre of mass in the middle of (height, width): uint8."""
    scale = BOX * min(height, width) / max(ink.shape)
    size = [max(1, round(side * scale)) for side in ink.shape[::-1]]
    small = np.asarray(Image.fromarray(ink.astype(np.float32)).resize(size, Image.Resampling.LANCZOS)).clip(0, 1)
    small = small / small.max()  # thin lines fade when they are made small
    centre = [(small.sum(1 - axis) * np.arange(small.shape[axis])).sum() / small.sum() for axis in (0, 1)]
    image = np.zeros((height, width))
    centred = [round(side / 2 - middle) for side, middle in zip((height, width), centre, strict=True)]
    top, left = np.clip(centred, 0, np.subtract((height, width), small.shape))
    image[top : top + small.shape[0], left : left + small.shape[1]] = small
    return np.round(255 * image).astype(np.uint8)
