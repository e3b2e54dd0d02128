"""Conversion of drawings and photographs to a network's input images.

MNIST's digits were "size normalized to fit in a 20x20 pixel box while preserving their aspect ratio" and "centered in a
28x28 image by computing the center of mass of the pixels" (LeCun, Cortes, Burges: http://yann.lecun.com/exdb/mnist/);
they are light on a dark background of zeros. `as_network_sees` does the same, and inverts the result for networks that
were trained on dark on light.
"""

import warnings
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from dist_mnist.data.convert.pictures import MOST_PIXELS, eight_bits, is_transparent, load_picture
from dist_mnist.evaluation.choices import Fit
from dist_mnist.utils.errors import UserError

BOX = 20 / 28  # longer side of a digit, as a fraction of the image's shorter side
FAINT = 0.15  # fraction of the strongest ink; anything fainter is paper grain
BLANK = "{}: nothing stands out from the background, so no digit can be found"
CONTRAST = 16  # least difference between ink and paper, of 255
ENOUGH = 1024  # least pixels of the longer side after a large picture is reduced


def read_picture(file: BinaryIO, name: str, most_pixels: int = MOST_PIXELS) -> np.ndarray:
    """Read a picture of any usual format, upright: (H, W, 3) uint8; transparency becomes a contrasting background.

    Raises:
        UserError: the file is not a picture, is damaged, or has more than `most_pixels` (checked before decoding).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about large or odd pictures; load_picture refuses those that are too large
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
    """Convert a picture (H, W) or (H, W, C) uint8 to a network's input of `shape` (C, H, W): (H, W, C) uint8.

    Args:
        fit: "digit" finds the drawn digit, then scales and centres it like MNIST's; "whole" scales the whole picture;
            "auto" is "digit", but does not scale a picture that already has the network's size.
        light_ground: whether the network was trained on images that are dark on light. A gray picture is inverted if
            its background differs from theirs, judged by its edge.

    Raises:
        UserError: nothing stands out from the background, or the picture or the network has neither 1 nor 3 channels.
    """
    channels, height, width = shape
    pixels = pixels if pixels.ndim == 3 else pixels[:, :, np.newaxis]
    if channels not in (1, 3) or pixels.shape[2] not in (1, 3):
        raise UserError(f"{name}: pictures have 1 or 3 channels; this network's input has {channels}")
    if channels == 3:
        whole = Image.fromarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)).copy())
        return np.asarray(ImageOps.pad(whole, (width, height)))
    grey = pixels[:, :, 0] if pixels.shape[2] == 1 else np.asarray(Image.fromarray(pixels).convert("L"))
    image = _on_dark(grey, height, width, fit, name)[:, :, np.newaxis]
    return 255 - image if light_ground else image


def _on_dark(grey: np.ndarray, height: int, width: int, fit: Fit, name: str) -> np.ndarray:
    """Convert a picture (h, w) to an image (height, width) with a dark background."""
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
    """Downsample a large picture (h, w), so that the search for a digit takes less time and memory."""
    factor = max(grey.shape) // ENOUGH
    return np.asarray(Image.fromarray(grey).reduce(factor)) if factor > 1 else grey


def _lighting(grey: np.ndarray) -> np.ndarray:
    """Estimate the background (h, w): the plane that fits the picture's edge best, as light may come from one side."""
    rows, columns = np.indices(grey.shape)
    edge = np.ones(grey.shape, bool)
    edge[1:-1, 1:-1] = False
    coordinates = np.stack([np.ones_like(rows), rows, columns], -1).astype(float)
    plane, *_ = np.linalg.lstsq(coordinates[edge], grey[edge].astype(float), rcond=None)
    return coordinates @ plane


def _ink(above: np.ndarray, name: str) -> np.ndarray:
    """Return the ink (h, w), 0 to 1, cropped to its bounding box, from values above the background's."""
    strongest = np.percentile(above, 99.9) if above.size > 10_000 else above.max()
    if strongest < CONTRAST:
        raise UserError(BLANK.format(name))
    ink = np.clip((above / strongest - FAINT) / (1 - FAINT), 0, 1)
    rows, columns = (np.flatnonzero((ink > FAINT).any(axis)) for axis in (1, 0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _as_digit(ink: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scale ink to the digit's box and move its centre of mass to the centre of (height, width): uint8."""
    scale = BOX * min(height, width) / max(ink.shape)
    size = [max(1, round(side * scale)) for side in ink.shape[::-1]]
    small = np.asarray(Image.fromarray(ink.astype(np.float32)).resize(size, Image.Resampling.LANCZOS)).clip(0, 1)
    small = small / small.max()  # thin lines fade when they are scaled down
    centre = [(small.sum(1 - axis) * np.arange(small.shape[axis])).sum() / small.sum() for axis in (0, 1)]
    image = np.zeros((height, width))
    centred = [round(side / 2 - middle) for side, middle in zip((height, width), centre, strict=True)]
    top, left = np.clip(centred, 0, np.subtract((height, width), small.shape))
    image[top : top + small.shape[0], left : left + small.shape[1]] = small
    return np.round(255 * image).astype(np.uint8)
