"""Is a difference between two norms more than chance, and is it small enough to call them level?

Two things vary: the seed (initialization, order of the data, dropout) and the test example. `paired_difference` counts
both, with the two norms paired on each. A bootstrap over examples alone would describe these trained models only.

A row is looked at with 5, 10, 15 and 20 seeds. Each look tests at `LOOK_P`, which keeps the chance of a false alarm
over four looks at 5 % (Pocock 1977).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LOOKS = (5, 10, 15, 20)
LOOK_P = 0.018


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A mean difference of scores with its standard error and degrees of freedom."""

    mean: float
    error: float
    freedom: float
    num_pairs: int

    @property
    def p(self) -> float:
        """The two-sided p-value."""
        return float(2 * stats.t.sf(abs(self.mean) / self.error, self.freedom))

    def interval(self, level: float) -> tuple[float, float]:
        """Return the confidence interval, for example with `level` 0.95."""
        low, high = stats.t.interval(level, self.freedom, self.mean, self.error)
        return float(low), float(high)

    @property
    def detectable(self) -> float:
        """The true difference that a look finds with probability 0.8, at this standard error."""
        return float(stats.t.ppf([1 - LOOK_P / 2, 0.8], self.freedom).sum()) * self.error


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


def paired_difference(table: np.ndarray) -> Difference | None:
    """Test the mean of paired differences (seeds, examples), with seeds and examples as crossed random effects.

    The model is d[s, i] = mean + seed[s] + example[i] + residual[s, i]. The standard error comes from the mean squares
    of the two-way analysis of variance, the degrees of freedom from Satterthwaite's approximation. A negative variance
    component counts as zero. With a single column, this is the paired t-test over seeds.

    Return None with fewer than two seeds, with values that are not finite, or where no seed and no example differs.
    """
    table = np.asarray(table, dtype=np.float64)
    num_seeds, num_examples = table.shape
    if num_seeds < 2 or not np.isfinite(table).all() or np.ptp(table) < 1e-9 * max(1.0, np.abs(table).max()):
        return None
    mean = float(table.mean())
    seeds, examples = table.mean(1) - mean, table.mean(0) - mean
    rest = table - mean - seeds[:, None] - examples
    freedoms = np.asarray([num_seeds - 1, max(num_examples - 1, 1), (num_seeds - 1) * max(num_examples - 1, 1)])
    sums = np.asarray([num_examples * (seeds**2).sum(), num_seeds * (examples**2).sum(), (rest**2).sum()])
    by_seed, by_example, residual = squares = sums / freedoms
    if by_example <= residual:
        variance, freedom = by_seed, freedoms[0]
    elif by_seed <= residual:
        variance, freedom = by_example, freedoms[1]
    else:
        variance = by_seed + by_example - residual
        freedom = variance**2 / (squares**2 / freedoms).sum()
    if variance <= 0:
        return None
    return Difference(
        mean=mean, error=float(np.sqrt(variance / table.size)), freedom=float(freedom), num_pairs=num_seeds
    )


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
    names = sorted(p_values, key=lambda name: p_values[name])
    raised = [min(1.0, (len(names) - rank) * p_values[name]) for rank, name in enumerate(names)]
    return dict(zip(names, np.maximum.accumulate(raised).tolist(), strict=True))


def planned(seeds: Sequence[int]) -> list[int]:
    """Return the seeds of the latest planned look: the first 20, 15, 10 or 5 of them, or all if fewer."""
    return list(seeds[: max((look for look in LOOKS if look <= len(seeds)), default=len(seeds))])
