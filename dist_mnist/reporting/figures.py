"""Figures of results: contact sheets, the confusion matrix, the worst mistakes, the reliability curve."""

import io
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dist_mnist.data.dataset import IdxDataset
from dist_mnist.data.sources.contact_sheet import displayable
from dist_mnist.evaluation.predict import InputImage, Prediction
from dist_mnist.reporting.text import RIGHT_TO_LEFT, class_label
from dist_mnist.run.records import ReliabilityBin
from dist_mnist.utils.errors import os_error_as
from dist_mnist.utils.files import atomic_write

FONT_SIZE = 12
WHITE_FROM = 0.9  # fraction of the darkest blue from which white text is easier to read on it
STYLE: Any = {  # matplotlib's rc parameters
    "svg.fonttype": "path", "svg.hashsalt": "dist_mnist", "font.size": 9, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
}  # fmt: skip
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@cache
def _wide_font() -> tuple[Font, frozenset[int]]:
    """Return matplotlib's font, which covers many scripts, and its characters."""
    import matplotlib
    from matplotlib.ft2font import FT2Font

    path = str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
    return ImageFont.truetype(path, FONT_SIZE), frozenset(FT2Font(path).get_charmap())


def _font(texts: Iterable[str]) -> Font:
    return ImageFont.load_default(FONT_SIZE) if all(map(str.isascii, texts)) else _wide_font()[0]


def drawn_name(name: str, number: int, width: int = 20) -> str:
    """Return a class's name for a figure, shortened to `width` columns; its number if the font lacks a character."""
    label = class_label(name, width)
    return label if _can_be_drawn(label) else str(number)


def _can_be_drawn(text: str) -> bool:
    """Return whether the font has all characters, and all are left-to-right and not combining."""
    if text.isascii():
        return True
    alone = all(unicodedata.bidirectional(c) not in RIGHT_TO_LEFT and not unicodedata.combining(c) for c in text)
    return alone and {ord(c) for c in text} <= _wide_font()[1]


