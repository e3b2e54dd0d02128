"""Synthetic digits that resemble handwriting, in MNIST's format, for machines without network access.

A digit is one of several skeletons of its class, randomly bent, slanted and jittered, drawn by a pen of random width,
then scaled and centred as in MNIST. The skeletons were written by hand, not traced from images. Their choice and the
ranges of slant, proportions and pen width were tuned on MNIST's training set.

Measured: a CNN (conv 5x5x32, pool, conv 5x5x64, pool, dense 1024, dropout 0.4) trained on 60 000 of these (seed 0,
3 epochs, batch size 256, Nesterov SGD, one-cycle to 0.1, bf16, no augmentation; a single run) has 97.2 % accuracy on
MNIST's 10 000 test images, which were not used in choosing the skeletons.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dist_mnist.data.idx import write_idx_chunks
from dist_mnist.data.sources.glyphs import GLYPHS
from dist_mnist.utils.errors import UserError

SPLITS = {"train": 0, "test": 1}
BLOCK = 512  # samples generated from one key; changing it changes every sample
LANES = 64  # samples rasterised together, few enough that their distance field fits in the CPU cache
SIDE = 28
INK_BOX = 19.6  # pixels of a digit's longer side; with the pen's soft edge this gives MNIST's 20
PEN_HALF_WIDTH = 1.28  # median, in pixels
NUM_POINTS = 72  # pen positions along a digit, about one pixel apart at most
STEPS = 65  # fine positions on each curve piece, from which the pen positions are chosen


class Skeletons(NamedTuple):
    """All skeletons, stacked along the first axis, padded with zeros to K control points."""

    digits: np.ndarray  # uint8
    odds: np.ndarray  # probability of each skeleton; those of a digit sum to 0.1
    control: np.ndarray  # (K, 2) control points, relative to the centre of the box
    straight: np.ndarray  # (NUM_POINTS, K) weights of the control points for each pen position, for straight pieces
    curved: np.ndarray  # (NUM_POINTS, K) added to `straight` for round pieces
    joined: np.ndarray  # (NUM_POINTS,) 1 if ink connects this position with the previous one


def make_digits(count: int, seed: int, split: str = "train", start: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Generate samples `start` to `start + count` of the infinite sequence of (seed, split).

    Returns uint8 images (count, 28, 28) and uint8 labels (count,). A sample depends only on seed, split and its index.
    On other processors or numpy versions, rounding may change single pixels: ranks that must agree share files instead.

    Raises:
        UserError: a number is negative, or the split is neither train nor test.
    """
    _check(split, count=count, seed=seed, start=start)
    images, labels = np.empty((count, SIDE, SIDE), np.uint8), np.empty(count, np.uint8)
    for block in range(start // BLOCK, -(-(start + count) // BLOCK) if count else 0):
        first = block * BLOCK
        begin, end = max(start, first), min(start + count, first + BLOCK)
        block_images, block_labels = _draw_block(seed, split, block)
        images[begin - start : end - start] = block_images[begin - first : end - first]
        labels[begin - start : end - start] = block_labels[begin - first : end - first]
    return images, labels


def write_digits(folder: Path, seed: int = 0, num_train: int = 60_000, num_test: int = 10_000) -> None:
    """Write MNIST's four files, raw, to `folder` (created if missing). The test labels come last and mark it complete.

    Raises:
        UserError: a number is negative.
        OSError: the folder cannot be written.
    """
    _check("train", seed=seed, num_train=num_train, num_test=num_test)
    folder.mkdir(parents=True, exist_ok=True)
    for split, prefix, count in (("train", "train", num_train), ("test", "t10k", num_test)):
        labels = np.empty(count, np.uint8)  # small enough to keep while the images are streamed
        chunks = _image_chunks(seed, split, labels)
        write_idx_chunks(folder / f"{prefix}-images-idx3-ubyte", np.uint8, (count, SIDE, SIDE), chunks)
        write_idx_chunks(folder / f"{prefix}-labels-idx1-ubyte", np.uint8, (count,), [labels])


def _image_chunks(seed: int, split: str, labels: np.ndarray) -> Iterator[np.ndarray]:
    """Yield images a block at a time, filling `labels` along the way."""
    for start in range(0, len(labels), BLOCK):
        count = min(BLOCK, len(labels) - start)
        images, labels[start : start + count] = make_digits(count, seed, split, start)
        yield images


def _check(split: str, **numbers: int) -> None:
    if split not in SPLITS:
        raise UserError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
    for name, number in numbers.items():
        if number < 0:
            raise UserError(f"{name} is {number}; expected 0 or more")


def _draw_block(seed: int, split: str, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Generate all samples of one block: uint8 images (BLOCK, 28, 28), uint8 labels (BLOCK,)."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, SPLITS[split], block])))
    skeletons = _skeletons()
    chosen = rng.choice(len(skeletons.odds), BLOCK, p=skeletons.odds)
    points = _distort(rng, _trace(rng, skeletons, chosen))
    half_width = np.clip(PEN_HALF_WIDTH * np.exp(_normal(rng, 0.27)), 0.6, 3)
    points = _normalise(points, skeletons.joined[chosen], half_width) + _normal(rng, 0.35, 1, 2)
    return _rasterise(rng, points, half_width), skeletons.digits[chosen]


def _normal(rng: np.random.Generator, scale: float, *shape: int) -> np.ndarray:
    """Return normally distributed float32 values (BLOCK, *shape)."""
    return rng.standard_normal((BLOCK, *shape), dtype=np.float32) * np.float32(scale)


def _trace(rng: np.random.Generator, skeletons: Skeletons, chosen: np.ndarray) -> np.ndarray:
    """Return pen positions (BLOCK, NUM_POINTS, 2) along the chosen skeletons, with jittered points and roundness."""
    control = skeletons.control[chosen]
    control = control + 0.025 * np.exp(_normal(rng, 0.4, 1, 1)) * _normal(rng, 1, *control.shape[1:])
    roundness = rng.uniform(0.65, 1.25, (BLOCK, 1, 1)).astype(np.float32)
    return (skeletons.straight[chosen] + roundness * skeletons.curved[chosen]) @ control


def _distort(rng: np.random.Generator, points: np.ndarray) -> np.ndarray:
    """Bend whole digits smoothly, as handwriting varies between writers and days."""
    # The hand drifts slowly along the stroke.
    along = np.linspace(0, 1, NUM_POINTS, dtype=np.float32)[None, :, None]
    turns = _normal(rng, 1.2, 1, 2) * along + _normal(rng, 1, 1, 2)
    x, y = np.moveaxis(points + _normal(rng, 0.045, 1, 2) * np.sin(2 * np.pi * turns), -1, 0)
    # Top and bottom, left and right differ in size; lines bend.
    x, y = (
        x * (1 + _normal(rng, 0.22, 1) * y + _normal(rng, 0.2, 1) * x) + _normal(rng, 0.2, 1) * (y * y - 0.1),
        y * (1 + _normal(rng, 0.15, 1) * x) + _normal(rng, 0.25, 1) * (0.25 - y * y) + _normal(rng, 0.15, 1) * x * x,
    )
    # The paper has small waves.
    phase = 2 * np.pi * rng.random((BLOCK, 2, 1), dtype=np.float32)
    wave = _normal(rng, 0.02, 2, 1)
    x, y = x + wave[:, 0] * np.sin(7 * y + phase[:, 0]), y + wave[:, 1] * np.sin(7 * x + phase[:, 1])
    # Width, slant, rotation.
    x = x * np.exp(_normal(rng, 0.2, 1) - 0.08)
    x = x - y * (0.09 + _normal(rng, 0.25, 1))
    angle = _normal(rng, 0.1, 1)
    return np.stack([x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)], axis=-1)


def _normalise(points: np.ndarray, joined: np.ndarray, half_width: np.ndarray) -> np.ndarray:
    """Scale the longer side, including the pen, to INK_BOX pixels, and centre the ink's centre of mass."""
    points = points * ((INK_BOX - 2 * half_width) / np.ptp(points, axis=1).max(axis=1))[:, None, None]
    ink = np.linalg.norm(np.diff(points, axis=1, prepend=points[:, :1]), axis=-1, keepdims=True) * joined[..., None]
    return points - (points * ink).sum(axis=1, keepdims=True) / ink.sum(axis=1, keepdims=True) + SIDE / 2


def _rasterise(rng: np.random.Generator, points: np.ndarray, half_width: np.ndarray) -> np.ndarray:
    """Draw uint8 images (BLOCK, 28, 28) by pens of `half_width` pixels and uneven pressure through `points`."""
    along = np.linspace(-1, 1, NUM_POINTS, dtype=np.float32)
    pressure = 1 + _normal(rng, 0.12, 1) * along + _normal(rng, 0.07, 1) * np.cos(4.5 * (along + 1))
    pressure = np.maximum(pressure, 0.5)
    blur = rng.uniform(0.9, 1.4, (BLOCK, 1, 1)).astype(np.float32)
    rough = rng.random((BLOCK, SIDE, SIDE), dtype=np.float32) * 0.25 - 0.125
    images = np.empty((BLOCK, SIDE, SIDE), np.uint8)
    for lanes in (slice(i, i + LANES) for i in range(0, BLOCK, LANES)):
        distance = _distance(points[lanes], pressure[lanes]) + rough[lanes]
        ink = (half_width[lanes, None, None] - distance) / blur[lanes] + 0.5
        images[lanes] = np.clip(ink, 0, 1) * 255
    return images


def _distance(points: np.ndarray, pressure: np.ndarray) -> np.ndarray:
    """Return the distance (LANES, 28, 28) of pixel centres to the nearest point, divided by the pressure there."""
    # Samples are the innermost axis, so that the two operations of the loop run over contiguous memory.
    centres = np.arange(0.5, SIDE, dtype=np.float32)[:, None]
    offsets = (centres - points.transpose(2, 1, 0)[:, :, None]) / pressure.T[:, None]
    across, down = np.square(offsets)  # each (NUM_POINTS, 28, LANES)
    nearest = np.full((SIDE, SIDE, len(points)), np.inf, np.float32)
    square = np.empty_like(nearest)
    for x, y in zip(across, down, strict=True):
        np.add(y[:, None], x[None], out=square)
        np.minimum(nearest, square, out=nearest)
    return np.sqrt(nearest).transpose(2, 0, 1)


@cache
def _skeletons() -> Skeletons:
    """Parse GLYPHS."""
    entries = [(digit, glyph.split("*")) for digit, glyphs in GLYPHS.items() for glyph in glyphs.split(";")]
    digits = np.array([digit for digit, _ in entries], np.uint8)
    weights = np.array([float(weight) for _, (weight, _) in entries])
    odds = weights / np.bincount(digits, weights)[digits] / len(GLYPHS)
    tables = [_skeleton(path) for _, (_, path) in entries]
    size = max(len(control) for control, *_ in tables)
    control = np.stack([_padded(control.T, size).T for control, *_ in tables])
    straight, curved = (np.stack([_padded(table[k], size) for table in tables]) for k in (1, 2))
    return Skeletons(digits, odds, control, straight, curved, np.stack([table[3] for table in tables]))


def _padded(table: np.ndarray, size: int) -> np.ndarray:
    return np.pad(table, ((0, 0), (0, size - table.shape[1]))).astype(np.float32)


def _skeleton(path: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return control, straight, curved and joined of one skeleton: cubic Hermite pieces, zero tangents at corners."""
    words = [(stroke, word) for stroke, part in enumerate(path.split("|")) for word in part.split()]
    control = np.array([(int(word[:2]), int(word[2:4])) for _, word in words], np.float32) / 100 - 0.5
    strokes = np.array([stroke for stroke, _ in words])
    here, eye = np.arange(len(words)), np.eye(len(words))
    after = here + (np.append(strokes[1:], -1) == strokes)
    before = here - (np.insert(strokes[:-1], 0, -1) == strokes)
    corner = np.array([word.endswith("!") for _, word in words])[:, None]
    tangent = np.where(corner, 0, (eye[after] - eye[before]) / 2)
    piece = np.repeat(here[after > here], STEPS)  # the piece from point i to i + 1, at each of its fine steps
    t = np.tile(np.linspace(0, 1, STEPS), len(piece) // STEPS)[:, None]
    rise = t * t * (3 - 2 * t)
    straight = (1 - rise) * eye[piece] + rise * eye[piece + 1]
    curved = t * (1 - t) ** 2 * tangent[piece] - t * t * (1 - t) * tangent[piece + 1]
    chosen = _evenly((straight + curved) @ control, strokes[piece])
    joined = np.diff(strokes[piece][chosen], prepend=0) == 0
    return control, straight[chosen], curved[chosen], joined.astype(np.float32)


def _evenly(path: np.ndarray, strokes: np.ndarray) -> np.ndarray:
    """Return NUM_POINTS indices into `path`, evenly spaced along its inked parts."""
    steps = np.linalg.norm(np.diff(path, axis=0), axis=1) * (np.diff(strokes) == 0)
    along = np.append(0, np.cumsum(steps))
    return np.searchsorted(along, np.linspace(0, along[-1], NUM_POINTS))
