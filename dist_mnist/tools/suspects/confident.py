"""Confident learning: estimate which labels are wrong from held-out predictions.

Method: Northcutt, Jiang and Chuang, "Confident learning: estimating uncertainty in dataset labels" (JAIR, 2021). Its
core is a few lines of numpy; the authors' library, cleanlab, would add pandas and scikit-learn as dependencies.
"""

from typing import NamedTuple

import numpy as np

ROUNDING = 1e-6  # tolerance: the computed mean of equal probabilities may exceed them slightly


class LabelErrors(NamedTuple):
    """Suspects, the most suspicious first, and the estimated number of wrong labels."""

    positions: np.ndarray  # (n,) int64
    suggested: np.ndarray  # (n,) int64, most probable class
    margins: np.ndarray  # (n,) probability of the label minus that of the suggested class, from -1 to 0
    estimate: float


def find_label_errors(probabilities: np.ndarray, labels: np.ndarray) -> LabelErrors:
    """Return the suspected label errors, given held-out probabilities (N, classes) and labels (N,).

    The joint counts estimate the number n of wrong labels. Suspects are the n samples with the smallest margin of the
    label's probability over the largest other one, except samples whose label is the most probable class.
    """
    errors, found = joint_counts(probabilities, labels), margins(probabilities, labels)
    estimate = float(errors.sum() - errors.trace())
    positions = np.argsort(found, kind="stable")[: round(estimate)]
    positions = positions[found[positions] < 0]
    return LabelErrors(positions, probabilities[positions].argmax(1), found[positions], estimate)


def joint_counts(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the estimated number of samples by given label (rows) and true class (columns), (classes, classes).

    The threshold of a class is the average probability of that class over the samples with that label. A sample counts
    for its most probable class among those above their threshold, or not at all. Rows are scaled to sum to the number
    of samples with that label.
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
    """Return the probability of each label minus the largest probability of another class, (N,) from -1 to 1."""
    others, rows = probabilities.copy(), np.arange(len(labels))
    others[rows, labels] = -1
    return np.asarray(probabilities[rows, labels] - others.max(1))
