"""Pixels in arrays and tables: which axes they have, and which values stand for black and white."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dist_mnist.data.convert.choices import Layout
from dist_mnist.data.convert.pictures import MAX_SIDE, stretched
from dist_mnist.data.convert.readers.source import Reading
from dist_mnist.utils.errors import UserError

# The value that is white, where no --pixel-max says it: of bytes, of fractions (and bits), and of 16 bits.
BYTES, UNIT, WORDS = 255.0, 1.0, 65535.0
ABOVE_UNIT = 1.01  # up to which fractions are taken for 1 that was not computed exactly


@dataclass(frozen=True)
class Arrangement:
    """How the values of a picture become (H, W, C): reshaped to `shape`, then channels last."""

    shape: tuple[int, ...]
    layout: Layout

    def arranged(self, values: np.ndarray) -> np.ndarray:
        """(n, ...) of any shape as (n, H, W, C)."""
        shaped = values.reshape(len(values), *self.shape)  # (n, H, W, C) or (n, C, H, W)
        return np.moveaxis(shaped, 1, -1) if self.layout == Layout.CHW else shaped


def arrangement_of(
    shape: tuple[int, ...], where: str, reading: Reading, named: tuple[int, ...] = ()
) -> tuple[Arrangement, list[str]]:
    """How pictures of a shape, (H, W), (H, W, C), (C, H, W) or flat, are understood; and what is to be said of it.

    Args:
        named: (H, W) or (H, W, C) of flat ones, where the names of their pixels say it.

    Raises:
        UserError: they are none, or it cannot be told; the message says which option tells it.
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
        raise UserError(f"{where}: pictures have 2 or 3 dimensions, or their pixels in a row; these have {shape}")
    height, width = found.shape[1:] if found.layout == Layout.CHW else found.shape[:2]
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise UserError(f"{where}: images are up to {MAX_SIDE} x {MAX_SIDE} pixels, these are {height} x {width}")
    how = "the header" if named else "--size" if reading.size and not _is_square(count) else ""
    notes = [f"{count} values a picture were read as {height} x {width} pixels{f', as {how} says' if how else ''}"]
    turned = ["pictures of channels x height x width were turned to height x width x channels"]
    return found, notes * is_flat + turned * (found.layout == Layout.CHW)


def _is_square(count: int) -> bool:
    return math.isqrt(count) ** 2 == count


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
    """Height and width, and channels if not gray, of pictures whose pixels stand in a row: a square, or else --size."""
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
                f"{where}: {count} values a picture are {height} x {width} pixels in 3 colours; add --layout chw if "
                "all of red stand first, or --layout hwc if the colours of each pixel stand together"
            )
        return (3, height, width) if reading.layout == Layout.CHW else (height, width, 3)
    raise UserError(
        f"{where}: {count} values a picture make no square; give the pictures' own size as --size HxW (if there are "
        "columns other than label and pixels, remove them)"
    )


def choose_white(parts: Sequence[tuple[str, Iterable[np.ndarray]]], where: str) -> tuple[float, list[str]]:
    """The value that is white in all parts of a source (their names and pixels), and what is to be said of it.

    Values that are nowhere above 1 are fractions or bits; others up to 255 are bytes.

    Raises:
        UserError: a value is negative, not a number, or too large; or one part has fractions, the other bytes.
    """
    found = {name: _range(blocks, name) for name, blocks in parts}
    largest = max(found.values(), key=lambda one: one.largest)
    for name, one in found.items():
        if 0 < one.largest <= ABOVE_UNIT < largest.largest:
            brighter = next(other for other, it in found.items() if it is largest)
            raise UserError(
                f"{name}: its pixels go up to {one.largest:g}, those of {brighter} beyond 1; bring both to one scale"
            )
    if largest.largest <= ABOVE_UNIT:
        return UNIT, ["pixels of 0 to 1 became 0 to 255"]
    if largest.largest <= BYTES:
        return BYTES, []
    if all(one.is_wide for one in found.values()):
        return WORDS, [f"pixels of 16 bits, up to {largest.largest:g}, became 8 bits: 65535 is white"]
    raise UserError(
        f"{where}: a pixel is {largest.largest:g}; pixels are 0 to 255, 0 to 1, or uint16, or --pixel-max says what is "
        "white"
    )


class _Range(NamedTuple):
    largest: float
    is_wide: bool  # whether all are uint16


def _range(blocks: Iterable[np.ndarray], where: str) -> _Range:
    largest, wide = 0.0, True
    for block in blocks:
        if block.size == 0:
            continue
        low, high = block.min(), block.max()
        if not low >= 0 or not np.isfinite(high):
            bad = low if not low >= 0 else high
            raise UserError(f"{where}: a pixel is {bad}; pixels are 0 to 255, or 0 to 1")
        largest = max(largest, float(high))
        wide = wide and block.dtype == np.uint16
    return _Range(largest, wide)


def to_uint8(values: np.ndarray, white: float, where: str) -> np.ndarray:
    """Values as uint8, rounded to the nearest.

    Raises:
        UserError: some are negative, or more than `white`.
    """
    if values.dtype == np.uint8 and white == BYTES:
        return values
    if values.dtype == np.uint16 and white == WORDS:
        return (values // 257).astype(np.uint8)
    if white == UNIT and values.size and values.max() <= ABOVE_UNIT:
        values = np.minimum(values, 1)
    return stretched(values, white, where)
