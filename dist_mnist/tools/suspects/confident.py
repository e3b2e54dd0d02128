"""Confident learning: which labels are probably wrong, from held-out predictions.

The method of Northcutt, Jiang and Chuang: "Confident learning: estimating uncertainty in dataset labels" (JAIR, 2021).
Its core is a few lines of numpy, so the library of its authors, cleanlab, which needs pandas and scikit-learn, is not
used.
"""

from typing import NamedTuple

import numpy as np

ROUNDING = 1e-6  # by which a mean of equal probabilities may exceed them


class LabelErrors(NamedTuple):
    """Suspects, the most suspicious first, and an estimate of how many labels are wrong."""

    positions: np.ndarray  # (n,) int64
    suggested: np.ndarray  # (n,) int64, the most probable class
    margins: np.ndarray  # (n,) of the label's probability over that class's, from -1 to 0
    estimate: float


def find_label_errors(probabilities: np.ndarray, labels: np.ndarray) -> LabelErrors:
    """The label errors that held-out probabilities (N, classes) tell of given labels (N,).

    The joint counts estimate how many labels are wrong. So many samples, those of the least margin of their label's
    probability over the largest other one, are suspects, but for such as have the label for the most probable class.
    """
    errors, found = joint_counts(probabilities, labels), margins(probabilities, labels)
    estimate = float(errors.sum() - errors.trace())
    positions = np.argsort(found, kind="stable")[: round(estimate)]
    positions = positions[found[positions] < 0]
    return LabelErrors(positions, probabilities[positions].argmax(1), found[positions], estimate)


def joint_counts(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The estimated number of samples of each label (rows) and class (columns), (classes, classes).

    A sample counts as of the most probable class among those of which the network is as confident as it is, on average,
    for the samples that are labelled so; if there is none, it does not count. Rows are scaled to a label's samples.
    """
    num_classes = probabilities.shape[1]
    own = probabilities[np.arange(len(labels)), labels]
    given = np.bincount(labels, minlength=num_classes)
    thresholds = np.where(given > 0, np.bincount(labels, own, num_classes) / np.maximum(given, 1), np.inf)
    confident = probabilities >= thresholds - ROUNDING
    counts, counted = np.zeros((num_classes, num_classes)), confident.any(1)
    np.add.at(counts, (labels[counted], np.where(confident, probabilities, -1).argmax(1)[counted]), 1)
    return np.asarray(counts * (given / np.maximum(counts.sum(1), 1))[:, np.newaxis])


def margins(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The probability of each label less the largest of another class, (N,) from -1 to 1."""
    others, rows = probabilities.copy(), np.arange(len(labels))
    others[rows, labels] = -1
    return np.asarray(probabilities[rows, labels] - others.max(1))
