"""Metrics of a classifier beyond accuracy and loss, from its confusion matrix or from the logits of all samples.

They depend on the samples in the order of their ids, in float64, not on which processes computed the logits.
"""

import math

import numpy as np
from msgspec import Struct

from dist_mnist.run.records import ReliabilityBin

BINS = 15  # bins of the expected calibration error, as in Guo et al.: "On calibration of modern neural networks" (2017)
TOP_K = 5
TEMPERATURES = 0.01, 100.0  # search range of the best temperature
ACCURACY = 1e-9  # relative tolerance of the best temperature
MOST_SCORES = 1 << 27  # images times classes up to which logits are kept in memory


class Figures(Struct, frozen=True, kw_only=True):
    """Metrics computed from the logits of all samples; see the fields of the same names in `EvaluationResult`."""

    top_k: int | None = None
    top_k_accuracy: float | None = None
    auc: float | None = None
    brier: float | None = None
    ece: float | None = None
    reliability: tuple[ReliabilityBin, ...] | None = None
    temperature: float | None = None
    calibrated_loss: float | None = None


def balanced_accuracy(confusion: np.ndarray) -> float:
    """Return the recall averaged over the classes that have images.

    Args:
        confusion: (classes, classes) counts, rows true, columns predicted.
    """
    images = confusion.sum(1)
    return float(np.mean(confusion.diagonal()[images > 0] / images[images > 0]))


def macro_f1(confusion: np.ndarray) -> float:
    """Return F1, 2 TP / (2 TP + FP + FN), averaged over the classes that are present or predicted."""
    both = confusion.sum(0) + confusion.sum(1)  # 2 TP + FP + FN
    return float(np.mean(2 * confusion.diagonal()[both > 0] / both[both > 0]))


def figures_of(logits: np.ndarray, labels: np.ndarray, temperature: float | None = None) -> Figures:
    """Compute the metrics of logits (N, classes), any float dtype, and labels (N,) int64; all None if not finite.

    Args:
        temperature: the best temperature, fitted on other images.
    """
    scores = _columns(logits)
    if not np.isfinite(scores).all():
        return Figures()
    top_k, top_k_accuracy = _top_k(scores, labels)
    calibrated_loss = None if temperature is None else _mean_loss(scores, labels, 1 / temperature)
    hits = scores.argmax(0) == labels  # before the softmax, whose rounding makes more ties
    probabilities = _softmax(scores)
    reliability = reliability_of(probabilities.max(0), hits)
    return Figures(
        top_k=top_k,
        top_k_accuracy=top_k_accuracy,
        auc=macro_auc(probabilities, labels),
        brier=float(np.mean(brier_scores(probabilities, labels))),
        ece=expected_calibration_error(reliability),
        reliability=reliability,
        temperature=temperature,
        calibrated_loss=calibrated_loss,
    )


