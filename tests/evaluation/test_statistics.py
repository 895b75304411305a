"""Promises of the intervals."""

import math

import pytest

from aot_fast.evaluation.statistics import Share, paired_difference, wilson


@pytest.mark.parametrize(
    "successes, n, low, high",
    [(8, 10, 0.490162, 0.943318), (0, 10, 0.0, 0.277533), (10, 10, 0.722467, 1.0), (50, 100, 0.403832, 0.596168), (1, 1, 0.206549, 1.0)],
)
def test_wilson_against_the_values_of_scipy(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=1e-6)


def test_nothing_is_known_of_nothing():
    assert wilson(0, 0) == (0.0, 1.0)
    assert Share(0, 0).value is None


def test_paired_difference_uses_common_questions_and_is_reproducible():
    old = {f"{i}": i % 2 == 0 for i in range(200)}
    new = {f"{i}": i % 2 == 0 or i % 10 == 1 for i in range(210)}
    found = paired_difference(new, old)
    assert (found.value, found.n) == (pytest.approx(0.1), 200)
    # A mean of 200 draws of {0, 1} with p = 0.1 has standard deviation 0.0212.
    assert found.low == pytest.approx(0.1 - 1.96 * 0.0212, abs=0.006)
    assert found.high == pytest.approx(0.1 + 1.96 * 0.0212, abs=0.006)
    assert found == paired_difference(dict(reversed(new.items())), old)


def test_pairing_makes_the_interval_narrower_than_that_of_two_samples():
    old = {f"{i}": i % 2 == 0 for i in range(100)}
    found = paired_difference(old, old)
    assert (found.value, found.low, found.high) == (0, 0, 0)


def test_no_common_question_says_nothing():
    found = paired_difference({"a": True}, {"b": True})
    assert found.value is None and math.isclose(found.high - found.low, 2)
