"""Figures of predictions against their definitions, as loops over samples and pairs; and on degenerate input."""

import math

import numpy as np
import pytest

from dist_mnist.evaluation.metrics import (
    Figures,
    balanced_accuracy,
    best_temperature,
    brier_scores,
    expected_calibration_error,
    figures_of,
    log_losses,
    macro_auc,
    macro_f1,
    reliability_of,
)


def softmax(row: np.ndarray) -> list[float]:
    powers = [math.exp(value - max(row)) for value in row.tolist()]
    return [power / sum(powers) for power in powers]


def sample(count: int, classes: int, seed: int = 0, present: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Logits in steps of 0.5, so that there are ties, and labels of the first `present` classes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, present or classes, count)
    logits = np.round(2 * rng.normal(size=(count, classes)) + 3 * np.eye(classes)[labels]) / 2
    return logits.astype(np.float32), labels


def by_definition(logits: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    """The same figures, sample by sample and pair by pair."""
    rows, classes = [softmax(row) for row in logits], logits.shape[1]
    predicted = [row.index(max(row)) for row in rows]
    brier = [sum((p - (c == label)) ** 2 for c, p in enumerate(row)) for row, label in zip(rows, labels, strict=True)]
    k = 5 if classes > 5 else 2
    among = [
        label in sorted(range(classes), key=lambda c: (-row[c], c))[:k] for row, label in zip(rows, labels, strict=True)
    ]
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(15)]
    for row, best, label in zip(rows, predicted, labels, strict=True):
        bins[math.ceil(max(row) * 15) - 1].append((max(row), best == label))
    ece = sum(abs(sum(c for c, _ in one) - sum(hit for _, hit in one)) for one in bins) / len(labels)
    areas = []
    for c in range(classes):
        own, others = ([row[c] for row, label in zip(rows, labels, strict=True) if (label == c) == is_own]
                       for is_own in (True, False))  # fmt: skip
        if own and others:
            wins = sum((mine > other) + (mine == other) / 2 for mine in own for other in others)
            areas.append(wins / len(own) / len(others))
    return {
        "brier": sum(brier) / len(brier), "ece": ece, "auc": sum(areas) / len(areas) if areas else None,
        "top_k": k if classes > 2 else None, "top_k_accuracy": sum(among) / len(among) if classes > 2 else None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("count", "classes", "present"),
    [(300, 10, None), (300, 10, 8), (200, 4, None), (100, 2, None), (40, 3, 1), (1, 10, None), (1, 2, None)],
    ids=["ten", "classes missing", "four", "two", "one class alone", "one sample", "one sample of two"],
)
def test_figures_of_any_samples_are_those_of_the_definitions(count, classes, present):
    logits, labels = sample(count, classes, present=present)
    found, expected = figures_of(logits, labels, temperature=2.0), by_definition(logits, labels)
    assert {name: getattr(found, name) for name in expected} == pytest.approx(expected, abs=1e-12)
    own = [softmax(row / 2)[label] for row, label in zip(logits, labels, strict=True)]
    assert found.calibrated_loss == pytest.approx(-sum(map(math.log, own)) / count)
    assert sum(one.images for one in found.reliability) == count
    right = sum(one.images * one.accuracy for one in found.reliability if one.images)
    assert right == pytest.approx((logits.argmax(1) == labels).sum())


def test_figures_of_perfect_and_of_certain_but_wrong_predictions():
    labels = np.arange(12) % 4
    perfect = np.where(np.eye(4)[labels] > 0, np.float32(1000), np.float32(0))
    found = figures_of(perfect, labels)
    assert (found.auc, found.brier, found.ece, found.top_k_accuracy) == (1, 0, 0, 1)
    assert [one.images for one in found.reliability] == [0] * 14 + [12] and found.reliability[0].accuracy is None
    wrong = figures_of(perfect, (labels + 1) % 4)
    assert (wrong.brier, wrong.ece, wrong.top_k) == (2, 1, 2) and wrong.auc == pytest.approx(1 / 3)
    even = figures_of(np.zeros((12, 4)), labels)
    assert even.auc == 0.5 and even.ece == 0 and even.brier == pytest.approx(0.75) and even.top_k_accuracy == 0.5


@pytest.mark.parametrize("strange", [math.nan, math.inf, -math.inf])
def test_figures_of_logits_that_are_not_finite_are_none(strange):
    logits, labels = sample(20, 4)
    logits[3, 1] = strange
    assert figures_of(logits, labels) == Figures() and best_temperature(logits, labels) is None


def test_reliability_bins_hold_their_upper_edges():
    found = reliability_of(np.array([1 / 15, 3 / 15, 0.2 + 1e-9, 1.0]), np.array([True, False, True, True]))
    assert [number for number, one in enumerate(found) if one.images] == [0, 2, 3, 14]
    assert expected_calibration_error(found) == pytest.approx((14 / 15 + 0.2 + 0.8) / 4)


def test_confusion_figures_leave_out_classes_that_are_not_there():
    confusion = np.array([[3, 1, 0, 0], [2, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    assert balanced_accuracy(confusion) == pytest.approx((3 / 4 + 2 / 4) / 2)
    assert macro_f1(confusion) == pytest.approx((6 / 9 + 4 / 7) / 2)
    confusion[0, 2] = 1  # predicted, but not there: its F1 is 0
    assert balanced_accuracy(confusion) == pytest.approx((3 / 5 + 2 / 4) / 2)
    assert macro_f1(confusion) == pytest.approx((6 / 10 + 4 / 7 + 0) / 3)


@pytest.mark.parametrize("factor", [0.2, 1.0, 5.0])
def test_best_temperature_of_scaled_logits_is_scaled_and_has_the_least_loss(factor):
    logits, labels = sample(500, 10)
    found = best_temperature(factor * logits, labels)
    assert found == pytest.approx(factor * best_temperature(logits, labels), rel=1e-6)

    def loss(temperature: float) -> float:
        return figures_of(factor * logits, labels, temperature).calibrated_loss

    assert loss(found) <= min(loss(found * factor) for factor in (0.5, 0.99, 1.01, 2, 1))


def test_best_temperature_that_does_not_exist_is_none():
    labels = np.arange(8) % 4
    for logits in (5 * np.eye(4)[labels], np.zeros((8, 4)), -np.eye(4)[labels]):
        assert best_temperature(logits, labels) is None, "all right, of no opinion, all wrong"


def test_scores_of_probabilities_0_and_1_are_exact():
    probabilities, labels = np.array([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]), np.array([0, 1, 1])
    assert brier_scores(probabilities, labels).tolist() == [0, 0, 2]
    assert log_losses(probabilities, labels).tolist() == [0, 0, math.inf]
    assert macro_auc(probabilities, labels) == 0.75
