"""Tests of differences, compared with scipy, exact formulas and simulation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from comparison.significance import LOOK_P, example_scores, holm, paired_difference, planned, relation


def column(values):
    """Return differences by seed as a table of one example."""
    return np.asarray(values, dtype=float)[:, None]


def ratio(sums):
    return 100 * sums[:, 0] / sums[:, 1]


def test_example_scores_of_an_accuracy_are_the_correct_answers():
    correct = np.asarray([1, 0, 1, 1])
    found = example_scores(np.stack([correct, np.ones(4)], 1), ratio)
    assert found.tolist() == pytest.approx((100 * correct).tolist())


def test_example_scores_of_a_ratio_have_its_value_and_its_standard_error():
    draw = np.random.default_rng(0)
    words = draw.integers(3, 40, 500)
    right = draw.binomial(words, 0.8)
    found = example_scores(np.stack([right, words], 1), ratio)
    assert found.mean() == pytest.approx(100 * right.sum() / words.sum())
    delta_method = 100 * np.std(right - right.sum() / words.sum() * words, ddof=1) / words.mean()
    assert found.std(ddof=1) == pytest.approx(delta_method, rel=0.01)


@pytest.mark.parametrize("by", ["seed", "seed, many examples", "example"])
def test_without_one_of_the_effects_the_crossed_test_is_the_paired_t_test(by):
    ours, theirs = np.random.default_rng(1).normal(size=(2, 6))
    table = {"seed": column(ours - theirs), "example": np.repeat((ours - theirs)[None], 3, axis=0)}
    table["seed, many examples"] = np.repeat(column(ours - theirs), 7, axis=1)
    found, expected = paired_difference(table[by]), stats.ttest_rel(ours, theirs)
    for level in (0.9, 0.95):
        low, high = expected.confidence_interval(level)
        assert (found.mean, found.p, *found.interval(level)) == pytest.approx(
            (np.mean(ours - theirs), expected.pvalue, low, high)
        )
    assert found.num_pairs == len(table[by])


def test_the_crossed_variance_is_the_sum_of_its_components():
    draw = np.random.default_rng(3)
    table = draw.normal(size=(8, 1)) + draw.normal(size=(1, 50)) + 0.3 * draw.normal(size=(8, 50))
    found = paired_difference(table)
    # Method of moments, component by component.
    by_seed, by_example = 50 * table.mean(1).var(ddof=1), 8 * table.mean(0).var(ddof=1)
    rest = ((table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()) ** 2).sum() / (7 * 49)
    components = (by_seed - rest) / 50 / 8 + (by_example - rest) / 8 / 50 + rest / 400
    assert found.error**2 == pytest.approx(components)
    assert 7 < found.freedom < 56


def test_the_interval_covers_the_truth_as_often_as_it_says():
    draw = np.random.default_rng(4)
    covered = 0
    for _ in range(400):
        table = 0.3 * draw.normal(size=(5, 1)) + draw.normal(size=(1, 60)) + draw.normal(size=(5, 60))
        low, high = paired_difference(table).interval(0.95)
        covered += low < 0 < high
    assert 0.92 < covered / 400 < 0.985


def test_the_detectable_difference_is_found_in_four_of_five_experiments():
    draw = np.random.default_rng(5)
    alternating = column([1.0, -1.0] * 10) * math.sqrt(19 / 20)  # a standard deviation of 1
    truth = paired_difference(alternating).detectable
    pairs = draw.normal(truth, 1.0, size=(2000, 20))
    assert (stats.ttest_1samp(pairs, 0, axis=1).pvalue < LOOK_P).mean() == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize("values", [[0.3], [0.3, math.nan], [0.3, 0.3], [0.3, 0.3 + 1e-12]])
def test_without_variation_between_seeds_nothing_is_tested(values):
    assert paired_difference(column(values)) is None
    assert paired_difference(np.repeat(column(values), 3, axis=1)) is None


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
    found = paired_difference(column([mean - error, mean + error] * (pairs // 2)))
    assert relation(found, 0.5, higher_is_better=higher) == expected


def test_level_is_decided_by_two_one_sided_tests():
    draw = np.random.default_rng(6)
    for spread in np.linspace(0.3, 1.5, 25):
        pairs = draw.normal(0.1, spread, 10)
        below = stats.ttest_1samp(pairs, 0.5, alternative="less").pvalue
        above = stats.ttest_1samp(pairs, -0.5, alternative="greater").pvalue
        said = relation(paired_difference(column(pairs)), 0.5, higher_is_better=True)
        assert (said == "level") == (max(below, above) < 0.05)


@given(st.lists(st.integers(0, 100), unique=True, max_size=30))
def test_a_look_takes_the_first_seeds_of_the_planned_number(seeds):
    found = planned(seeds)
    assert found == seeds[: len(found)]
    assert len(found) == ((len(seeds) // 5 * 5) if 5 <= len(seeds) < 20 else min(len(seeds), 20))


def test_holm_multiplies_and_never_falls():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.9}) == pytest.approx(
        {"a": 0.04, "c": 0.09, "b": 0.09, "d": 0.9}
    )
    assert holm({"a": 0.7, "b": 0.8}) == {"a": 1.0, "b": 1.0}
