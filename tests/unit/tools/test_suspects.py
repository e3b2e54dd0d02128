"""Confident learning: the flipped labels are found, and nothing else where all labels are right."""

import numpy as np
import pytest

from dist_mnist.tools.suspects.confident import find_label_errors, joint_counts, margins


def held_out(labels: np.ndarray, classes: int = 4, doubt: float = 0.3) -> np.ndarray:
    """Probabilities of a network that knows the true labels, and is sure of most."""
    rng = np.random.default_rng(1)
    found = np.eye(classes)[labels] + doubt * rng.random((len(labels), classes)) ** 8
    return found / found.sum(1, keepdims=True)


def test_find_label_errors_flipped_labels_are_the_suspects():
    true = np.arange(400) % 4
    given, flipped = true.copy(), np.arange(5, 400, 39)
    given[flipped] = (true[flipped] + 1) % 4
    found = find_label_errors(held_out(true), given)
    assert set(found.positions) <= set(flipped) and len(found.positions) >= 8
    assert found.estimate == pytest.approx(len(flipped), abs=3)
    assert found.suggested.tolist() == true[found.positions].tolist()
    assert found.margins.tolist() == sorted(margins(held_out(true), given))[: len(found.positions)]
    assert found.margins[-1] < 0


@pytest.mark.parametrize("labels", [np.arange(40) % 4, np.arange(40) % 3, np.zeros(5, int), np.zeros(1, int)])
def test_find_label_errors_right_labels_have_no_suspect(labels):
    found = find_label_errors(held_out(labels), labels)
    assert (len(found.positions), found.estimate) == (0, 0)


def test_joint_counts_measure_confidence_by_the_class():
    """As sure of class 1 as for samples of that label, 0.4, counts, though class 0 is more probable for all."""
    probabilities = np.array([[0.9, 0.1]] * 8 + [[0.6, 0.4]] * 3)
    labels = np.array([0] * 8 + [1, 1, 0])
    assert joint_counts(probabilities, labels).tolist() == [[8, 1], [0, 2]]


def test_joint_counts_are_scaled_to_all_samples_of_a_label():
    probabilities = np.array([[0.9, 0.1], [0.5, 0.5], [0.1, 0.9], [0.2, 0.8], [0.3, 0.7]])
    labels = np.array([0, 0, 0, 1, 1])  # thresholds are 0.5 and 0.75
    assert joint_counts(probabilities, labels).tolist() == [[2, 1], [0, 2]]
    found = find_label_errors(probabilities, labels)
    assert (found.positions.tolist(), found.suggested.tolist(), found.estimate) == ([2], [1], 1)
