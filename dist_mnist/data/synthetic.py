"""Generated handwritten-like digits in MNIST's format, for where no network reaches a mirror.

Each digit is drawn as people write it: a skeleton chosen among several per class, bent and slanted at random, followed by
a pen of random width, then scaled to 20x20 and centred by its ink, as MNIST was. Nothing is taken from real images.

TRANSFER FIGURE
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np

from dist_mnist.data.idx import write_idx_chunks
from dist_mnist.errors import UserError

SPLITS = {"train": 0, "test": 1}
BLOCK = 1024  # samples drawn from one key; changing it changes every sample
LANES = 64  # samples rasterised together, so that the distance field stays in the processor's cache
SIDE = 28
INK_BOX = 19.6  # MNIST scales every digit until its longer side is this many pixels
NUM_POINTS = 72  # pen positions along a digit; some 0.8 pixel apart on the longest
STEPS = 16  # finer steps per curve piece, from which the pen positions are chosen

# Skeletons: (how often, strokes). x to the right and y downwards, in hundredths; `|` lifts the pen, `!` marks a sharp corner.
GLYPHS: dict[int, list[tuple[float, str]]] = {
    0: [
        (4, "59,2 32,4 10,24 5,54 18,88 48,100 77,88 95,54 86,20 61,1 43,5"),
        (2, "61,0 43,8 30,34 27,62 36,92 52,100 66,88 75,58 73,24 64,3 52,2"),
        (1, "39,12 16,28 5,56 18,90 50,100 82,88 95,52 84,18 57,2 39,6 41,20"),
        (1, "82,16 50,2 18,16 5,54 21,90 50,100 79,88 95,50 84,18 64,8 48,20"),
        (0.6, "32,6 12,26 5,56 18,90 50,100 79,90 95,56 86,22 64,4"),
        (0.6, "77,10 93,34 91,70 66,98 32,98 7,70 9,32 34,6 64,2 84,14"),
        (0.4, "88,2 61,6 27,14 7,50 21,90 50,100 82,86 93,52 79,22 55,8 34,12"),
        (0.5, "68,30 43,36 16,22 39,2 68,0 91,24 95,58 73,90 43,100 14,84 3,52 16,20 43,2"),
        (0.4, "73,2 39,4 7,36 9,78 45,100 86,88 104,52 88,20 61,14 50,24 64,34"),
        (0.4, "30,2 26,20 12,50 24,88 56,100 86,82 92,50 76,22 50,14 30,30"),
    ],
    1: [
        (8, "50,0 50,35 50,68 50,100"),
        (1.5, "46,0 52,34 53,66 48,100"),
        (1.0, "56,0 50,34 48,66 52,100"),
        (1.2, "36,18 54,0! 52,50 50,100"),
        (0.6, "26,26 54,0! 53,50 52,100"),
        (0.9, "28,22 52,0! 52,50 50,98! | 22,99 50,98 80,97"),
        (0.2, "50,0 50,50 50,98! | 26,98 76,98"),
        (0.6, "20,34 36,16 54,0! 50,50 44,100"),
        (0.3, "28,10 48,4 66,0! 50,50 34,99! | 8,98 36,99 60,97"),
    ],
    2: [
        (3, "10,29 26,8 52,0 76,16 80,40 61,64 31,84 -1,97! 45,95 101,97"),
        (2, "13,27 30,5 58,0 81,20 80,45 57,74 21,95 -1,93 8,81 31,81 55,93 82,100 103,91"),
        (1.2, "8,14 46,6 84,9! 50,55 1,97! 50,96 101,96"),
        (1.4, "13,25 38,0 70,11 76,40 48,72 4,97! 28,90 62,95 100,86"),
        (1.2, "26,42 13,29 26,6 54,0 78,18 78,45 52,72 6,97! 50,91 104,98"),
        (1, "8,33 34,3 66,6 77,33 61,66 38,90 11,100 -3,88 17,77 48,83 101,93"),
        (0.8, "26,18 46,0 64,16 67,45 55,74 30,98! 57,95 91,97"),
        (0.8, "3,25 30,11 62,6 83,21 67,49 32,74 7,91 33,98 69,95 108,91"),
        (1.5, "9,45 9,21 34,0 66,6 77,33 64,64 31,91 1,97 -2,84 18,74 41,81 65,95 108,90"),
        (1.2, "24,40 24,14 48,0 76,14 82,42 62,72 28,93 2,90 11,72 38,72 62,84 107,88"),
        (1, "17,27 34,3 60,11 65,40 45,66 4,91! 38,83 69,88 108,93"),
        (0.8, "39,45 18,40 24,11 54,0 77,21 74,51 48,79 13,98 0,86 20,74 45,86 77,98 100,88"),
        (0.7, "30,18 50,0 72,14 71,36 50,59 31,77 35,97 16,98 14,84 41,83 64,91 91,93"),
        (0.6, "-1,36 24,16 56,11 71,27 50,55 10,86 -1,97! 38,91 107,83"),
        (0.9, "23,36 26,11 52,0 73,23 66,57 38,83 11,91 8,77 32,72 62,84 91,97"),
        (0.7, "5,38 20,11 48,0 76,16 87,45 66,75 26,93! 57,93 91,97"),
        (0.6, "29,25 48,9 70,18 69,45 43,74 33,90 60,97 97,100"),
        (1.2, "18,30 28,8 56,0 80,18 78,44 58,74 30,92 8,86 24,66 52,68 78,88 98,100"),
        (1.2, "10,36 16,12 48,0 80,10 86,36 64,66 36,84 16,90 10,78 30,68 58,76 74,92 80,100"),
        (0.8, "32,12 50,0 70,8 72,30 58,56 40,80 24,84 24,70 42,68 56,80 70,100"),
        (0.8, "6,20 30,0 62,4 74,24 54,52 26,76 10,92 24,84 50,90 96,98"),
    ],
    3: [
        (3, "14,12 40,0 70,6 76,26 58,43 38,47! 66,50 84,70 72,92 42,100 10,90"),
        (1.2, "12,5 44,3 76,4! 58,26 42,43! 70,48 84,70 70,93 40,100 10,90"),
        (1.5, "16,14 42,0 70,8 72,28 52,44 36,50 52,50 74,56 84,76 66,96 38,100 12,88"),
        (1, "20,10 48,0 74,12 70,34 46,46 66,54 82,74 64,96 34,100 10,92"),
        (0.8, "10,22 28,2 62,2 74,24 56,42 34,46! 60,48 80,62 82,84 56,100 26,97 10,80"),
        (0.8, "26,8 54,0 78,14 70,36 44,50 30,46 44,42 66,54 74,76 56,96 28,100 4,90"),
        (0.8, "4,14 30,2 60,4 66,20 46,38 26,46! 62,44 92,60 84,86 48,100 8,96"),
        (0.7, "24,16 50,0 72,10 66,28 50,42! 62,52 70,70 60,90 36,100 14,94"),
        (0.7, "16,26 22,6 52,0 80,12 70,36 40,46 34,42 58,46 84,62 82,88 50,100 20,96 14,78"),
        (0.6, "10,8 40,10 70,2! 56,24 40,40! 60,42 76,58 70,80 46,96 20,100"),
        (0.6, "30,10 54,0 72,12 58,34 44,44 64,54 66,72 48,88 4,100"),
        (0.8, "12,8 40,0 66,6 62,26 40,42! 62,52 68,70 60,86 40,100"),
        (0.8, "0,14 30,4 62,0 70,16 56,32 36,44! 60,46 78,58 74,82 52,100"),
        (0.7, "22,10 50,0 68,14 54,36 30,50! 60,50 88,60 88,80 56,96 10,100"),
    ],
    4: [
        (2.5, "20,4 14,28 8,52! 46,50 88,46 | 82,0 70,30 64,64 64,100"),
        (1.5, "14,4 10,30 22,50 50,50 76,38 | 86,0 74,32 68,66 66,100"),
        (1.2, "60,0 34,32 6,64! 48,64 94,62 | 72,4 64,36 62,68 66,100"),
        (1.6, "18,2 10,28 12,48 38,54 66,46 78,24 86,2! 76,36 72,68 72,100"),
        (1, "56,2 34,28 10,58! 50,58 92,56 | 74,22 68,48 62,76 64,100"),
        (1, "28,2 16,26 6,50! 40,52 94,54 | 68,12 58,40 54,70 56,100"),
        (0.8, "20,10 12,34 24,50 52,46 72,20! 84,2! 72,36 66,68 66,100"),
        (0.6, "10,98 40,50 72,2! 64,30 62,60! | 26,62 8,60 24,60 60,58 90,58"),
        (0.9, "10,6 10,28 10,50! 46,50 84,50 | 86,2 80,36 80,70 86,100"),
        (0.6, "76,4 42,16 14,48! 44,52 72,44 | 80,4 70,36 66,68 68,100"),
        (0.6, "44,0 26,32 4,70! 44,68 96,64 | 58,34 56,60 54,80 58,100"),
        (0.25, "68,0 36,24 16,48 36,56 62,40 84,10! 74,40 66,72 64,100"),
        (0.25, "86,2 40,16 14,40 34,50 66,32 88,6! 68,36 56,70 50,100"),
        (0.6, "34,0 28,26 20,50! 48,52 78,44 | 66,24 60,50 54,76 56,100"),
        (0.8, "8,2 6,26 18,46 46,46 70,20! 90,4! 72,36 62,66 56,100"),
    ],
    5: [
        (2.5, "96,2 54,4 27,6! 18,42! 48,38 75,48 84,70 67,94 35,100 5,88"),
        (2, "27,6 22,24 18,44! 48,40 78,52 80,78 54,98 25,99 5,88 | 27,6 56,4 102,2"),
        (1.4, "98,4 54,2 29,12 27,32 50,46 73,60 78,82 54,98 27,99 5,88"),
        (1.2, "111,6 79,8 42,14! 31,42! 52,50 63,68 48,88 25,98 1,94"),
        (1, "88,0 52,4 31,8! 27,40! 54,48 67,66 63,88 37,100 12,92"),
        (0.8, "29,10 20,26 18,42 39,40 67,44 82,64 73,90 44,100 12,94 | 25,8 56,8 94,2"),
        (0.7, "81,4 33,2! 27,22 25,44! 50,36 78,42 86,66 71,92 42,100 18,92 12,78"),
        (0.8, "96,2 56,2 33,6! 25,40! 56,36 80,54 78,84 48,100 20,90 22,70 39,66"),
        (0.8, "109,10 77,10 35,14! 20,48! 44,44 61,58 52,82 27,96 1,90"),
        (0.8, "39,14 33,32 29,48! 56,48 71,64 65,86 39,100 14,92 | 39,12 63,10 96,0"),
        (0.7, "65,2 39,10 31,28 48,46 63,64 61,88 39,100 25,88"),
        (0.7, "8,8 12,28 16,48! 46,36 80,44 88,68 67,94 29,100 8,90 | 10,8 50,6 105,6"),
        (0.8, "37,20 33,50! 61,50 75,68 61,92 22,98 | 37,18 77,10 111,2"),
        (0.8, "90,0 60,10 40,16! 30,46! 56,44 66,62 56,84 30,100 10,94"),
        (0.7, "76,0 46,4 26,10! 22,34! 50,30 90,44 96,70 70,92 20,100"),
        (0.7, "60,0 30,4! 26,44! 44,38 64,48 70,70 60,90 30,100"),
    ],
    6: [
        (3, "66,0 42,16 22,44 12,72 26,96 54,100 76,84 72,64 48,56 24,70 16,86"),
        (1.6, "78,2 52,22 28,48 14,74 26,96 56,98 78,82 70,64 46,64 24,82"),
        (1.2, "76,12 58,0 34,14 16,44 12,74 28,98 58,98 78,78 66,58 38,56 16,72"),
        (1.2, "40,0 28,28 20,58 24,88 48,100 74,90 78,68 58,54 34,62 22,82"),
        (1, "60,0 36,20 18,50 14,80 34,100 64,94 72,72 54,58 34,72 36,92"),
        (0.8, "72,4 44,20 22,50 16,80 34,98 56,92 64,76 52,68 34,74 20,90"),
        (0.8, "56,0 36,22 18,52 12,82 32,100 66,98 90,80 80,60 54,62 24,84"),
        (1, "36,0 22,30 16,62 26,92 56,100 82,86 84,64 62,52 36,60 20,80"),
        (1, "40,6 16,34 10,70 30,98 66,96 92,74 82,52 56,54 36,76"),
        (0.8, "60,2 30,26 12,62 24,96 60,96 94,72 84,50 54,58 46,80 62,92"),
        (0.6, "64,0 52,30 40,58 34,84 46,100 60,88 62,72 50,66 38,80"),
    ],
    7: [
        (3, "10,8 46,7 84,5! 70,36 56,66 44,100"),
        (1.4, "10,22 13,7! 46,6 84,4! 68,36 56,66 46,100"),
        (1.2, "8,16 24,5 48,10 82,4! 66,36 54,66 46,100"),
        (1.4, "10,8 46,7 82,5! 66,40 54,68 42,100 | 32,54 56,50 80,47"),
        (1.2, "10,18 34,4 66,4 78,20 66,48 54,74 46,100"),
        (0.8, "22,12 44,4 70,4! 68,36 64,66 60,100"),
        (0.7, "14,26 26,6 48,2 66,14! 64,40 58,70 54,100"),
        (0.6, "4,14 48,8 96,4! 64,34 36,66 18,100"),
        (0.4, "16,34 18,8! 48,10 78,6! 76,40 70,70 66,100"),
        (0.8, "10,34 12,8! 46,8 84,6! 76,40 66,70 58,100"),
        (0.8, "4,30 20,10 38,16 60,20 90,4! 70,36 52,68 40,100"),
        (0.7, "14,24 24,4 44,8 62,12 84,6! 70,32 58,56 48,98 | 36,58 60,54 90,54"),
        (0.6, "20,40 18,14 40,4 68,2 76,18 62,52 50,80 44,100"),
        (0.6, "8,10 46,8 84,4! 72,36 66,66 64,100 | 44,52 68,48 96,46"),
        (0.7, "16,10 44,8 74,4! 60,36 52,66 46,100 | 14,56 48,52 86,48"),
        (0.6, "8,32 18,8! 50,12 90,2! 58,48 42,76 32,100"),
        (0.7, "8,42 16,12! 50,10 86,2! 76,32 64,64 58,100"),
        (0.5, "24,28 30,6 50,0 72,10 70,40 62,70 56,100"),
    ],
    8: [
        (3, "82,12 52,0 26,12 30,34 54,50 76,70 68,94 42,100 20,86 30,64 54,48 78,28 82,12"),
        (1.2, "50,47 26,34 26,10 50,0 78,10 74,34 50,47 22,66 22,90 50,100 78,90 78,66 50,47"),
        (1.2, "92,14 60,0 30,10 30,32 52,48 70,68 62,92 38,100 18,86 28,64 54,44 88,22"),
        (1, "72,30 88,8 56,2 28,14 34,36 56,52 72,74 58,96 34,98 20,80 38,60 66,40 80,22"),
        (1, "66,8 42,2 28,18 40,38 58,54 64,78 50,98 32,92 30,72 48,52 64,32 66,8"),
        (0.8, "50,44 80,26 76,4 44,2 26,20 44,42 70,58 80,80 60,98 30,98 18,78 32,56 52,44"),
        (0.6, "96,4 66,10 36,12 26,28 48,44 62,62 58,88 34,100 18,86 32,64 60,44 88,18 82,6"),
        (1, "88,8 56,0 28,10 28,28 48,42 66,58 60,84 46,100 36,88 44,64 56,44 86,10"),
        (0.9, "84,4 50,8 22,22 30,42 58,54 82,72 70,94 38,100 18,88 36,66 60,42 82,20 78,6"),
        (0.8, "60,34 38,36 26,20 40,2 64,0 80,16 64,34 40,52 22,76 34,98 64,98 76,80 64,60 44,44 34,34"),
        (0.8, "78,22 54,2 30,8 32,26 56,42 86,60 86,86 52,100 16,90 16,66 46,48 70,36 78,18"),
        (0.7, "58,40 32,32 24,12 46,0 78,8 80,26 54,46 44,66 42,90 54,100 66,88 62,66 50,44"),
        (0.6, "80,4 44,0 18,16 26,40 56,50 76,66 66,90 36,96 26,80 44,60 70,40 96,10"),
        (1, "88,4 50,44 24,80 40,100 64,86 50,52 24,22 40,2 68,6"),
        (0.9, "62,12 38,4 24,20 44,42 54,62 52,86 42,100 34,84 48,56 68,30 90,4"),
        (0.8, "76,18 46,2 24,16 40,40 62,62 60,92 38,100 22,84 44,54 74,30 98,12"),
        (0.9, "50,46 14,36 16,8 50,0 84,10 84,34 50,46 10,62 14,92 50,100 90,90 88,62 50,46"),
        (0.7, "80,10 50,2 20,4 34,26 54,46 70,72 62,96 40,98 30,78 46,54 66,32 82,8"),
        (0.7, "70,4 40,6 36,24 50,40 62,56 54,84 36,100 22,88 34,66 56,46 76,26 72,4"),
    ],
    9: [
        (3, "76,14 52,0 28,12 18,36 36,50 60,42 76,16! 74,44 68,72 60,100"),
        (1.4, "74,12 46,0 22,16 22,42 48,50 72,34 76,12! 78,48 72,80 50,100 22,94"),
        (1.2, "70,10 44,2 22,20 26,42 50,46 72,28 74,8! 64,40 52,70 40,100"),
        (1.2, "64,36 36,46 22,28 36,6 62,2 76,18 74,46 68,74 62,100"),
        (1, "72,22 70,4 44,2 24,20 28,44 54,44 72,22 74,46 72,74 70,100"),
        (0.8, "84,6 52,4 24,20 22,40 46,46 72,24 80,6! 70,40 60,70 52,100"),
        (0.7, "78,36 54,50 28,40 22,16 46,0 72,10 80,40 76,72 56,98 30,98 16,84"),
        (0.7, "30,10 16,34 32,48 60,40 74,12! 58,2 34,8 | 74,12 70,44 64,72 58,100"),
        (0.9, "70,6 40,10 14,32 24,46 52,36 72,10! 68,40 60,70 54,100"),
        (0.9, "80,20 66,2 36,4 16,28 28,50 58,44 80,22! 84,50 78,78 70,100"),
        (0.7, "74,30 56,6 32,8 22,34 40,48 66,36 74,28! 66,56 48,84 16,100"),
        (0.7, "68,18 52,0 34,14 36,40 56,44 70,24 68,4! 66,40 62,70 56,100"),
        (0.6, "88,0 52,6 20,22 22,42 52,40 76,18! 64,46 46,74 30,100"),
        (0.9, "76,8 40,2 10,30 22,56 50,44 76,12! 72,40 70,70 74,98"),
        (0.9, "72,12 44,0 20,20 30,44 56,42 74,14 80,44 74,74 50,100"),
        (0.7, "60,30 34,44 18,34 40,8 68,4! 64,32 58,66 54,100"),
        (0.6, "66,10 40,0 18,14 20,34 42,40 66,14! 72,44 76,72 78,100"),
        (0.9, "78,20 56,0 22,10 10,40 30,66 62,58 80,24! 80,50 78,76 76,100"),
        (0.6, "72,18 50,0 26,10 22,32 44,42 70,22! 76,50 70,84 46,100 24,90 40,72 66,66"),
        (0.7, "84,14 40,6 8,22 14,38 44,34 78,16! 72,46 66,74 62,100"),
    ],
}


def make_digits(count: int, seed: int, split: str = "train", start: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Samples `start` to `start + count` of the endless sequence of (seed, split): images and labels.

    Returns uint8 images (count, 28, 28) and uint8 labels (count,). A sample is the same however it is asked for.

    Raises:
        UserError: a negative number, or a split other than train and test.
    """
    _check(split, count=count, seed=seed, start=start)
    images, labels = np.empty((count, SIDE, SIDE), np.uint8), np.empty(count, np.uint8)
    for block in range(start // BLOCK, -(-(start + count) // BLOCK)):
        first = block * BLOCK
        begin, end = max(start, first), min(start + count, first + BLOCK)
        drawn, classes = _draw_block(seed, split, block)
        images[begin - start : end - start] = drawn[begin - first : end - first]
        labels[begin - start : end - start] = classes[begin - first : end - first]
    return images, labels


def write_digits(folder: Path, seed: int = 0, num_train: int = 60_000, num_test: int = 10_000) -> None:
    """Write MNIST's four files, raw, into `folder` (created); the test labels come last and mark a complete folder.

    Raises:
        UserError: a negative number.
        OSError: the folder cannot be written.
    """
    _check("train", seed=seed, num_train=num_train, num_test=num_test)
    folder.mkdir(parents=True, exist_ok=True)
    for split, prefix, count in (("train", "train", num_train), ("test", "t10k", num_test)):
        labels = np.empty(count, np.uint8)  # a byte each: kept while the images stream by
        chunks = _image_chunks(seed, split, labels)
        write_idx_chunks(folder / f"{prefix}-images-idx3-ubyte", np.uint8, (count, SIDE, SIDE), chunks)
        write_idx_chunks(folder / f"{prefix}-labels-idx1-ubyte", np.uint8, (count,), [labels])


def _image_chunks(seed: int, split: str, labels: np.ndarray) -> Iterator[np.ndarray]:
    """Images a block at a time, filling `labels` on the way."""
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
    """All BLOCK samples of one block: uint8 images (BLOCK, 28, 28), uint8 labels (BLOCK,)."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, SPLITS[split], block])))
    variants, variant_odds = _variants()
    chosen = rng.choice(len(variant_odds), BLOCK, p=variant_odds)
    points, gaps = _write(rng, chosen)
    half_width = np.clip(PEN * np.exp(rng.normal(0, PEN_SPREAD, BLOCK)), 0.6, 3.0).astype(np.float32)
    points = _normalise(points, gaps, half_width) + rng.normal(0, 0.35, (BLOCK, 1, 2)).astype(np.float32)
    return _rasterise(rng, points, half_width), variants[chosen]


PEN, PEN_SPREAD = 1.28, 0.27


def _write(rng: np.random.Generator, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pen positions (BLOCK, NUM_POINTS, 2) of the chosen skeletons, each distorted in its own way, and whether each
    continues the stroke before it (BLOCK, NUM_POINTS)."""

    def normal(scale: float, *shape: int) -> np.ndarray:
        return rng.normal(0, scale, (BLOCK, *shape)).astype(np.float32)

    control, corner_path, curve_path, joined = (table[chosen] for table in _tables())
    shake = 0.025 * np.exp(normal(0.4, 1, 1))
    control = control + shake * normal(1, *control.shape[1:])
    bend = rng.uniform(0.65, 1.25, (BLOCK, 1, 1)).astype(np.float32)
    points = np.matmul(corner_path + bend * curve_path, control)
    x, y = points[..., 0], points[..., 1]
    # The hand drifts slowly as it goes along.
    along = np.linspace(0, 1, NUM_POINTS, dtype=np.float32)[None, None]
    drift = normal(0.045, 2, 1) * np.sin(2 * np.pi * (normal(1.2, 2, 1) * along + normal(1, 2, 1)))
    x, y = x + drift[:, 0], y + drift[:, 1]
    # The proportions of top to bottom and left to right differ between writers, in height and in width.
    x, y = (
        x * (1 + normal(0.22, 1) * y + normal(0.2, 1) * x) + normal(0.2, 1) * (y * y - 0.1),
        y * (1 + normal(0.15, 1) * x) + normal(0.25, 1) * (0.25 - y * y) + normal(0.15, 1) * x * x,
    )
    x = x * np.exp(normal(0.20, 1) - 0.08)
    x = x - y * (0.09 + normal(0.25, 1))
    turn = normal(0.10, 1)
    x, y = x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)
    return np.stack([x, y], axis=-1), joined


