"""Confident learning: which labels are probably wrong, from held-out predictions.

The method of Northcutt, Jiang and Chuang: "Confident learning: estimating uncertainty in dataset labels" (JAIR, 2021).
Its core is a few lines of numpy, so the library of its authors, cleanlab, which needs pandas and scikit-learn, is not
used.
"""

from typing import NamedTuple

import numpy as np

ROUNDING = 1e-6  # by which a mean of equal probabilities may exceed them


class LabelErrors(NamedTuple):
    """Suspects, the most suspicious first: their positions and the class that each rather is, (n,) int64 both.

    `estimate` is how many labels are wrong, of all; those whose class is the most probable one are no suspects.
    """

    positions: np.ndarray
    suggested: np.ndarray
    estimate: float


def find_label_errors(probabilities: np.ndarray, labels: np.ndarray) -> LabelErrors:
    """The label errors that held-out probabilities (N, classes) tell of given labels (N,).

    How many samples of a label are of which other class is estimated by the joint counts; so many of them, those for
    which that class leads by most, are suspects (the paper's method "prune by noise rate"). They are ordered by the
    margin of the label's probability over the largest other one.
    """
    errors = joint_counts(probabilities, labels)
    np.fill_diagonal(errors, 0)
    found = np.zeros(len(labels), bool)
    for label, other in np.argwhere(np.rint(errors) > 0):
        of_label = np.flatnonzero(labels == label)
        lead = probabilities[of_label, other] - probabilities[of_label, label]
        most = np.argsort(-lead, kind="stable")[: round(errors[label, other])]
        found[of_label[most[lead[most] > 0]]] = True
    positions = np.flatnonzero(found)
    positions = positions[np.argsort(margins(probabilities[positions], labels[positions]), kind="stable")]
    return LabelErrors(positions, probabilities[positions].argmax(1), float(errors.sum()))


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
