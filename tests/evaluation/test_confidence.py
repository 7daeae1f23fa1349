"""Intervals and paired tests against what is known of them."""

import math

import numpy as np
import pytest

from mmcore.evaluation.confidence import Statistic, interval, mean, paired_p_value


def test_the_interval_of_a_share_is_the_binomials():
    low, high = interval(mean([1.0] * 300 + [0.0] * 700))
    half = 1.96 * 100 * math.sqrt(0.3 * 0.7 / 1000)
    assert (low, high) == pytest.approx((30 - half, 30 + half), abs=0.4)
    assert interval(mean([1.0] * 5)) == (100, 100)


def test_a_metric_of_several_sums_and_draws_that_leave_it_undefined():
    rows = [(1, 0, 0)] * 3 + [(0, 1, 0)] + [(0, 0, 1)] * 2  # true positives, false ones, misses
    f1 = Statistic(rows=rows, value=lambda sums: 2 * sums[..., 0] / (2 * sums[..., 0] + sums[..., 1] + sums[..., 2]))
    low, high = interval(f1)
    assert 0 <= low < 2 / 3 < high <= 1
    rare = Statistic(rows=[(1, 1), (0, 0)], value=lambda sums: sums[..., 0] / sums[..., 1])
    assert interval(rare) == (1, 1)


def test_the_paired_test_is_exact_for_few_and_right_for_many():
    assert paired_p_value([1, 1, 1], [0, 0, 0]) == 2 / 8
    assert paired_p_value([1, 0, 1], [1, 0, 1]) == 1
    first = np.zeros(400)
    second = first.copy()
    first[:30], second[30:45] = 1, 1  # 30 against 15 that only one has: the sign test's two-sided p is 0.036
    assert paired_p_value(first, second) == pytest.approx(0.036, abs=0.008)
    assert paired_p_value(first, second) == paired_p_value(second, first)


def test_samples_that_are_alike_are_drawn_together_with_the_same_outcome():
    """Of 2000 zeros and ones, and of the same with a tiny difference each, so that none are alike."""
    random = np.random.default_rng(1)
    right = (random.random(2000) < 0.3).astype(float)
    apart = right + np.arange(2000) * 1e-9
    assert interval(mean(right)) == pytest.approx(interval(mean(apart)), abs=0.3)
    other = right.copy()
    other[:160] = 1 - other[:160]
    alike = paired_p_value(right, other)
    assert paired_p_value(apart, other) == pytest.approx(alike, rel=0.2)
    assert 0 < alike < 0.01


def test_a_metric_that_is_never_defined_has_no_interval():
    assert interval(Statistic(rows=[(1, 0), (2, 0)], value=lambda sums: sums[..., 0] / sums[..., 1])) is None
