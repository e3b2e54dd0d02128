"""Decode picture files to arrays: upright, 8 bits, gray or RGB, in the requested size."""

import io
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dist_mnist.data.convert.summary import records_of
from dist_mnist.utils.errors import UserError

# Formats that Pillow decodes itself. Others are rare in datasets, and EPS would start a program.
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "PPM", "TIFF", "WEBP", "JPEG2000")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm", ".pbm", ".jp2")
MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "I", "I;16", "I;16B", "I;16L", "F")
ORIENTATION = 0x0112  # the EXIF tag; UPRIGHT has the transposition for each of its values
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
MOST_PIXELS = 50_000_000  # in a picture; more is an accident or an attack
MAX_SIDE = 1024  # pixels along a side of an image in a dataset
MANY_FRAMES = ("GIF", "PNG", "TIFF", "WEBP")  # not MPO, in which cameras add previews to a JPEG


class Shape(NamedTuple):
    """The shape of a picture in pixels; one channel is gray, three are RGB."""

    height: int
    width: int
    channels: int

    @property
    def num_bytes(self) -> int:
        """Size of a uint8 image of this shape."""
        return self.height * self.width * self.channels


@dataclass(frozen=True)
class Form:
    """The form of the images; pictures of another shape are converted only as far as the user allows."""

    shape: Shape
    may_resize: bool
    may_recolour: bool
    invert: bool


class Unusable(NamedTuple):
    """A picture that cannot be read, and the reason."""

    why: str


class Work(Protocol):
    """A work item: pictures to read in sequence, in this process or in a worker."""

    def read(self) -> Iterator[np.ndarray | Unusable]:
        """Yield the pixels of each picture, (H, W, C) uint8."""

    def name(self, index: int) -> str:
        """Return the location of a picture, for messages."""


class Read(NamedTuple):
    """The result of a work item of n pictures, K of which have the requested form."""

    images: np.ndarray  # (K, H, W, C) uint8
    fits: np.ndarray  # (n,) bool: which pictures these are
    records: np.ndarray  # (K,) of RECORD, without labels, which are unknown here
    brightest: int  # largest pixel value
    shapes: Counter[Shape]  # shapes of the pictures before conversion
    examples: dict[Shape, str]  # a picture of each shape
    unusable: list[str]


