"""Confidence intervals and tests against published values."""

import math

import pytest

from dist_mnist.reporting.statistics import mcnemar, student, wilson


def test_wilson_equals_published_intervals():
    """Newcombe (Statistics in Medicine 17, 1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (correct, images), expected in published.items():
        assert wilson(correct, images) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize(("only_first", "only_second", "expected"), [
    (0, 0, 1.0), (5, 5, 1.0), (1, 0, 1.0), (0, 6, 2 / 64), (6, 0, 2 / 64), (2, 8, 112 / 1024), (10, 25, 0.0167),
])  # fmt: skip
def test_mcnemar_equals_binomial_tails(only_first, only_second, expected):
    assert mcnemar(only_first, only_second) == pytest.approx(expected, abs=5e-5)


def test_mcnemar_many_images_nears_the_normal_distribution():
    """Near the normal distribution: (|b - c| - 1) / sqrt(b + c) with Edwards' correction."""
    z = (abs(2070 - 1959) - 1) / math.sqrt(2070 + 1959)
    assert mcnemar(2070, 1959) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)


def test_student_equals_published_quantiles():
    assert [student(degrees) for degrees in (1, 4, 30)] == [12.706, 2.776, 2.042]
    assert [student(degrees) for degrees in (40, 120)] == pytest.approx([2.021, 1.980], abs=5e-4)
