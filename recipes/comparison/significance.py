"""Is a difference between two norms more than chance, and is it small enough to call them level?

Two things vary: the seed (initialization, order of the data, dropout) and the test example. `crossed_difference`
counts both, with the two norms paired on each. A bootstrap over examples alone would describe these trained models
only.

A row is looked at with 5, 10, 15 and 20 seeds. Each look tests at `LOOK_P`, which keeps the chance of a false alarm
over four looks at 5 % (Pocock 1977).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr, stdtrit

LOOKS = (5, 10, 15, 20)
LOOK_P = 0.018


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A mean difference of scores with its standard error, degrees of freedom and two-sided p-value."""

    mean: float
    error: float
    freedom: float
    p: float
    num_pairs: int

    def interval(self, level: float) -> tuple[float, float]:
        """Return the confidence interval, for example with `level` 0.95."""
        reach = float(stdtrit(self.freedom, (1 + level) / 2)) * self.error
        return self.mean - reach, self.mean + reach

    @property
    def detectable(self) -> float:
        """The true difference that a look finds with probability 0.8, at this standard error."""
        return float(stdtrit(self.freedom, 1 - LOOK_P / 2) + stdtrit(self.freedom, 0.8)) * self.error


def _difference(mean: float, variance: float, freedom: float, num_pairs: int) -> Difference:
    error = float(np.sqrt(variance))
    p = float(2 * stdtr(freedom, -abs(mean) / error))
    return Difference(mean=mean, error=error, freedom=freedom, p=p, num_pairs=num_pairs)


def example_scores(outcomes: np.ndarray, score: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Split a score into one value per test example, whose mean is the score.

    The values are jackknife pseudo-values: exact for a mean such as accuracy, a linear approximation for a corpus
    metric such as BLEU.

    Args:
        outcomes: (examples, values), what the metric needs of each example.
        score: maps sums of such rows, (samples, values), to scores, (samples,).
    """
    rows = np.asarray(outcomes, dtype=np.float64)
    total, count = rows.sum(0, keepdims=True), len(rows)
    whole = float(score(total)[0])
    if count == 1:
        return np.asarray([whole])
    values = count * whole - (count - 1) * np.asarray(score(total - rows), dtype=np.float64)
    return values - values.mean() + whole


def crossed_difference(ours: np.ndarray, theirs: np.ndarray) -> Difference | None:
    """Test the mean difference of two arrays of example scores, (seeds, examples), with seeds and examples as crossed
    random effects.

    The model is d[s, i] = mean + seed[s] + example[i] + residual[s, i]. The standard error comes from the mean squares
    of the two-way analysis of variance, the degrees of freedom from Satterthwaite's approximation. A negative variance
    component counts as zero. Return None with fewer than two seeds or examples, with values that are not finite, or
    where no seed and no example differs.
    """
    table = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    num_seeds, num_examples = table.shape
    if min(table.shape) < 2 or not np.isfinite(table).all() or np.ptp(table) < 1e-9 * max(1.0, np.abs(table).max()):
        return None
    mean = float(table.mean())
    seeds, examples = table.mean(1) - mean, table.mean(0) - mean
    residual = table - mean - seeds[:, None] - examples
    squares = (  # the mean square of each effect, and its degrees of freedom
        (num_examples * (seeds**2).sum() / (num_seeds - 1), num_seeds - 1),
        (num_seeds * (examples**2).sum() / (num_examples - 1), num_examples - 1),
        ((residual**2).sum() / ((num_seeds - 1) * (num_examples - 1)), (num_seeds - 1) * (num_examples - 1)),
    )
    (by_seed, seed_freedom), (by_example, example_freedom), (rest, _) = squares
    if by_example <= rest:
        variance, freedom = by_seed, float(seed_freedom)
    elif by_seed <= rest:
        variance, freedom = by_example, float(example_freedom)
    else:
        variance = by_seed + by_example - rest
        freedom = variance**2 / sum(square**2 / degrees for square, degrees in squares)
    if variance <= 0:
        return None
    return _difference(mean, variance / table.size, freedom, num_seeds)


def difference_over_seeds(scores: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Run the paired t-test over the seeds that both have, from scores by seed.

    Return None with fewer than two pairs, with a score that is not finite, or if all pairs differ by the same amount.
    """
    pairs = np.asarray([scores[seed] - baseline[seed] for seed in scores if seed in baseline], dtype=np.float64)
    if len(pairs) < 2 or not np.isfinite(pairs).all() or np.ptp(pairs) < 1e-9 * max(1.0, np.abs(pairs).max()):
        return None
    return _difference(float(pairs.mean()), float(pairs.var(ddof=1)) / len(pairs), len(pairs) - 1.0, len(pairs))


def relation(found: Difference | None, margin: float, *, higher_is_better: bool) -> str:
    """Return `level`, `better`, `worse` or `open` for a difference from another norm.

    Level: the 90 % interval lies within the margin (two one-sided tests at 5 %). Better or worse: p is below `LOOK_P`.
    A difference that is level is not also better or worse. Fewer seeds than the first look decide nothing.
    """
    if found is None or found.num_pairs < LOOKS[0]:
        return "open"
    low, high = found.interval(0.9)
    if -margin < low and high < margin:
        return "level"
    if found.p >= LOOK_P:
        return "open"
    return "better" if (found.mean > 0) == higher_is_better else "worse"


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return Holm's corrected p-values: below 5 %, the chance of any false alarm among them is below 5 %."""
    adjusted: dict[str, float] = {}
    highest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = highest
    return adjusted


def planned(seeds: Sequence[int]) -> list[int]:
    """Return the seeds of the latest planned look: the first 20, 15, 10 or 5 in ascending order, or all if fewer."""
    ordered = sorted(seeds)
    return ordered[: max((look for look in LOOKS if look <= len(ordered)), default=len(ordered))]