def _normalise(points: np.ndarray, joined: np.ndarray, half_width: np.ndarray) -> np.ndarray:
    """Scale the drawing's longer side, pen included, to INK_BOX pixels and put its centre of ink at the image's centre."""
    extent = np.ptp(points, axis=1).max(axis=1)
    points = points * ((INK_BOX - 2 * half_width) / extent)[:, None, None]
    length = np.zeros(joined.shape, np.float32)
    length[:, 1:] = np.hypot(*np.moveaxis(np.diff(points, axis=1), -1, 0))
    ink = (length * joined)[..., None]
    return points - (points * ink).sum(1, keepdims=True) / ink.sum(1, keepdims=True) + SIDE / 2


def _rasterise(rng: np.random.Generator, points: np.ndarray, half_width: np.ndarray) -> np.ndarray:
    """Ink (BLOCK, 28, 28) uint8 of pens of `half_width` pixels that passed through `points`."""
    pressure = 1 + rng.normal(0, 0.12, (BLOCK, 1)) * np.linspace(-1, 1, NUM_POINTS)
    pressure = pressure + rng.normal(0, 0.07, (BLOCK, 1)) * np.cos(np.linspace(0, 9, NUM_POINTS))
    closeness = (1 / np.maximum(pressure, 0.5)).astype(np.float32)
    blur = rng.uniform(0.9, 1.4, BLOCK).astype(np.float32)
    rough = rng.integers(0, 256, (BLOCK, SIDE, SIDE), dtype=np.uint8)
    images = np.empty((BLOCK, SIDE, SIDE), np.uint8)
    for lanes in (slice(i, i + LANES) for i in range(0, BLOCK, LANES)):
        distance = _distance(points[lanes], closeness[lanes])
        distance += rough[lanes] * np.float32(0.25 / 255) - np.float32(0.125)
        ink = (half_width[lanes, None, None] - distance) / blur[lanes, None, None] + np.float32(0.5)
        images[lanes] = np.clip(ink, 0, 1) * 255
    return images


