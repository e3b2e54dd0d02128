"""The contact sheet: which images are on it, where, how large, and what stands beside them."""

import numpy as np
import pytest
from PIL import Image

from dist_mnist.data.sources.contact_sheet import MAX_ROWS, contact_sheet
from dist_mnist.utils.errors import UserError

LABELS = np.array([1, 0, 1, 1, 0, 1, 1])
IMAGES = np.broadcast_to(10 * np.arange(1, 8, dtype=np.uint8)[:, None, None, None], (7, 4, 6, 1))  # a grey each


def sheet(tmp_path, *args, **options) -> Image.Image:
    contact_sheet(*args, path=tmp_path / "sheet.png", **options)
    return Image.open(tmp_path / "sheet.png")


def greys(page: Image.Image) -> list[list[int]]:
    """The greys of images, from left to right, in each line of the sheet that has some."""
    pixels = np.asarray(page.convert("L"))[:, pixel_columns(page)]
    lines = [[int(value) for value in dict.fromkeys(line) if value <= 70] for line in pixels]
    return [line for line, before in zip(lines, [[], *lines], strict=False) if line and line != before]


def pixel_columns(page: Image.Image) -> np.ndarray:
    """The columns right of the names, which are black on white and some way in between."""
    return np.arange(page.width - 4 * (60 + 6), page.width)


def test_sheet_has_a_row_a_class_with_images_at_even_distances(tmp_path):
    assert greys(sheet(tmp_path, IMAGES, LABELS, ["a", "b"], per_class=4)) == [[20, 50], [10, 30, 40, 70]]


def test_sheet_small_images_are_enlarged_by_a_whole_factor(tmp_path):
    ramp = np.arange(24, dtype=np.uint8).reshape(1, 4, 6, 1)
    page = sheet(tmp_path, ramp, np.array([0]), ["a"], per_class=1)
    block = np.asarray(page.convert("L"))[6:46, -66:-6]  # 10 times 4 x 6
    np.testing.assert_array_equal(block, np.kron(ramp[0, :, :, 0], np.ones((10, 10), np.uint8)))


@pytest.mark.parametrize("dtype", [">f4", ">i2", "i1", ">i4", ">f8"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sheet_shows_images_of_any_dtype_and_channels(tmp_path, dtype, channels):
    images = np.arange(2 * 5 * 5 * channels).reshape(2, 5, 5, channels).astype(dtype)
    page = np.asarray(sheet(tmp_path, images, np.array([0, 1]), ["a", "b"], per_class=1))
    assert page[6:-6, -60:-6].min() == 0 and page.max() == 255


def test_sheet_large_images_are_reduced(tmp_path):
    images = np.zeros((1, 1000, 500, 1), np.uint8)
    page = np.asarray(sheet(tmp_path, images, np.array([0]), ["a"], per_class=1).convert("L"))
    assert page[6:134, -70:-6].max() == 0 and page.shape[0] == 6 + 128 + 6


def test_sheet_of_many_classes_ends_and_says_how_many_more(tmp_path):
    names, images = [str(i) for i in range(60)], np.zeros((60, 4, 4, 1), np.uint8)
    few = sheet(tmp_path, images[:50], np.arange(50), names[:MAX_ROWS], per_class=1).height
    many = sheet(tmp_path, images, np.arange(60), names, per_class=1)
    assert few < many.height < few + 40
    last_line = np.asarray(many.convert("L"))[few:]
    assert last_line.min() < 50, "there is a line of text"


def test_sheet_class_without_images_has_its_name_alone(tmp_path):
    page = sheet(tmp_path, IMAGES, LABELS, ["a", "b", "あ, кот, ß"], per_class=4)
    assert len(greys(page)) == 2
    assert np.asarray(page.convert("L"))[-40:].min() < 50, "the name"


def test_sheet_names_of_other_alphabets_are_drawn_or_replaced_by_code_points(tmp_path):
    images, labels = np.zeros((1, 4, 4, 1), np.uint8), np.array([0])
    drawn = {name: np.asarray(sheet(tmp_path, images, labels, [name])) for name in ("кот", "くち", "く", "(U+304F)")}
    np.testing.assert_array_equal(drawn["く"], drawn["(U+304F)"])
    assert drawn["кот"].shape[1] < drawn["く"].shape[1] < drawn["くち"].shape[1]


def test_sheet_folder_is_missing_error_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"no/sheet\.png: cannot be written \(No such file"):
        contact_sheet(IMAGES, LABELS, ["a", "b"], tmp_path / "no" / "sheet.png")
