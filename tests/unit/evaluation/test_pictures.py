"""Pictures as images that a network knows: centred and scaled, whatever their size, ground and format."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from dist_mnist.data.sources.synthetic import make_digits
from dist_mnist.evaluation.pictures import as_network_sees, read_picture
from dist_mnist.reporting.figures import sheet
from dist_mnist.utils.errors import UserError

SHAPE = (1, 28, 28)


@pytest.fixture(scope="module")
def drawn() -> list[np.ndarray]:
    """Generated digits, as MNIST's are: centred, light on dark, 28 x 28."""
    images, _ = make_digits(12, seed=0)
    return list(images)


def stored(picture: Image.Image, kind: str, **options) -> io.BytesIO:
    picture.save(file := io.BytesIO(), kind, **options)
    file.seek(0)
    return file


def seen(picture: Image.Image, fit: str = "auto") -> np.ndarray:
    """(28, 28) of a picture that goes through a PNG file."""
    return as_network_sees(read_picture(stored(picture, "PNG"), "it"), SHAPE, fit, "it")[:, :, 0]


def apart(one: np.ndarray, other: np.ndarray) -> float:
    """Mean difference of pixels, as a part of the mean of all."""
    return np.abs(one.astype(float) - other).mean() / other.mean()


def test_as_network_sees_picture_of_the_networks_size_is_unchanged(drawn):
    for image in drawn:
        assert np.array_equal(seen(Image.fromarray(image)), image)
        assert np.array_equal(seen(Image.fromarray(255 - image)), image)


@pytest.mark.parametrize("fit", ["auto", "digit", "whole"])
@pytest.mark.parametrize("size", [(28, 28), (60, 40)])
def test_as_network_sees_network_of_dark_on_light_gets_the_negative_of_what_others_get(drawn, fit, size):
    for image in drawn[:4]:
        for ground in (image, 255 - image):
            picture = np.asarray(Image.fromarray(ground).resize(size))
            expected = 255 - as_network_sees(picture, SHAPE, fit, "it")
            assert np.array_equal(as_network_sees(picture, SHAPE, fit, "it", light_ground=True), expected)
    light = 255 - drawn[0]
    assert np.array_equal(as_network_sees(light, SHAPE, "auto", "it", light_ground=True)[:, :, 0], light)


def seven(side: int = 280, at: tuple[int, int] = (0, 0), size: tuple[int, int] = (280, 280)) -> Image.Image:
    """A 7 that fills a square of `side` pixels, light on dark, somewhere in a picture."""
    picture, unit = Image.new("L", size, 0), side / 20
    points = [(3, 2), (16, 2), (10, 10), (8, 18)]
    line = [(at[0] + unit * x, at[1] + unit * y) for x, y in points]
    ImageDraw.Draw(picture).line(line, fill=255, width=round(2 * unit), joint="curve")
    return picture


def lit_from_one_side(picture: Image.Image) -> Image.Image:
    paper = np.linspace(140, 220, picture.width)
    return Image.fromarray((paper * (1 - np.array(picture) / 400)).astype(np.uint8))


