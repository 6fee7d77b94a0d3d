"""Is a difference between norms more than chance? A paired bootstrap over test examples, a paired t-test over seeds.

Resampling test examples asks whether the difference would hold on other texts like these, for these trained models;
the test over seeds whether it would hold for other initialisations and orders of the data. Both are paired: two
norms are compared on the same examples, from the same seeds. A metric is given by what it needs of each example, as
rows that can be summed (correct and counted, or n-gram matches and lengths), and the score of such sums: so a corpus
metric such as BLEU is computed anew for every resample instead of being averaged over sentences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr, stdtrit

_CHUNK = 1 << 22  # entries of a block of resampling weights


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A mean difference of scores, its 95 % interval and its two-sided p-value; `num_pairs` seeds were paired."""

    mean: float
    low: float
    high: float
    p: float
    num_pairs: int


def bootstrap_scores(
    statistics: Sequence[np.ndarray], score: Callable[[np.ndarray], np.ndarray], *, num_resamples: int, seed: int = 0
) -> np.ndarray:
    """The score of every run on every resample of the test examples.

    Args:
        statistics: for each run an array (examples, values) of the same examples in the same order.
        score: from sums of such rows, (resamples, values), to scores, (resamples,).

    Returns an array (runs, 1 + num_resamples): first the score of the examples as they are. The resamples depend on
    the number of examples and on `seed` alone, so that scores of two calls are paired.

    Raises ValueError when the runs do not have the same number of examples, or none.
    """
    sizes = {len(rows) for rows in statistics}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(f"runs to be compared need the same test examples, at least one; they have {sorted(sizes)}")
    num_examples = sizes.pop()
    generator = np.random.default_rng(seed)
    stacked = np.concatenate([np.asarray(rows, dtype=np.float64) for rows in statistics], axis=1)
    sums = [stacked.sum(0, keepdims=True)]
    block = max(1, _CHUNK // num_examples)
    for start in range(0, num_resamples, block):
        size = min(block, num_resamples - start)
        weights = generator.multinomial(num_examples, np.full(num_examples, 1 / num_examples), size=size)
        sums.append(weights.astype(np.float64) @ stacked)
    total = np.concatenate(sums)  # (1 + resamples, runs * values)
    ends = np.cumsum([rows.shape[1] for rows in statistics])
    return np.stack([score(part) for part in np.split(total, ends[:-1], axis=1)])


def paired_difference(scores: np.ndarray, baseline: np.ndarray) -> Difference:
    """Mean difference of paired runs, from `bootstrap_scores` of both, (runs, 1 + resamples) in the same order."""
    differences = (scores - baseline).mean(0)
    return _difference(differences[0], differences[1:], len(scores))


def difference_over_seeds(scores: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """The paired t-test over the seeds that both have, from scores by seed: exact for normal differences however few
    the seeds are, where a bootstrap of three or five would find far too much. None where nothing tells how much seeds
    vary: fewer than two pairs, a score that is not finite, or the same difference with every seed."""
    pairs = np.asarray([scores[seed] - baseline[seed] for seed in scores if seed in baseline], dtype=np.float64)
    if len(pairs) < 2 or not np.isfinite(pairs).all() or np.ptp(pairs) < 1e-9 * max(1.0, np.abs(pairs).max()):
        return None
    mean, error, freedom = float(pairs.mean()), pairs.std(ddof=1) / np.sqrt(len(pairs)), len(pairs) - 1
    reach = float(stdtrit(freedom, 0.975) * error)
    p = float(2 * stdtr(freedom, -abs(mean) / error))
    return Difference(mean=mean, low=mean - reach, high=mean + reach, p=p, num_pairs=len(pairs))


def _difference(mean: float, resampled: np.ndarray, num_pairs: int) -> Difference:
    low, high = np.quantile(resampled, [0.025, 0.975])
    # Add-one: a p-value of exactly 0 cannot come from finitely many resamples.
    tail = min(int((resampled <= 0).sum()), int((resampled >= 0).sum()))
    p = min(1.0, 2 * (tail + 1) / (len(resampled) + 1))
    return Difference(mean=float(mean), low=float(low), high=float(high), p=p, num_pairs=num_pairs)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's correction for testing several norms against one: the chance of any false alarm stays below 5 %."""
    adjusted: dict[str, float] = {}
    highest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = highest
    return adjusted