def _distance(points: np.ndarray, closeness: np.ndarray) -> np.ndarray:
    """Distance (LANES, 28, 28) of each pixel's centre to the nearest point, in units of the pen's local width."""
    centres = np.arange(SIDE, dtype=np.float32)[:, None] + np.float32(0.5)
    # (points, 28, lanes): the samples lie innermost, so that every operation runs over contiguous memory
    scaled = closeness.T[:, None, :]
    across = np.square((centres - points[..., 0].T[:, None, :]) * scaled)
    down = np.square((centres - points[..., 1].T[:, None, :]) * scaled)
    nearest = np.full((SIDE, SIDE, len(points)), np.inf, np.float32)
    square = np.empty_like(nearest)
    for x, y in zip(across, down, strict=True):
        np.add(y[:, None, :], x[None, :, :], out=square)
        np.minimum(nearest, square, out=nearest)
    return np.sqrt(nearest).transpose(2, 0, 1)


@cache
def _variants() -> tuple[np.ndarray, np.ndarray]:
    """For every skeleton its digit (uint8) and its probability; the ten digits are equally likely."""
    digits = np.array([digit for digit, glyphs in GLYPHS.items() for _ in glyphs], np.uint8)
    weights = [weight / sum(w for w, _ in glyphs) for glyphs in GLYPHS.values() for weight, _ in glyphs]
    return digits, np.array(weights) / len(GLYPHS)


