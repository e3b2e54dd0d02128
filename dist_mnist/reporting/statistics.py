"""Confidence intervals (Wilson's, Student's, normal) and McNemar's test."""

import math
import statistics

import numpy as np

Z = statistics.NormalDist().inv_cdf(0.975)

# Two-sided 95 % quantiles of Student's t distribution for 1 to 30 degrees of freedom (standard tables).
STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def wilson(correct: int, images: int) -> tuple[float, float]:
    """Return Wilson's 95 % confidence interval of an accuracy, from `correct` of n independent images."""
    accuracy, part = correct / images, Z**2 / images
    middle = (accuracy + part / 2) / (1 + part)
    half = Z / (1 + part) * math.sqrt(accuracy * (1 - accuracy) / images + part / (4 * images))
    return middle - half, middle + half


def student(degrees: int) -> float:
    """Return the two-sided 95 % quantile of Student's t distribution with n degrees of freedom."""
    if degrees <= len(STUDENT):
        return STUDENT[degrees - 1]
    return Z + (Z**3 + Z) / (4 * degrees) + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * degrees**2)  # Cornish-Fisher


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the exact p-value of McNemar's test, from how many images only one of two models gets right.

    It is the probability of a split at least as uneven if both were equally good: two-sided, binomial (McNemar: "Note
    on the sampling error of the difference between correlated proportions or percentages", 1947).
    """
    total = only_first + only_second
    tail = sum(math.comb(total, count) for count in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**total)


def paired(differences: np.ndarray) -> tuple[float, float, float] | None:
    """Return the mean of differences (n,) on the same images and its 95 % confidence interval; None if not finite.

    The interval is the normal one, mean ± 1.96 standard errors, which suits hundreds of images and more.
    """
    mean = float(np.mean(differences))
    half = Z * float(np.std(differences, ddof=1)) / math.sqrt(len(differences)) if len(differences) > 1 else math.inf
    return (mean, mean - half, mean + half) if math.isfinite(mean + half) else None