def sheet(images: Sequence[np.ndarray], captions: Sequence[str], columns: int = 10, zoom: int = 4) -> Image.Image:
    """Draw images (H, W, C) uint8 in a grid, enlarged, each above its caption."""
    font, pad = _font(captions), 6
    height, width = (side * zoom for side in images[0].shape[:2])
    cell = (max(width, int(max(map(font.getlength, captions))) + pad) + pad, height + 18 + pad)
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (cell[0] * min(columns, len(images)) + pad, cell[1] * rows + pad), "white")
    draw = ImageDraw.Draw(page)
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = pad + cell[0] * (number % columns), pad + cell[1] * (number // columns)
        picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
        page.paste(picture.resize((width, height), Image.Resampling.NEAREST).convert("RGB"), (left, top))
        draw.text((left, top + height + 2), caption, "black", font)
    return page


def confusion_picture(matrix: Sequence[Sequence[int]], names: Sequence[str]) -> Image.Image:
    """Draw counts by true class (rows) and predicted class (columns); errors are redder by their fraction of a row."""
    counts = np.asarray(matrix)
    numbered = len(counts) <= 20
    labels = [drawn_name(name, number) for number, name in enumerate(names)] if numbered else []
    font = _font(labels)
    widest = max(map(font.getlength, labels), default=0)
    cell = max(6, 8 + int(font.getlength(str(counts.max())))) if numbered else 6
    upright, side = widest <= cell, cell * len(counts)
    margin = 60 if upright else 42 + int(widest)
    page = Image.new("RGB", (side + margin + 8, side + margin + 8), "white")
    draw = ImageDraw.Draw(page)
    draw.text((margin + side / 2, 4), "predicted class", "black", font, anchor="mt")
    draw.text((4, margin + side / 2), "true", "black", font, anchor="lm")
    fractions = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    for row, column in np.ndindex(counts.shape):
        left, top, fraction = margin + cell * column, margin + cell * row, fractions[row, column]
        strength = fraction if row == column else min(1.0, 12 * fraction)  # full red at 1/12 of a class
        faded = int(255 - 175 * strength)
        draw.rectangle(
            (left, top, left + cell - 1, top + cell - 1), (faded, faded, 255) if row == column else (255, faded, faded)
        )
        if numbered and counts[row, column]:
            ink = "white" if row == column and fraction >= WHITE_FROM else "black"
            draw.text((left + cell / 2, top + cell / 2), str(counts[row, column]), ink, font, anchor="mm")
    for number, label in enumerate(labels):
        middle = margin + cell * (number + 0.5)
        if upright:
            draw.text((middle, margin - 12), label, "black", font, anchor="mm")
            draw.text((margin - 12, middle), label, "black", font, anchor="mm")
        else:
            turned = _text_mask(label, font).rotate(90, expand=True)
            page.paste("black", (int(middle - turned.width / 2), margin - 4 - turned.height), turned)
            draw.text((margin - 6, middle), label, "black", font, anchor="rm")
    return page


def _text_mask(text: str, font: Font) -> Image.Image:
    mask = Image.new("L", (int(font.getlength(text)) + 2, FONT_SIZE + 4))
    ImageDraw.Draw(mask).text((0, mask.height / 2), text, 255, font, anchor="lm")
    return mask


def mistakes_picture(
    probabilities: np.ndarray, dataset: IdxDataset, names: Sequence[str], most: int = 40
) -> Image.Image | None:
    """Draw the misclassified images with the lowest probabilities of their true class; None if there are none.

    `probabilities` are (N, classes), for the images of `dataset`; `names` are the class names.
    """
    predicted, labels = probabilities.argmax(1), dataset.sample_labels
    names = [drawn_name(name, number, 14) for number, name in enumerate(names)]
    wrong = np.flatnonzero(predicted != labels)
    worst = wrong[np.argsort(probabilities[wrong, labels[wrong]], kind="stable")][:most]
    if not len(worst):
        return None
    captions = [f"{names[labels[i]]} as {names[predicted[i]]} ({probabilities[i, predicted[i]]:.0%})" for i in worst]
    return sheet([displayable(image) for image in dataset.__getitems__(worst).images], captions, columns=8)


MOST_DRAWN = 200


def draw_predictions(path: Path, predictions: Sequence[Prediction], inputs: Sequence[InputImage]) -> None:
    """Write a contact sheet of the first 200 images with their predicted classes, as PNG.

    Raises:
        UserError: the file cannot be written.
    """
    shown_ones = predictions[:MOST_DRAWN]
    names = [drawn_name(one.name, one.predicted) for one in shown_ones]
    captions = [f"{name}  {one.probabilities[one.predicted]:.0%}" for one, name in zip(shown_ones, names, strict=True)]
    draw_sheet(path, [one.image for one in inputs[:MOST_DRAWN]], captions)


def draw_sheet(path: Path, images: Sequence[np.ndarray], captions: Sequence[str], columns: int = 10) -> None:
    """Write a contact sheet of images (H, W, C) of any dtype with their captions, as PNG.

    Raises:
        UserError: the file cannot be written.
    """
    with os_error_as(f"{path}: cannot be written"), atomic_write(path) as file:
        sheet([displayable(image) for image in images], captions, columns).save(file, "PNG")


def reliability_diagram(reliability: Sequence[ReliabilityBin]) -> bytes:
    """Draw the reliability curve as an SVG: accuracy over confidence, a bar for each bin, above the number of images.

    The gap to the mean confidence is hatched: above a bar it is overconfidence, within a bar underconfidence.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    file, width = io.BytesIO(), 1 / len(reliability)
    shown = [(number * width, one) for number, one in enumerate(reliability) if one.images]
    lefts, counts = [left for left, _ in shown], [one.images for _, one in shown]
    accuracies, confidences = ([getattr(one, name) for _, one in shown] for name in ("accuracy", "confidence"))
    gaps = np.subtract(confidences, accuracies)
    with rc_context(STYLE):
        page = Figure(figsize=(4.6, 4.6), layout="constrained")
        upper, lower = page.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        upper.bar(lefts, accuracies, width, align="edge", color="#9dbde8", edgecolor="white", label="accuracy")
        upper.bar(
            lefts, gaps, width, accuracies, align="edge", facecolor="none", edgecolor="#c0392b", lw=0.6, hatch="////",
            label="gap to confidence",
        )  # fmt: skip
        upper.plot([0, 1], [0, 1], "--", color="#444", lw=1, label="calibrated")
        upper.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="accuracy")
        page.legend(frameon=False, loc="outside upper center", ncols=3)
        lower.bar(lefts, counts, width, align="edge", color="#999", edgecolor="white")
        lower.set(yscale="log", ylim=(0.5, 2 * max(counts)), ylabel="images", xlabel="confidence")
        page.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
