"""Fills micro-batches by tokens: as many sentence pairs as the budget of padded tokens allows.

Pairs are sorted by length and cut into micro-batches. Ties are in an order drawn from the seed and the epoch. So there
is little padding, and every micro-batch is about the same work. An optimizer step takes `num_processes x accumulation`
of them, drawn from all lengths. Within a step, processes get micro-batches of similar length at the same time. A step
contains the same sentences for 1 process x 2 accumulated micro-batches as for 2 processes x 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Step = list[np.ndarray]  # the micro-batches of all processes, as indices of sentence pairs


class TokenPlan:
    """The steps of every epoch; a `common.batches.Plan`.

    Args:
        source_lengths, target_lengths: tokens of every sentence pair, its end included. Single texts give the same
            lengths twice.
        max_tokens: most tokens in a micro-batch on either side, padding included.

    Raises ValueError if a sentence alone exceeds `max_tokens`, or the data cannot fill a single step.
    """

    def __init__(
        self,
        source_lengths: Sequence[int],
        target_lengths: Sequence[int],
        max_tokens: int,
        *,
        seed: int,
        num_processes: int = 1,
        accumulation: int = 1,
    ):
        self.source_lengths = np.asarray(source_lengths, dtype=np.int64)
        self.target_lengths = np.asarray(target_lengths, dtype=np.int64)
        self.lengths = np.maximum(self.source_lengths, self.target_lengths)
        self.seed = seed
        self.num_processes = num_processes
        self.accumulation = accumulation
        if self.lengths.max(initial=0) > max_tokens:
            raise ValueError(
                f"--max_tokens {max_tokens}: the longest training sentence alone has {self.lengths.max()} tokens; "
                "raise max_tokens, or truncate sentences earlier"
            )
        # The order of ties does not change the sorted lengths, so the cuts are made once.
        order = np.lexsort((self.source_lengths, self.target_lengths))
        self.cuts = _cut(self.lengths[order], max_tokens)
        step_size = num_processes * accumulation
        # Micro-batches that do not fill a last step are skipped, different ones in each epoch.
        self.num_steps = (len(self.cuts) + 1) // step_size
        if self.num_steps == 0 or len(self.lengths) == 0:
            raise ValueError(
                f"{len(self.lengths)} training examples make {len(self.cuts) + 1} micro-batches of {max_tokens} "
                f"tokens, not enough for {num_processes} processes x {accumulation}: lower max_tokens"
            )
        self._cached: tuple[int, list[Step]] | None = None

    def steps(self, epoch: int) -> list[Step]:
        """Return the micro-batches of every optimizer step of an epoch."""
        if self._cached is None or self._cached[0] != epoch:
            generator = np.random.default_rng((self.seed, epoch))
            shuffled = generator.permutation(len(self.lengths))
            order = shuffled[np.lexsort((self.source_lengths[shuffled], self.target_lengths[shuffled]))]
            batches = np.split(order, self.cuts)
            drawn = generator.permutation(len(batches))
            size = self.num_processes * self.accumulation
            steps = [
                [batches[position] for position in sorted(drawn[start : start + size], reverse=True)]
                for start in range(0, self.num_steps * size, size)
            ]
            self._cached = (epoch, steps)
        return self._cached[1]

    def micro_batches(self, step: Step, rank: int) -> list[list[int]]:
        """Return one process's micro-batches of a step, longest sentences first."""
        return [batch.tolist() for batch in step[rank :: self.num_processes]]

    def num_examples(self, step: Step) -> int:
        """Return the number of examples of a step over all micro-batches and processes."""
        return sum(map(len, step))

    def target_tokens(self, step: Step) -> int:
        """Return the target tokens of a step over all processes, by which its loss is divided."""
        return int(sum(self.target_lengths[batch].sum() for batch in step))


def _cut(lengths: np.ndarray, max_tokens: int) -> np.ndarray:
    """Return where to cut sentences, so that rows x longest is within `max_tokens` in every piece."""
    cuts = []
    start, longest = 0, 0
    for position, length in enumerate(lengths.tolist()):
        longest = max(longest, length)
        if (position - start + 1) * longest > max_tokens:
            cuts.append(position)
            start, longest = position, length
    return np.asarray(cuts, dtype=np.int64)
