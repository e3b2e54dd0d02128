"""Interpretation of pixels in arrays and tables: the order of axes, and the values of black and white."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dist_mnist.data.convert.choices import Layout
from dist_mnist.data.convert.pictures import MAX_SIDE, stretched
from dist_mnist.data.convert.readers.source import Reading
from dist_mnist.utils.errors import UserError

# The pixel value of white without --pixel-max: for bytes, for fractions (and bits), and for 16 bits.
BYTES, UNIT, WORDS = 255.0, 1.0, 65535.0
ABOVE_UNIT = 1.01  # fractions up to this are rounding errors of 1


@dataclass(frozen=True)
class Arrangement:
    """How to arrange the values of a picture as (H, W, C): reshape to `shape`, then move channels last."""

    shape: tuple[int, ...]
    layout: Layout

    def arranged(self, values: np.ndarray) -> np.ndarray:
        """Return values (n, ...) of any shape as (n, H, W, C)."""
        shaped = values.reshape(len(values), *self.shape)  # (n, H, W, C) or (n, C, H, W)
        return np.moveaxis(shaped, 1, -1) if self.layout == Layout.CHW else shaped


def arrangement_of(
    shape: tuple[int, ...], where: str, reading: Reading, named: tuple[int, ...] = ()
) -> tuple[Arrangement, list[str]]:
    """Return the arrangement of pictures of a shape, (H, W), (H, W, C), (C, H, W) or flat, and notes for the user.

    Args:
        named: (H, W) or (H, W, C) of flat pictures, if the names of pixel columns tell it.

    Raises:
        UserError: the shape is not that of pictures, or is ambiguous; the message names the option that decides.
    """
    count = shape[0]
    is_flat = len(shape) == 1
    if is_flat:
        shape = named or _unfolded(count, where, reading)
    if len(shape) == 3 and named:
        found = Arrangement(shape, Layout.HWC)
    elif len(shape) == 2:
        found = Arrangement((*shape, 1), Layout.HWC)
    elif len(shape) == 3:
        found = Arrangement(shape, _layout(shape, where, reading.layout))
    else:
        raise UserError(f"{where}: expected pictures in 2 or 3 dimensions, or flat, got shape {shape}")
    height, width = found.shape[1:] if found.layout == Layout.CHW else found.shape[:2]
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise UserError(f"{where}: images have at most {MAX_SIDE} x {MAX_SIDE} pixels, got {height} x {width}")
    how = "the header" if named else "--size" if reading.size and not _is_square(count) else ""
    notes = [f"read {count} values per picture as {height} x {width} pixels{f', by {how}' if how else ''}"]
    turned = ["transposed pictures from channels x height x width to height x width x channels"]
    return found, notes * is_flat + turned * (found.layout == Layout.CHW)


def _is_square(count: int) -> bool:
    return math.isqrt(count) ** 2 == count


def _layout(shape: tuple[int, ...], where: str, given: Layout | None) -> Layout:
    """Return the layout by the axis of size 1 or 3; the option decides if both fit."""
    can_be = [layout for layout, axis in ((Layout.HWC, -1), (Layout.CHW, 0)) if shape[axis] in (1, 3)]
    if given is not None and given in can_be:
        return given
    if len(can_be) == 1 and given is None:
        return can_be[0]
    if len(can_be) == 2:
        raise UserError(
            f"{where}: pictures of shape {shape} may be height x width x channels or channels first: add --layout"
        )
    meant = f" in the position given by --layout {given}" if given else ""
    raise UserError(
        f"{where}: pictures of shape {shape} have no axis of 1 or 3 channels{meant}; other numbers of channels cannot "
        "be imported"
    )


def _unfolded(count: int, where: str, reading: Reading) -> tuple[int, ...]:
    """Return height and width, and channels unless gray, of flat pictures: square, else by --size."""
    for channels in (1, 3):
        side = math.isqrt(count // channels)
        sizes = [(side, side), *([reading.size] if reading.size else [])]
        height, width = next((size for size in sizes if math.prod(size) * channels == count), (0, 0))
        if not height:
            continue
        if channels == 1:
            return height, width
        if reading.layout is None:
            raise UserError(
                f"{where}: {count} values per picture are {height} x {width} RGB pixels; add --layout chw if all red "
                "values come first, or --layout hwc if the three values of each pixel are adjacent"
            )
        return (3, height, width) if reading.layout == Layout.CHW else (height, width, 3)
    raise UserError(
        f"{where}: {count} values per picture are not a square; give the size of the pictures by --size HxW (and "
        "remove columns other than label and pixels)"
    )


def choose_white(parts: Sequence[tuple[str, Iterable[np.ndarray]]], where: str) -> tuple[float, list[str]]:
    """Return the pixel value of white for all parts of a source (their names and pixels), and notes for the user.

    If no value exceeds 1, they are fractions or bits; up to 255, bytes.

    Raises:
        UserError: a value is negative, not a number, or too large; or one part has fractions, another bytes.
    """
    found = {name: _range(blocks, name) for name, blocks in parts}
    largest = max(found.values(), key=lambda one: one.largest)
    for name, one in found.items():
        if 0 < one.largest <= ABOVE_UNIT < largest.largest:
            brighter = next(other for other, it in found.items() if it is largest)
            raise UserError(
                f"{name}: its pixels have a maximum of {one.largest:g}, but pixels of {brighter} exceed 1; bring both "
                "to the same scale"
            )
    if largest.largest <= ABOVE_UNIT:
        return UNIT, ["scaled pixels from 0..1 to 0..255"]
    if largest.largest <= BYTES:
        return BYTES, []
    if all(one.is_wide for one in found.values()):
        return WORDS, [f"scaled 16-bit pixels, up to {largest.largest:g}, to 8 bits, with 65535 as white"]
    raise UserError(
        f"{where}: a pixel is {largest.largest:g}, expected 0 to 255, 0 to 1, or uint16; set the value of white by "
        "--pixel-max"
    )


class _Range(NamedTuple):
    largest: float
    is_wide: bool  # whether all blocks are uint16


def _range(blocks: Iterable[np.ndarray], where: str) -> _Range:
    largest, wide = 0.0, True
    for block in blocks:
        if block.size == 0:
            continue
        low, high = block.min(), block.max()
        if not low >= 0 or not np.isfinite(high):
            bad = low if not low >= 0 else high
            raise UserError(f"{where}: a pixel is {bad}, expected 0 to 255, or 0 to 1")
        largest = max(largest, float(high))
        wide = wide and block.dtype == np.uint16
    return _Range(largest, wide)


def to_uint8(values: np.ndarray, white: float, where: str) -> np.ndarray:
    """Convert values to uint8, rounded to the nearest.

    Raises:
        UserError: a value is negative, or above `white`.
    """
    if values.dtype == np.uint8 and white == BYTES:
        return values
    if values.dtype == np.uint16 and white == WORDS:
        return (values // 257).astype(np.uint8)
    if white == UNIT and values.size and values.max() <= ABOVE_UNIT:
        values = np.minimum(values, 1)
    return stretched(values, white, where)
