"""Picture files as arrays: upright, in 8 bits, gray or colour, in the size that is asked for."""

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

# What Pillow reads by itself. Its other formats are rare in sets of pictures, and EPS would start a program.
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "PPM", "TIFF", "WEBP", "JPEG2000")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm", ".pbm", ".jp2")
MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "I", "I;16", "I;16B", "I;16L", "F")
ORIENTATION = 0x0112  # the EXIF tag, and what sets a picture of each orientation upright
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
MOST_PIXELS = 50_000_000  # of a picture; more is an accident or an attack
MAX_SIDE = 1024  # pixels of an image in a dataset
MANY_FRAMES = ("GIF", "PNG", "TIFF", "WEBP")  # not MPO, in which cameras add previews to a JPEG picture


class Shape(NamedTuple):
    """Of a picture, in pixels; one channel is gray, three are red, green and blue."""

    height: int
    width: int
    channels: int

    @property
    def num_bytes(self) -> int:
        """Of an image of uint8."""
        return self.height * self.width * self.channels


@dataclass(frozen=True)
class Form:
    """What pictures become; those that do not have the shape are changed only as far as the user allows."""

    shape: Shape
    may_resize: bool
    may_recolour: bool
    invert: bool


class Unusable(NamedTuple):
    """Stands for a picture that cannot be read: a sentence that says why."""

    why: str


class Work(Protocol):
    """Some pictures to be read one after the other, in this process or in another."""

    def read(self) -> Iterator[np.ndarray | Unusable]:
        """The pixels of each, (H, W, C) uint8."""

    def name(self, index: int) -> str:
        """Where one of them is, for a message."""


class Read(NamedTuple):
    """What came of a piece of work of n pictures, K of which have the form."""

    images: np.ndarray  # (K, H, W, C) uint8
    fits: np.ndarray  # (n,) bool: which these are
    records: np.ndarray  # (K,) of RECORD, without the labels, which are not known here
    brightest: int  # of all pixels
    shapes: Counter[Shape]  # of the pictures as they were
    examples: dict[Shape, str]  # a picture of each shape
    unusable: list[str]


@contextmanager
def without_warnings() -> Iterator[None]:
    """For a `with` block: decoders do not warn of oddities in files; what matters is checked here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def read_work(form: Form, work: Work) -> Read:
    """Read the pictures of a piece of work as images of one form."""
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
    """Pixels (h, w, c) as an image of the form, or None if they may not be changed that far.

    A picture of another size is scaled to fit and centred; the rest is filled with the median of a gray picture's edge,
    or black beside a colour picture, as `dist-mnist predict --fit whole` does.
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
    """Brightness (ITU-R 601-2) of colour pixels (H, W, 3): (H, W, 1)."""
    return np.asarray(Image.fromarray(pixels).convert("L"))[:, :, np.newaxis]


def _padded(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    if pixels.shape[2] == 3:
        return np.asarray(ImageOps.pad(Image.fromarray(pixels), (width, height)))
    flat = pixels[:, :, 0]
    ground = int(np.median(np.concatenate([flat[0], flat[-1], flat[:, 0], flat[:, -1]])))
    return np.asarray(ImageOps.pad(Image.fromarray(flat), (width, height), color=ground))[:, :, np.newaxis]


def stretched(values: np.ndarray, white: float, where: str) -> np.ndarray:
    """Values from 0 to `white` as uint8 from 0 to 255, rounded to the nearest.

    Raises:
        UserError: one is less or more.
    """
    if values.size and not (values.min() >= 0 and values.max() <= white):
        bad = values.min() if not values.min() >= 0 else values.max()
        raise UserError(f"{where}: a pixel is {bad:g}; pixels are 0 to {white:g}")
    return np.rint(values * (255 / white)).astype(np.uint8)


def picture_pixels(content: bytes, name: str, white: float | None = None) -> np.ndarray | Unusable:
    """The pixels of a picture file, (H, W, 1) uint8 if it is gray and (H, W, 3) else; transparent ones are white.

    Args:
        white: the value that is white, in pictures of 8 or 16 bits; None: the largest that these can have.
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
    """A picture in any usual format, decoded and upright.

    Args:
        still: refuse a picture with several frames or pages; else the first of them is given.

    Raises:
        UserError: it is none, is damaged, or has more than `most_pixels`, which is told before it is decoded.
    """
    try:
        picture: Image.Image = Image.open(file, formats=FORMATS)
        width, height = picture.size
        if width * height > most_pixels:
            raise UserError(f"{name}: {width} x {height} pixels are more than the {most_pixels:,} that are read")
        if width * height == 0:
            raise UserError(f"{name}: the picture has no pixels")
        if still and picture.format in MANY_FRAMES and getattr(picture, "is_animated", False):
            raise UserError(f"{name}: the picture has several frames or pages")
        picture.load()
        if picture.mode not in MODES:
            picture = picture.convert("RGB")
        return _upright(picture)
    except UnidentifiedImageError:
        raise UserError(f"{name}: this is no picture in a known format (PNG, JPEG and the like)") from None
    except Image.DecompressionBombError:
        raise UserError(f"{name}: the picture has more than the {most_pixels:,} pixels that are read") from None
    except (UserError, MemoryError):
        raise
    except Exception as error:  # decoders of damaged files raise all sorts
        raise UserError(f"{name}: the picture is damaged ({error})") from None


def _upright(picture: Image.Image) -> Image.Image:
    """The picture, turned and mirrored as its EXIF data say; what is damaged in them does not matter."""
    if not picture.info:
        return picture
    try:
        orientation = picture.getexif().get(ORIENTATION, 1)
    except Exception:  # whatever may be wrong in them: the pixels have been read
        return picture
    turn = UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return picture if turn is None else picture.transpose(turn)


def eight_bits(picture: Image.Image, name: str) -> Image.Image:
    """The picture, with pixels of 16 bits scaled to 8.

    Raises:
        UserError: its pixels have more bits, or are floating-point numbers.
    """
    if picture.mode.startswith("I"):  # 16 bits, in one of several ways to hold them
        values = np.asarray(picture, np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise UserError(f"{name}: its pixels are numbers of 32 bits; save it with 8 or 16 bits each")
        few = picture.mode == "I" and values.max() <= 0xFF
        return Image.fromarray((values if few else values // 257).astype(np.uint8))
    if picture.mode == "F":
        raise UserError(f"{name}: its pixels are floating-point numbers; save it with 8 or 16 bits each")
    return picture


def is_transparent(picture: Image.Image) -> bool:
    """Whether some of its pixels may be transparent."""
    return "A" in picture.getbands() or "a" in picture.getbands() or "transparency" in picture.info


def _composited(picture: Image.Image) -> np.ndarray:
    """The pixels on white: (H, W, 1) for gray modes, and for palettes in which all colours that occur are gray."""
    if picture.mode in ("L", "RGB") and "transparency" not in picture.info:  # most pictures, in less time
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
