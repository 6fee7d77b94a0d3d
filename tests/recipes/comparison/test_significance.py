"""Is a difference more than chance: the bootstraps against what is known of them."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from comparison.significance import bootstrap_scores, difference_over_seeds, holm, paired_difference


def correct_and_counted(correct):
    correct = np.asarray(correct, dtype=float)
    return np.stack([correct, np.ones_like(correct)], axis=1)


def accuracy(sums):
    return 100 * sums[:, 0] / sums[:, 1]


def test_the_interval_of_a_difference_is_that_of_the_normal_approximation():
    draw = np.random.default_rng(0)
    left, right = draw.random(2000) < 0.8, draw.random(2000) < 0.7
    scores = bootstrap_scores([correct_and_counted(left), correct_and_counted(right)], accuracy, num_resamples=4000)
    found = paired_difference(scores[:1], scores[1:])
    pairs = 100 * (left.astype(float) - right)
    error = pairs.std() / np.sqrt(2000)
    assert found.mean == pytest.approx(pairs.mean())
    assert (found.low, found.high) == pytest.approx(
        (pairs.mean() - 1.96 * error, pairs.mean() + 1.96 * error), abs=0.2
    )
    assert 0 < found.p < 0.002


@given(st.lists(st.booleans(), min_size=1, max_size=30))
def test_a_run_does_not_differ_from_itself(correct):
    rows = correct_and_counted(correct)
    scores = bootstrap_scores([rows, rows], accuracy, num_resamples=100)
    found = paired_difference(scores[:1], scores[1:])
    assert (found.mean, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_pairing_sees_a_small_difference_that_single_scores_hide():
    draw = np.random.default_rng(1)
    right = draw.random(1000) < 0.5
    left = right.copy()
    left[np.flatnonzero(~right)[:15]] = True  # right wherever the other is, and 15 times more
    scores = bootstrap_scores([correct_and_counted(left), correct_and_counted(right)], accuracy, num_resamples=2000)
    found = paired_difference(scores[:1], scores[1:])
    assert found.low > 0
    assert np.ptp(np.quantile(scores[0], [0.025, 0.975])) > 4 * (found.high - found.low) / 2


def test_other_test_examples_are_refused():
    rows = [correct_and_counted([True] * 3), correct_and_counted([True] * 4)]
    with pytest.raises(ValueError, match=r"the same test examples.*\[3, 4\]"):
        bootstrap_scores(rows, accuracy, num_resamples=10)


def test_the_test_over_seeds_is_the_paired_t_test():
    scores, baseline = {1: 1.0, 2: 1.2, 3: 0.9, 4: 1.3}, {3: 0.7, 2: 0.5, 1: 0.4, 9: 0.1}
    found = difference_over_seeds(scores, baseline)  # seeds 1, 2 and 3
    expected = stats.ttest_rel([1.0, 1.2, 0.9], [0.4, 0.5, 0.7])
    low, high = expected.confidence_interval(0.95)
    assert (found.mean, found.low, found.high, found.p) == pytest.approx((0.5, low, high, expected.pvalue))
    assert found.num_pairs == 3


@pytest.mark.parametrize("scores", [{1: 1.0}, {1: 1.0, 2: math.nan}, {1: 1.0, 2: 1.1}])
def test_without_variation_between_seeds_nothing_is_tested(scores):
    assert difference_over_seeds(scores, {1: 0.7, 2: 0.8}) is None


def test_holm_multiplies_and_never_falls():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.9}) == pytest.approx(
        {"a": 0.04, "c": 0.09, "b": 0.09, "d": 0.9}
    )
