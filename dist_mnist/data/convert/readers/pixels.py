"""Pixels in arrays and tables: which axes they have, and which values stand for black and white."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from dist_mnist.data.convert.choices import Layout
from dist_mnist.data.convert.pictures import MAX_SIDE
from dist_mnist.data.convert.readers.source import Reading
from dist_mnist.utils.errors import UserError


class Scale(StrEnum):
    """What values mean: 0 to 255, 0 to 1, or 0 to 65535."""

    BYTES = "bytes"
    UNIT = "unit"
    WORDS = "words"


@dataclass(frozen=True)
class Arrangement:
    """How the values of a picture become (H, W, C): reshaped to `shape`, then channels last."""

    shape: tuple[int, ...]
    layout: Layout

    def arranged(self, values: np.ndarray) -> np.ndarray:
        """(n, ...) of any shape as (n, H, W, C)."""
        shaped = values.reshape(len(values), *self.shape)  # (n, H, W, C) or (n, C, H, W)
        return np.moveaxis(shaped, 1, -1) if self.layout == Layout.CHW else shaped


def arrangement_of(shape: tuple[int, ...], where: str, reading: Reading) -> Arrangement:
    """How pictures of a shape, (H, W), (H, W, C), (C, H, W) or flat, are to be understood.

    Raises:
        UserError: they are none, or it cannot be told; the message says which option tells it.
    """
    if len(shape) == 1:
        shape = _unfolded(shape[0], where, reading)
    if len(shape) == 2:
        found = Arrangement((*shape, 1), Layout.HWC)
    elif len(shape) == 3:
        found = Arrangement(shape, _layout(shape, where, reading.layout))
    else:
        raise UserError(f"{where}: pictures have 2 or 3 dimensions, or their pixels in a row; these have {shape}")
    height, width = found.shape[1:] if found.layout == Layout.CHW else found.shape[:2]
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise UserError(f"{where}: images are up to {MAX_SIDE} x {MAX_SIDE} pixels, these are {height} x {width}")
    return found


def _layout(shape: tuple[int, ...], where: str, given: Layout | None) -> Layout:
    """By the axis that can be colours, 1 or 3 of them; by the option where both can."""
    can_be = [layout for layout, axis in ((Layout.HWC, -1), (Layout.CHW, 0)) if shape[axis] in (1, 3)]
    if given is not None and given in can_be:
        return given
    if len(can_be) == 1 and given is None:
        return can_be[0]
    if len(can_be) == 2:
        raise UserError(
            f"{where}: pictures of {shape} may be height x width x channels or channels first: add --layout"
        )
    meant = f" as --layout {given} says" if given else ""
    raise UserError(
        f"{where}: pictures of {shape} have no axis of 1 or 3 channels{meant}; other numbers of channels cannot be "
        "imported"
    )


def _unfolded(count: int, where: str, reading: Reading) -> tuple[int, ...]:
    """Height and width, and channels if not gray, of pictures whose pixels stand in a row."""
    for channels in (1, 3):
        side = math.isqrt(count // channels)
        height, width = reading.size if reading.size and math.prod(reading.size) * channels == count else (side, side)
        if height * width * channels != count:
            continue
        if channels == 1:
            return height, width
        if reading.layout is None:
            raise UserError(
                f"{where}: {count} values a picture are {height} x {width} pixels in 3 colours; add --layout chw if "
                "all of red stand first, or --layout hwc if the colours of each pixel stand together"
            )
        return (3, height, width) if reading.layout == Layout.CHW else (height, width, 3)
    raise UserError(
        f"{where}: {count} values a picture make no square; give the pictures' own size as --size HxW (if there are "
        "columns other than label and pixels, remove them)"
    )


def choose_scale(blocks: Iterable[np.ndarray], where: str) -> Scale:
    """What all values of a source mean together: floats up to 1 are 0 to 1, and so are booleans.

    Raises:
        UserError: a value is negative, not a number, or too large.
    """
    largest, whole, wide = 0.0, False, True
    for block in blocks:
        if block.size == 0:
            continue
        low, high = block.min(), block.max()
        if not low >= 0 or not np.isfinite(high):
            bad = low if not low >= 0 else high
            raise UserError(f"{where}: a pixel is {bad}; pixels are 0 to 255, or 0 to 1")
        largest = max(largest, float(high))
        whole = whole or block.dtype.kind in "ui"
        wide = wide and block.dtype == np.uint16
    if largest <= 255:
        return Scale.UNIT if largest <= 1 and not whole else Scale.BYTES
    if wide:
        return Scale.WORDS
    raise UserError(f"{where}: a pixel is {largest:g}; pixels are 0 to 255, 0 to 1, or uint16")


def to_uint8(values: np.ndarray, scale: Scale) -> np.ndarray:
    """Values as uint8, rounded to the nearest.

    Raises:
        UserError: they are beyond the scale.
    """
    if values.dtype == np.uint8:
        return values
    if scale == Scale.WORDS:
        return (values // 257).astype(np.uint8)
    scaled = np.rint(values * 255.0 if scale == Scale.UNIT else values)
    if scaled.size and scaled.max() > 255:
        raise UserError(f"a pixel is {values.max():g}; pixels are 0 to 255, or 0 to 1")
    return scaled.astype(np.uint8)
