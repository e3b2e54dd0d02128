"""Pictures of results: sheets of images, the confusion matrix, the worst mistakes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dist_mnist.data.dataset import IdxDataset
from dist_mnist.data.sources.contact_sheet import displayable
from dist_mnist.evaluation.predict import InputImage, Prediction
from dist_mnist.utils.errors import os_error_as
from dist_mnist.utils.files import atomic_write


def sheet(images: Sequence[np.ndarray], captions: Sequence[str], columns: int = 10, zoom: int = 4) -> Image.Image:
    """Images (H, W, C) uint8 side by side, enlarged, each above its caption."""
    font, pad = ImageFont.load_default(12), 6
    height, width = (side * zoom for side in images[0].shape[:2])
    cell = (max(width, int(max(map(font.getlength, captions)))) + pad, height + 18 + pad)
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (cell[0] * min(columns, len(images)) + pad, cell[1] * rows + pad), "white")
    draw = ImageDraw.Draw(page)
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = pad + cell[0] * (number % columns), pad + cell[1] * (number // columns)
        picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
        page.paste(picture.resize((width, height), Image.Resampling.NEAREST).convert("RGB"), (left, top))
        draw.text((left, top + height + 2), caption, "black", font)
    return page


def confusion_picture(matrix: Sequence[Sequence[int]]) -> Image.Image:
    """Counts by true class (rows) and predicted class (columns); errors are red by their fraction of a row."""
    counts = np.asarray(matrix)
    numbered, font = len(counts) <= 20, ImageFont.load_default(12)
    cell = max(6, 8 + int(font.getlength(str(counts.max())))) if numbered else 6
    margin, side = 60, cell * len(counts)
    page = Image.new("RGB", (side + margin + 8, side + margin + 8), "white")
    draw = ImageDraw.Draw(page)
    draw.text((margin + side / 2, 4), "predicted class", "black", font, anchor="mt")
    draw.text((4, margin + side / 2), "true", "black", font, anchor="lm")
    fractions = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    for row, column in np.ndindex(counts.shape):
        left, top, fraction = margin + cell * column, margin + cell * row, fractions[row, column]
        strength = fraction if row == column else min(1.0, 12 * fraction)  # a wrong tenth is a lot
        faded = int(255 - 175 * strength)
        draw.rectangle(
            (left, top, left + cell - 1, top + cell - 1), (faded, faded, 255) if row == column else (255, faded, faded)
        )
        if numbered and counts[row, column]:
            draw.text((left + cell / 2, top + cell / 2), str(counts[row, column]), "black", font, anchor="mm")
    for number in range(len(counts)) if numbered else ():
        draw.text((margin + cell * (number + 0.5), margin - 12), str(number), "black", font, anchor="mm")
        draw.text((margin - 12, margin + cell * (number + 0.5)), str(number), "black", font, anchor="mm")
    return page


def mistakes_picture(probabilities: np.ndarray, dataset: IdxDataset, most: int = 40) -> Image.Image | None:
    """The images whose true class has got the least probability, of those that were taken for another; None: none was.

    `probabilities` are (N, classes), for the images of `dataset`.
    """
    predicted, labels = probabilities.argmax(1), np.asarray(dataset.labels, np.int64)
    wrong = np.flatnonzero(predicted != labels)
    worst = wrong[np.argsort(probabilities[wrong, labels[wrong]], kind="stable")][:most]
    if not len(worst):
        return None
    captions = [f"{labels[i]} as {predicted[i]} ({probabilities[i, predicted[i]]:.0%})" for i in worst]
    return sheet([displayable(image) for image in dataset.__getitems__(worst).images], captions, columns=8)


MOST_DRAWN = 200


def draw_predictions(path: Path, predictions: Sequence[Prediction], inputs: Sequence[InputImage]) -> None:
    """Write a sheet of the first images with their predicted classes, as PNG.

    Raises:
        UserError: the file cannot be written.
    """
    captions = [f"{one.predicted}  {one.probabilities[one.predicted]:.0%}" for one in predictions[:MOST_DRAWN]]
    with os_error_as(f"{path}: cannot be written"), atomic_write(path) as file:
        sheet([displayable(one.image) for one in inputs[:MOST_DRAWN]], captions).save(file, "PNG")