@contextmanager
def without_warnings() -> Iterator[None]:
    """Context manager: suppress the warnings of decoders about oddities in files; what matters is checked here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def read_work(form: Form, work: Work) -> Read:
    """Read the pictures of a work item as images of one form."""
    images: list[np.ndarray] = []
    fits: list[bool] = []
    unusable: list[str] = []
    shapes: Counter[Shape] = Counter()
    examples: dict[Shape, str] = {}
    with without_warnings():
        for index, found in enumerate(work.read()):
            fits.append(False)
            if isinstance(found, Unusable):
                unusable.append(found.why)
                continue
            shape = Shape(*found.shape)
            shapes[shape] += 1
            if shape not in examples:
                examples[shape] = work.name(index)
            if (image := fitted(found, form)) is not None:
                images.append(image)
                fits[-1] = True
    stacked = np.ascontiguousarray(np.stack(images)) if images else np.empty((0, *form.shape), np.uint8)
    records, brightest = records_of(stacked, 0), int(stacked.max(initial=0))
    return Read(stacked, np.array(fits, bool), records, brightest, shapes, examples, unusable)


def fitted(pixels: np.ndarray, form: Form) -> np.ndarray | None:
    """Convert pixels (h, w, c) to an image of the form; None if the form does not allow the conversion.

    A picture of another size is scaled to fit and centred. The border is filled with the median of the edge of a gray
    picture, or with black for RGB, as `dist-mnist predict --fit whole` does.
    """
    height, width, channels = form.shape
    if pixels.shape[2] != channels:
        if not form.may_recolour:
            return None
        pixels = gray(pixels) if channels == 1 else pixels.repeat(3, axis=2)
    if pixels.shape[:2] != (height, width):
        if not form.may_resize:
            return None
        pixels = _padded(pixels, height, width)
    return 255 - pixels if form.invert else pixels


def gray(pixels: np.ndarray) -> np.ndarray:
    """Convert RGB pixels (H, W, 3) to brightness (ITU-R 601-2), (H, W, 1)."""
    return np.asarray(Image.fromarray(pixels).convert("L"))[:, :, np.newaxis]


def _padded(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    if pixels.shape[2] == 3:
        return np.asarray(ImageOps.pad(Image.fromarray(pixels), (width, height)))
    flat = pixels[:, :, 0]
    ground = int(np.median(np.concatenate([flat[0], flat[-1], flat[:, 0], flat[:, -1]])))
    return np.asarray(ImageOps.pad(Image.fromarray(flat), (width, height), color=ground))[:, :, np.newaxis]


def stretched(values: np.ndarray, white: float, where: str) -> np.ndarray:
    """Scale values from 0..`white` to uint8 0..255, rounded to the nearest.

    Raises:
        UserError: a value is out of range.
    """
    if values.size and not (values.min() >= 0 and values.max() <= white):
        bad = values.min() if not values.min() >= 0 else values.max()
        raise UserError(f"{where}: a pixel is {bad:g}, expected 0 to {white:g}")
    return np.rint(values * (255 / white)).astype(np.uint8)


def picture_pixels(content: bytes, name: str, white: float | None = None) -> np.ndarray | Unusable:
    """Decode a picture file to (H, W, 1) uint8 if it is gray, else (H, W, 3); transparent pixels become white.

    Args:
        white: the pixel value of white, with 8 or 16 bits; None: the largest possible value.
    """
    try:
        picture = load_picture(io.BytesIO(content), name, still=True)
        if white is None:
            return _composited(eight_bits(picture, name))
        if picture.mode.startswith("I"):
            return stretched(np.asarray(picture, np.int64), white, name)[:, :, np.newaxis]
        return stretched(_composited(eight_bits(picture, name)), white, name)
    except UserError as error:
        return Unusable(str(error))


def load_picture(file: BinaryIO, name: str, still: bool = False, most_pixels: int = MOST_PIXELS) -> Image.Image:
    """Decode a picture in any common format, and turn it upright.

    Args:
        still: refuse a picture with several frames or pages; else the first one is decoded.

    Raises:
        UserError: the file is not a picture, is damaged, or exceeds `most_pixels`, which is checked before decoding.
    """
    try:
        picture: Image.Image = Image.open(file, formats=FORMATS)
        width, height = picture.size
        if width * height > most_pixels:
            raise UserError(f"{name}: {width} x {height} pixels exceed the limit of {most_pixels:,}")
        if width * height == 0:
            raise UserError(f"{name}: the picture has no pixels")
        if still and picture.format in MANY_FRAMES and getattr(picture, "is_animated", False):
            raise UserError(f"{name}: the picture has several frames or pages")
        picture.load()
        if picture.mode not in MODES:
            picture = picture.convert("RGB")
        return _upright(picture)
    except UnidentifiedImageError:
        raise UserError(f"{name}: the file is not a picture in a known format (such as PNG or JPEG)") from None
    except Image.DecompressionBombError:
        raise UserError(f"{name}: the picture exceeds the limit of {most_pixels:,} pixels") from None
    except (UserError, MemoryError):
        raise
    except Exception as error:  # decoders raise many exceptions on damaged files
        raise UserError(f"{name}: the picture is damaged ({error})") from None


def _upright(picture: Image.Image) -> Image.Image:
    """Turn and mirror a picture by its EXIF orientation; damaged EXIF data is ignored."""
    if not picture.info:
        return picture
    try:
        orientation = picture.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged EXIF data; the pixels have been read
        return picture
    turn = UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return picture if turn is None else picture.transpose(turn)


def eight_bits(picture: Image.Image, name: str) -> Image.Image:
    """Return the picture with 16-bit pixels scaled to 8 bits.

    Raises:
        UserError: its pixels have more bits, or are floating-point numbers.
    """
    if picture.mode.startswith("I"):  # 16 bits, in one of several modes
        values = np.asarray(picture, np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise UserError(f"{name}: the picture has 32-bit pixels; save it with 8 or 16 bits")
        few = picture.mode == "I" and values.max() <= 0xFF
        return Image.fromarray((values if few else values // 257).astype(np.uint8))
    if picture.mode == "F":
        raise UserError(f"{name}: the picture has floating-point pixels; save it with 8 or 16 bits")
    return picture


def is_transparent(picture: Image.Image) -> bool:
    """Whether pixels of the picture may be transparent."""
    return "A" in picture.getbands() or "a" in picture.getbands() or "transparency" in picture.info


def _composited(picture: Image.Image) -> np.ndarray:
    """Return the pixels on white: (H, W, 1) for gray modes and palettes with gray pixels only, else (H, W, 3)."""
    if picture.mode in ("L", "RGB") and "transparency" not in picture.info:  # the fast path for most pictures
        return np.frombuffer(picture.tobytes(), np.uint8).reshape(picture.height, picture.width, -1)
    is_gray = picture.mode in ("1", "L", "LA", "La")
    has_palette = picture.mode in ("P", "PA")
    if is_transparent(picture):
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    if is_gray:
        return np.asarray(picture.convert("L"))[:, :, np.newaxis]
    pixels = np.asarray(picture.convert("RGB"))
    if has_palette and (pixels == pixels[:, :, :1]).all():
        return pixels[:, :, :1]
    return pixels
