"""Contact sheets: one PNG with a row of images for each class."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dist_mnist.utils.errors import os_error_as, printable, short
from dist_mnist.utils.files import atomic_write

if TYPE_CHECKING:
    from PIL import Image, ImageFont

MAX_ROWS = 50
SIDE = 56  # pixels: smaller images are enlarged to at least this, by an integer factor
MAX_SIDE = 128  # pixels: larger images are reduced to this
FONT_SIZE, PAD, MAX_NAME = 14, 6, 32
NO_CHARACTER = "\uffff"  # missing in every font


def contact_sheet(
    images: np.ndarray, labels: np.ndarray, names: Sequence[str], path: Path, per_class: int = 10
) -> None:
    """Write a PNG with a row for each class, at most 50, showing its name and up to `per_class` of its images.

    The images of a class are evenly spaced along the file. Only the images shown are read from `images`.

    Args:
        images: (N, H, W, C), any dtype; only the first channel is shown unless there are 1 or 3.
        labels: (N,) integers below `len(names)`.
        names: class names by label.

    Raises:
        UserError: the file cannot be written.
    """
    from PIL import Image, ImageDraw

    font = _font()
    captions = [_caption(label, name, font) for label, name in enumerate(names[:MAX_ROWS])]
    more = [f"and {len(names) - MAX_ROWS} more classes"] if len(names) > MAX_ROWS else []
    margin = PAD + int(max(map(font.getlength, captions + more))) + 2 * PAD
    width, height = _shown_size(*images.shape[1:3])
    line = max(height, FONT_SIZE) + PAD
    size = (margin + (width + PAD) * per_class, PAD + line * len(captions) + (FONT_SIZE + 2 * PAD) * len(more))
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    rows = _rows_of_classes(labels, len(captions), per_class)
    for number, (caption, chosen) in enumerate(zip(captions, rows, strict=True)):
        top = PAD + line * number
        draw.text((PAD, top + line // 2), caption, "black", font, anchor="lm")
        for column, row in enumerate(chosen):
            picture = _picture(images[row], (width, height))
            page.paste(picture, (margin + (width + PAD) * column, top))
    for text in more:
        draw.text((PAD, PAD + line * len(captions)), text, "black", font)
    with os_error_as(f"{path}: cannot be written"), atomic_write(path) as file:
        page.save(file, "PNG")


def displayable(image: np.ndarray) -> np.ndarray:
    """Convert an image (H, W, C) of any dtype and number of channels for display: uint8, 1 or 3 channels."""
    image = image if image.shape[2] in (1, 3) else image[:, :, :1]
    if image.dtype == np.uint8:
        return image
    values = np.nan_to_num(image.astype(np.float64))
    extent = max(np.ptp(values), 1e-12)
    return np.round(255 * (values - values.min()) / extent).astype(np.uint8)


def _shown_size(height: int, width: int) -> tuple[int, int]:
    """Return width and height in the sheet: an integer multiple for small images, a fraction for large ones."""
    longer = max(height, width)
    if longer <= MAX_SIDE:
        factor = max(1, -(-SIDE // longer))
        return width * factor, height * factor
    return max(1, width * MAX_SIDE // longer), max(1, height * MAX_SIDE // longer)


def _rows_of_classes(labels: np.ndarray, num_classes: int, per_class: int) -> Iterator[np.ndarray]:
    """Yield, for each class, evenly spaced rows of its images."""
    by_class = np.argsort(labels, kind="stable")
    bounds = np.searchsorted(labels[by_class], np.arange(num_classes + 1))
    for start, stop in pairwise(bounds):
        positions = np.linspace(start, stop - 1, min(per_class, stop - start)).astype(np.int64)
        yield by_class[positions]


def _picture(image: np.ndarray, size: tuple[int, int]) -> "Image.Image":
    from PIL import Image

    pixels = displayable(image)
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    enlarged = size[0] >= picture.width
    return picture.resize(size, Image.Resampling.NEAREST if enlarged else Image.Resampling.BOX).convert("RGB")


def _font() -> "ImageFont.FreeTypeFont | ImageFont.ImageFont":
    """Return DejaVu Sans, which comes with matplotlib and covers most alphabets, else Pillow's ASCII font."""
    import matplotlib
    from PIL import ImageFont

    try:
        return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), FONT_SIZE)
    except OSError:
        return ImageFont.load_default(FONT_SIZE)


def _caption(label: int, name: str, font: "ImageFont.FreeTypeFont | ImageFont.ImageFont") -> str:
    """Return label and name; characters that the font lacks, such as kana, become code points (U+3042)."""
    missing = bytes(font.getmask(NO_CHARACTER))
    characters = (f"(U+{ord(c):04X})" if bytes(font.getmask(c)) == missing else c for c in printable(name))
    return str(label) if name == str(label) else f"{label}  {short(''.join(characters), MAX_NAME)}"
