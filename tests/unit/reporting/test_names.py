"""Class names in lines and pictures: shortened, without effect on what is beside them, or their numbers."""

import numpy as np
import pytest
from rich.cells import cell_len

from dist_mnist.reporting.figures import confusion_picture, drawn_name
from dist_mnist.reporting.text import class_label, confused_with


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("Ankle boot", "Ankle boot"),
        ("a name that is too long", "a name tha…"),
        ("猫" * 9, "猫" * 5 + "…"),
        ("\x1b[2J\n", r"\x1b[2J\n"),
        ("a\u202eb", r"a\u202eb"),
        ("\u05e9\u05dc", "\u2068\u05e9\u05dc\u2069"),
        ("\u0645\u200c\u062e", "\u2068\u0645\u200c\u062e\u2069"),
        ("[red]", "[red]"),
    ],
)
def test_class_label_fits_and_stays_by_itself(name, shown):
    assert class_label(name, 11) == shown and cell_len(shown) <= 11


def test_class_label_any_number_of_accents_is_cut():
    assert len(class_label("e" + "\u0301" * 10_000)) <= 100


def test_confused_with_names_the_classes():
    assert confused_with([0, 3, 9, 1, 2], 2, ["a", "b", "c", "d", "e"]) == "b (3), e (2), d (1)"


@pytest.mark.parametrize(
    ("name", "drawn"),
    [("Bag", "Bag"), ("zéro", "zéro"), ("Ж", "Ж"), ("猫", "7"), ("\u05e9", "7"), ("e\u0301", "7"), ("\x1b", r"\x1b")],
)
def test_drawn_name_is_the_number_where_the_font_lacks_a_letter(name, drawn):
    assert drawn_name(name, 7) == drawn


def test_confusion_picture_makes_room_for_names_and_leaves_that_of_numbers_as_it_was():
    matrix = (np.eye(10, dtype=int) * 99).tolist()
    numbers = confusion_picture(matrix, list("0123456789"))
    names = confusion_picture(matrix, ["T-shirt/top", *"123456789"])
    assert numbers.width == numbers.height < names.width == names.height
    ink = 255 - np.asarray(names.convert("L"))
    margin = names.width - numbers.width + 60
    assert ink[60:margin, margin : margin + 20].any(), "the first column's name stands upright above it"
    assert confusion_picture(np.eye(50, dtype=int).tolist(), ["x" * 99] * 50).width == 60 + 50 * 6 + 8