@cache
def _tables() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Every skeleton's control points (K, 2), its paths' weights (NUM_POINTS, K) with straight and with additional curved
    pieces, and its joined flags (NUM_POINTS,); stacked over skeletons, zero-padded to the largest K."""
    skeletons = [_skeleton(strokes) for glyphs in GLYPHS.values() for _, strokes in glyphs]
    size = max(len(control) for control, *_ in skeletons)
    padded = []
    for control, corner_path, curve_path, joined in skeletons:
        pad = (0, size - len(control))
        wide = (np.pad(path, ((0, 0), pad)) for path in (corner_path, curve_path))
        padded.append((np.pad(control, (pad, (0, 0))), *wide, joined))
    return tuple(np.stack(column).astype(np.float32) for column in zip(*padded, strict=True))


def _skeleton(strokes: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """One skeleton's row of `_tables`: cubic Hermite pieces through its points, tangents zero at corners."""
    control, straight, curved, joined = [], [], [], []
    words = [stroke.split() for stroke in strokes.split("|")]
    total = sum(map(len, words))
    t = np.arange(STEPS)[:, None] / STEPS
    rise, leave, arrive = t * t * (3 - 2 * t), t * (1 - t) ** 2, -t * t * (1 - t)
    eye = np.eye(total)
    for stroke in words:
        base = len(control)
        control += [[int(v) / 100 - 0.5 for v in word.rstrip("!").split(",")] for word in stroke]
        last = len(control) - 1
        for i in range(base, last):
            straight.append((1 - rise) * eye[i] + rise * eye[i + 1])
            curved.append(sum(shape * _tangent(eye, stroke, base, k) for shape, k in ((leave, i), (arrive, i + 1))))
            joined += [float(i > base)] + [1.0] * (STEPS - 1)
        straight.append(eye[last : last + 1])
        curved.append(np.zeros((1, total)))
        joined.append(1.0)
    control, straight, curved = np.array(control), np.concatenate(straight), np.concatenate(curved)
    return control, *_thin(control, straight, curved, np.array(joined))


def _tangent(eye: np.ndarray, stroke: list[str], base: int, index: int) -> np.ndarray:
    """The tangent at control point `index` as weights of the control points."""
    last = base + len(stroke) - 1
    if stroke[index - base].endswith("!"):
        return np.zeros(len(eye))
    return (eye[min(index + 1, last)] - eye[max(index - 1, base)]) / 2


def _thin(control, straight, curved, joined):
    """Choose NUM_POINTS of the fine steps, evenly spaced along the strokes."""
    path = (straight + curved) @ control
    length = np.hypot(*np.diff(path, axis=0).T) * joined[1:]
    along = np.concatenate([[0], np.cumsum(length)])
    chosen = np.searchsorted(along, np.linspace(0, along[-1], NUM_POINTS))
    starts = np.cumsum(joined == 0)[chosen]  # which stroke
    flags = np.concatenate([[0], starts[1:] == starts[:-1]])
    return straight[chosen], curved[chosen], flags