@pytest.mark.parametrize("picture", [
    seven(100, size=(100, 100)), ImageOps.invert(seven()), seven(200, at=(550, 30), size=(800, 400)),
    seven().point(lambda value: 60 + value // 3), lit_from_one_side(seven()), seven(1000, size=(1000, 1100)),
    seven(2000, at=(600, 300), size=(4000, 3000)),
], ids=["small", "dark on light", "beside the middle", "faint", "lit from the side", "large", "photo"])  # fmt: skip
def test_as_network_sees_digit_anywhere_is_scaled_and_centred(picture):
    assert apart(seen(picture), seen(seven())) < 0.15  # in less light ink is fainter


def test_as_network_sees_digit_has_its_centre_of_mass_in_a_box_of_20(drawn):
    for image in drawn:
        found = seen(Image.fromarray(image).resize((200, 200)), "digit").astype(float)
        rows, columns = np.indices(found.shape)
        extent = [np.ptp(np.flatnonzero(found.any(axis))) + 1 for axis in (0, 1)]
        assert max(extent) == 20 and found.max() == 255
        for where in (rows, columns):
            assert abs((where * found).sum() / found.sum() - 14) <= 0.75


def test_as_network_sees_thin_line_stays_visible():
    picture = Image.new("L", (900, 900), 255)
    ImageDraw.Draw(picture).line([(450, 100), (430, 800)], fill=0, width=3)
    assert (seen(picture).max(1)[4:24] > 150).all()


def test_as_network_sees_whole_picture_keeps_its_place():
    picture = Image.new("L", (56, 28), 0)
    picture.paste(255, (40, 10, 48, 18))
    found = seen(picture, "whole")
    assert found[:7].sum() == found[21:].sum() == 0 and found[11:17, 20:24].mean() > 150 > found[11:17, :18].max()


def test_as_network_sees_colour_network_gets_colours():
    picture = Image.new("RGB", (64, 64), (200, 10, 30))
    found = as_network_sees(read_picture(stored(picture, "PNG"), "it"), (3, 32, 32), "auto", "it")
    assert found.shape == (32, 32, 3) and (found == (200, 10, 30)).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF", "TIFF", "PPM", "WEBP"])
def test_read_picture_any_format_gives_the_same_image(drawn, kind):
    large = Image.fromarray(drawn[0]).resize((112, 112), Image.Resampling.BICUBIC)
    found = as_network_sees(read_picture(stored(large, kind), "it"), SHAPE, "auto", "it")[:, :, 0]
    assert apart(found, seen(large)) < 0.1


@pytest.mark.parametrize("convert", [
    lambda p: p.convert("RGB"), lambda p: p.convert("P"), lambda p: p.convert("LA"), lambda p: p.convert("RGBA"),
    lambda p: Image.fromarray(np.asarray(p).astype(np.uint16) * 257),
], ids=["RGB", "palette", "grey and alpha", "RGBA", "16 bits"])  # fmt: skip
def test_read_picture_any_mode_gives_the_same_image(drawn, convert):
    large = Image.fromarray(drawn[0]).resize((112, 112), Image.Resampling.BICUBIC)
    assert apart(seen(convert(large)), seen(large)) < 0.05


def test_read_picture_eight_bits_in_32_are_scaled(drawn):
    large = Image.fromarray(drawn[0]).resize((112, 112), Image.Resampling.BICUBIC)
    found = as_network_sees(read_picture(stored(large.convert("I"), "TIFF"), "it"), SHAPE, "auto", "it")[:, :, 0]
    assert np.array_equal(found, seen(large))


def test_read_picture_cmyk_is_converted(drawn):
    large = Image.fromarray(255 - drawn[0]).resize((112, 112), Image.Resampling.BICUBIC).convert("RGB")
    found = as_network_sees(read_picture(stored(large.convert("CMYK"), "JPEG"), "it"), SHAPE, "auto", "it")[:, :, 0]
    assert apart(found, seen(large)) < 0.1


@pytest.mark.parametrize("ink", ["black", "white"])
def test_read_picture_transparent_ground_is_ground(drawn, ink):
    alpha = Image.fromarray(drawn[0]).resize((112, 112), Image.Resampling.BICUBIC)
    strokes = Image.new("RGBA", alpha.size, ink)
    strokes.putalpha(alpha)
    assert apart(seen(strokes), seen(alpha)) < 0.05


def test_read_picture_exif_orientation_is_applied(drawn):
    large = Image.fromarray(drawn[0]).resize((112, 112), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned to the right by 90 degrees
    file = stored(large.rotate(90), "JPEG", exif=exif)
    assert apart(as_network_sees(read_picture(file, "it"), SHAPE, "auto", "it")[:, :, 0], seen(large)) < 0.1


def test_read_picture_animation_gives_first_frame(drawn):
    first, second = (Image.fromarray(image).resize((112, 112)) for image in drawn[:2])
    file = stored(first, "GIF", save_all=True, append_images=[second])
    assert apart(as_network_sees(read_picture(file, "it"), SHAPE, "auto", "it")[:, :, 0], seen(first)) < 0.1


def png(width: int, height: int) -> bytes:
    """A PNG that announces a size, and has nearly nothing in it."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("content", "sentence"), [
    (b"hello", "the file is not a picture in a known format"),
    (b"", "the file is not a picture"),
    (png(60_000, 60_000), "the picture exceeds the limit of 50,000,000 pixels"),
    (png(10_000, 8_000), "10000 x 8000 pixels exceed the limit of 50,000,000"),
    (png(0, 5), "no pi|not a pi"),
    (png(300, 300), "the picture is damaged"),
])  # fmt: skip
def test_read_picture_other_file_is_refused(content, sentence):
    with pytest.raises(UserError, match=f"^it.*: .*{sentence}"):
        read_picture(io.BytesIO(content), "it")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_read_picture_cut_off_file_is_refused(drawn, share):
    for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"):
        content = stored(Image.fromarray(drawn[0]).resize((200, 200), Image.Resampling.BICUBIC), kind).getvalue()
        with pytest.raises(UserError, match=r"^it: "):
            read_picture(io.BytesIO(content[: int(share * len(content))]), "it")


def test_read_picture_values_beyond_brightness_are_refused():
    for picture in (Image.new("F", (30, 30), 0.5), Image.fromarray(np.full((30, 30), 70_000, np.int32))):
        with pytest.raises(UserError, match="save it with 8 or 16 bits"):
            read_picture(stored(picture, "TIFF"), "it")


@pytest.mark.parametrize("value", [0, 128, 255])
def test_as_network_sees_blank_picture_is_refused(value):
    with pytest.raises(UserError, match="nothing stands out from the background"):
        as_network_sees(np.full((28, 28), value, np.uint8), (1, 28, 28), "auto", "x.png")
    with pytest.raises(UserError, match=r"^it: nothing stands out from the background"):
        seen(Image.new("L", (50, 50), value))


def test_as_network_sees_network_of_other_channels_is_refused():
    with pytest.raises(UserError, match="pictures have 1 or 3 channels; this network's input has 2"):
        as_network_sees(np.zeros((28, 28, 3), np.uint8), (2, 28, 28), "auto", "it")


def test_sheet_places_images_in_rows(drawn):
    page = sheet([image[:, :, np.newaxis] for image in drawn], [str(number) for number in range(12)], columns=5, zoom=2)
    assert page.size == (5 * (56 + 6) + 6, 3 * (56 + 18 + 6) + 6)
    first = np.asarray(page.convert("L"))[6:62, 6:62]
    assert np.array_equal(first, drawn[0].repeat(2, 0).repeat(2, 1))