def brier_scores(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the Brier score of each sample, (N,) from 0 to 2, from probabilities (classes, N).

    It is the squared distance to the one-hot label (Brier: "Verification of forecasts expressed in terms of
    probability", 1950).
    """
    away = probabilities.copy()
    away[labels, np.arange(len(labels))] -= 1
    return np.asarray(np.square(away, out=away).sum(0))


def log_losses(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return each label's negative log-likelihood, (N,) in nats, from probabilities (classes, N); infinite for 0."""
    with np.errstate(divide="ignore"):
        return -np.log(probabilities[labels, np.arange(len(labels))])


def reliability_of(confidences: np.ndarray, hits: np.ndarray) -> tuple[ReliabilityBin, ...]:
    """Return the reliability curve: samples in 15 equal-width bins of the probability of their predicted class.

    A bin includes its upper edge. Both arguments are (N,): probabilities, and whether the prediction was right.
    """
    bins = np.searchsorted(np.arange(1, BINS) / BINS, confidences)
    counts, rights, sums = (
        np.bincount(bins, weights, minlength=BINS).tolist() for weights in (None, hits.astype(float), confidences)
    )
    return tuple(
        ReliabilityBin(images=n, confidence=total / n, accuracy=right / n) if n else ReliabilityBin(images=0)
        for n, right, total in zip(counts, rights, sums, strict=True)
    )


def expected_calibration_error(reliability: tuple[ReliabilityBin, ...]) -> float:
    """Return the ECE: each bin's gap between mean confidence and accuracy, averaged over samples (Guo et al., 2017)."""
    apart = [one.images * abs((one.accuracy or 0) - (one.confidence or 0)) for one in reliability]
    return min(1.0, sum(apart) / sum(one.images for one in reliability))


def macro_auc(probabilities: np.ndarray, labels: np.ndarray) -> float | None:
    """Return the macro AUC (ROC), each class against the rest; classes without it are left out, None if all are.

    The area is the probability that an image of the class scores higher for it than an image of another class, ties
    counting half: exact, computed from ranks (Hand and Till: "A simple generalisation of the area under the ROC
    curve", 2001).

    Args:
        probabilities: (classes, N), for `labels` (N,).
    """
    areas = []
    for label, of_class in enumerate(probabilities):
        own = np.sort(of_class[labels == label])
        others = len(labels) - len(own)
        if len(own) and others:
            ranked = np.sort(of_class)
            twice_ranks = np.searchsorted(ranked, own, "left") + np.searchsorted(ranked, own, "right") + 1
            wins = int(twice_ranks.sum()) / 2 - len(own) * (len(own) + 1) / 2
            areas.append(wins / (len(own) * others))
    return math.fsum(areas) / len(areas) if areas else None


def best_temperature(logits: np.ndarray, labels: np.ndarray) -> float | None:
    """Return the temperature that minimises the mean cross entropy of logits (N, classes) (Guo et al., 2017).

    It divides the logits. The loss is convex in the inverse temperature; a bracketed Newton's method finds the root of
    its derivative. None if the minimum is not between 0.01 and 100: if all predictions are right, it would be at 0.
    """
    scores = _columns(logits)
    if not np.isfinite(scores).all():
        return None
    low, high = (1 / temperature for temperature in reversed(TEMPERATURES))
    if _slope(scores, labels, low)[0] >= 0 or _slope(scores, labels, high)[0] <= 0:
        return None
    inverse, before = 1.0, 0.0
    while abs(inverse - before) > ACCURACY * inverse and high - low > ACCURACY * low:
        slope, curvature = _slope(scores, labels, inverse)
        low, high = (low, inverse) if slope > 0 else (inverse, high)
        newton = inverse - slope / curvature if curvature > 0 else math.inf
        before, inverse = inverse, newton if low <= newton <= high else math.sqrt(low * high)
    return 1 / inverse


def _columns(logits: np.ndarray) -> np.ndarray:
    """Return logits as (classes, N) float64 minus each sample's largest: numpy is fast along samples."""
    scores = np.array(logits.T, np.float64, order="C")
    with np.errstate(invalid="ignore"):  # infinite logits
        scores -= scores.max(0)
    return scores


def _softmax(scores: np.ndarray) -> np.ndarray:
    """Return probabilities, computed in place."""
    np.exp(scores, out=scores)
    scores /= scores.sum(0)
    return scores


def _top_k(scores: np.ndarray, labels: np.ndarray) -> tuple[int | None, float | None]:
    """Return k and the top-k accuracy; k is 5, or 2 for 3 to 5 classes, or None for 2 classes.

    Among equal scores the lower class ranks first, as for the accuracy.
    """
    if len(scores) < 3:
        return None, None
    k, own = TOP_K if len(scores) > TOP_K else 2, scores[labels, np.arange(len(labels))]
    before = (scores > own).sum(0) + ((scores == own) & (np.arange(len(scores))[:, np.newaxis] < labels)).sum(0)
    return k, float(np.mean(before < k))


def _mean_loss(scores: np.ndarray, labels: np.ndarray, inverse: float) -> float:
    """Return the mean cross entropy, in nats, at an inverse temperature."""
    own = scores[labels, np.arange(len(labels))]
    return float(np.mean(np.log(np.exp(inverse * scores).sum(0)) - inverse * own))


def _slope(scores: np.ndarray, labels: np.ndarray, inverse: float) -> tuple[float, float]:
    """Return the first and second derivative of `_mean_loss` with respect to the inverse temperature."""
    weights = _softmax(inverse * scores)
    mean, squares = (weights * scores).sum(0), (weights * scores * scores).sum(0)
    own = scores[labels, np.arange(len(labels))]
    return float(np.mean(mean - own)), float(np.mean(squares - mean * mean))
