"""Tests of differences, compared with scipy, exact formulas and simulation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from comparison.significance import (
    LOOK_P,
    crossed_difference,
    difference_over_seeds,
    example_scores,
    holm,
    planned,
    relation,
)


def normal(mean, error=0.1, pairs=10):
    """A difference with nearly normal intervals."""
    draws = np.asarray([mean - error, mean + error] * (pairs // 2)) + np.linspace(-1e-3, 1e-3, pairs)
    return difference_over_seeds(dict(enumerate(draws)), dict.fromkeys(range(pairs), 0.0))


def test_example_scores_of_an_accuracy_are_the_correct_answers():
    correct = np.asarray([1, 0, 1, 1])
    found = example_scores(np.stack([correct, np.ones(4)], 1), lambda sums: 100 * sums[:, 0] / sums[:, 1])
    assert found.tolist() == pytest.approx((100 * correct).tolist())


def test_example_scores_of_a_ratio_have_its_value_and_its_standard_error():
    draw = np.random.default_rng(0)
    words = draw.integers(3, 40, 500)
    right = draw.binomial(words, 0.8)
    found = example_scores(np.stack([right, words], 1), lambda sums: 100 * sums[:, 0] / sums[:, 1])
    ratio = right.sum() / words.sum()
    assert found.mean() == pytest.approx(100 * ratio)
    delta_method = 100 * np.std(right - ratio * words, ddof=1) / words.mean()
    assert found.std(ddof=1) == pytest.approx(delta_method, rel=0.01)


def test_with_equal_examples_the_crossed_test_is_the_paired_t_test_over_seeds():
    draw = np.random.default_rng(1)
    ours, theirs = draw.normal(size=(2, 6))
    found = crossed_difference(*(np.repeat(scores[:, None], 7, axis=1) for scores in (ours, theirs)))
    expected = stats.ttest_rel(ours, theirs)
    low, high = expected.confidence_interval(0.95)
    assert (found.mean, found.p, *found.interval(0.95)) == pytest.approx(
        (np.mean(ours - theirs), expected.pvalue, low, high)
    )


def test_with_equal_seeds_the_crossed_test_is_the_paired_t_test_over_examples():
    draw = np.random.default_rng(2)
    ours, theirs = draw.normal(size=(2, 40))
    found = crossed_difference(*(np.repeat(scores[None], 3, axis=0) for scores in (ours, theirs)))
    assert found.p == pytest.approx(stats.ttest_rel(ours, theirs).pvalue)


def test_the_crossed_variance_is_the_sum_of_its_components():
    draw = np.random.default_rng(3)
    seeds, examples = draw.normal(size=(8, 1)), draw.normal(size=(1, 50))
    table = seeds + examples + 0.3 * draw.normal(size=(8, 50))
    found = crossed_difference(table, np.zeros_like(table))
    # Method of moments, component by component.
    by_seed, by_example = (50 * table.mean(1).var(ddof=1), 8 * table.mean(0).var(ddof=1))
    rest = ((table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()) ** 2).sum() / (7 * 49)
    components = (by_seed - rest) / 50 / 8 + (by_example - rest) / 8 / 50 + rest / 400
    assert found.error**2 == pytest.approx(components)
    assert 7 < found.freedom < 56


def test_the_interval_covers_the_truth_as_often_as_it_says():
    draw = np.random.default_rng(4)
    covered = 0
    for _ in range(400):
        table = 0.3 * draw.normal(size=(5, 1)) + draw.normal(size=(1, 60)) + draw.normal(size=(5, 60))
        low, high = crossed_difference(table, np.zeros_like(table)).interval(0.95)
        covered += low < 0 < high
    assert 0.92 < covered / 400 < 0.985


def test_the_detectable_difference_is_found_in_four_of_five_experiments():
    draw = np.random.default_rng(5)
    truth = normal(0.0, error=1.0, pairs=20).detectable
    pairs = draw.normal(truth, 1.0, size=(2000, 20))
    found = stats.ttest_1samp(pairs, 0, axis=1).pvalue < LOOK_P
    assert found.mean() == pytest.approx(0.8, abs=0.05)


def test_the_test_over_seeds_is_the_paired_t_test():
    scores, baseline = {1: 1.0, 2: 1.2, 3: 0.9, 4: 1.3}, {3: 0.7, 2: 0.5, 1: 0.4, 9: 0.1}
    found = difference_over_seeds(scores, baseline)  # seeds 1, 2 and 3
    expected = stats.ttest_rel([1.0, 1.2, 0.9], [0.4, 0.5, 0.7])
    low, high = expected.confidence_interval(0.9)
    assert (found.mean, *found.interval(0.9), found.p) == pytest.approx((0.5, low, high, expected.pvalue))
    assert found.num_pairs == 3


@pytest.mark.parametrize("scores", [{1: 1.0}, {1: 1.0, 2: math.nan}, {1: 1.0, 2: 1.1}])
def test_without_variation_between_seeds_nothing_is_tested(scores):
    baseline = {1: 0.7, 2: 0.8}
    assert difference_over_seeds(scores, baseline) is None
    table = np.asarray([[scores[seed]] * 3 for seed in scores])
    assert crossed_difference(table, np.asarray([[baseline[seed]] * 3 for seed in scores])) is None


@pytest.mark.parametrize(
    ("mean", "error", "pairs", "higher", "expected"),
    [
        (1.0, 0.1, 10, True, "better"),
        (1.0, 0.1, 10, False, "worse"),
        (-1.0, 0.1, 10, True, "worse"),
        (0.1, 0.1, 10, True, "level"),  # p < 0.018, but within the margin
        (0.3, 1.0, 10, True, "open"),
        (1.0, 0.1, 4, True, "open"),  # fewer seeds than the first look
    ],
)
def test_a_relation_takes_the_margin_and_the_planned_looks_into_account(mean, error, pairs, higher, expected):
    assert relation(normal(mean, error, pairs), 0.5, higher_is_better=higher) == expected


def test_level_is_decided_by_two_one_sided_tests():
    draw = np.random.default_rng(6)
    for spread in np.linspace(0.3, 1.5, 25):
        pairs = draw.normal(0.1, spread, 10)
        found = difference_over_seeds(dict(enumerate(pairs)), dict.fromkeys(range(10), 0.0))
        below = stats.ttest_1samp(pairs, 0.5, alternative="less").pvalue
        above = stats.ttest_1samp(pairs, -0.5, alternative="greater").pvalue
        assert (relation(found, 0.5, higher_is_better=True) == "level") == (max(below, above) < 0.05)


@given(st.lists(st.integers(0, 100), unique=True, max_size=30))
def test_a_look_takes_the_first_seeds_of_the_planned_number(seeds):
    found = planned(seeds)
    assert found == sorted(seeds)[: len(found)]
    assert len(found) == ((len(seeds) // 5 * 5) if 5 <= len(seeds) < 20 else min(len(seeds), 20))


def test_holm_multiplies_and_never_falls():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.9}) == pytest.approx(
        {"a": 0.04, "c": 0.09, "b": 0.09, "d": 0.9}
    )
