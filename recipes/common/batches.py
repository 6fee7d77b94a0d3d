"""Makes batches of similar length, in an order that depends only on the seed and the epoch.

A step's examples are chosen before the step is divided over micro-batches and processes. So the same seed gives the
same steps for 1 process x 32 examples, 2 x 16, or 2 accumulated x 16, except for a last step that is too small to be
divided (see `StepPlan`). A run resumes within an epoch by counting steps, without reading the earlier data.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader

from common.progress import with_time_left

# Examples are sorted by length within a pool of this many optimizer steps. A longer pool needs less padding, a shorter
# one mixes the batches of an epoch better.
POOL_STEPS = 50


class Plan(Protocol):
    """Divides an epoch into steps, in the same way on every process."""

    num_steps: int  # of an epoch

    def steps(self, epoch: int) -> list[Any]:
        """Return the example indices of every optimizer step of an epoch."""

    def micro_batches(self, step: Any, rank: int) -> list[list[int]]:
        """Return one process's micro-batches of a step: the same number on every process, none empty."""

    def num_examples(self, step: Any) -> int:
        """Return the number of examples of a step over all micro-batches and processes."""


class StepPlan:
    """Plans steps of `num_processes x accumulation` micro-batches of `batch_size` examples.

    A last step that is too small to give every process an example in every micro-batch is skipped.

    Raises ValueError when the data cannot fill a single step that way.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, *, seed: int, num_processes: int = 1, accumulation: int = 1
    ):
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.seed = seed
        self.num_processes = num_processes
        self.accumulation = accumulation
        self.step_size = batch_size * num_processes * accumulation
        full, rest = divmod(len(self.lengths), max(self.step_size, 1))
        self.num_steps = full + int(rest >= num_processes * accumulation)
        if batch_size < 1 or self.num_steps == 0:
            raise ValueError(
                f"{len(self.lengths)} training examples cannot be divided over {num_processes} processes x "
                f"{accumulation} micro-batches of {batch_size}: use fewer processes or micro-batches"
            )

    def steps(self, epoch: int) -> list[np.ndarray]:
        """Return the example indices of every step of an epoch, longest first within a step."""
        generator = np.random.default_rng((self.seed, epoch))
        order = generator.permutation(len(self.lengths))
        # The incomplete step is removed before sorting: it is a random sample, not the shortest examples.
        cut = len(order) // self.step_size * self.step_size
        steps = []
        for start in range(0, cut, self.step_size * POOL_STEPS):
            pool = self._longest_first(order[start : min(start + self.step_size * POOL_STEPS, cut)])
            steps += [pool[first : first + self.step_size] for first in range(0, len(pool), self.step_size)]
        if len(steps) < self.num_steps:
            steps.append(self._longest_first(order[cut:]))
        return [steps[position] for position in generator.permutation(len(steps))]

    def micro_batches(self, step: np.ndarray, rank: int) -> list[list[int]]:
        """Return one process's micro-batches of a step; examples of similar length are in the same one."""
        return [part[rank :: self.num_processes].tolist() for part in np.array_split(step, self.accumulation)]

    def num_examples(self, step: np.ndarray) -> int:
        """Return the number of examples of a step over all micro-batches and processes."""
        return len(step)

    def _longest_first(self, indices: np.ndarray) -> np.ndarray:
        return indices[np.argsort(-self.lengths[indices], kind="stable")]


def train_batches(
    dataset: Any,
    plan: Plan,
    epoch: int,
    *,
    collate: Callable[[list[Any]], Any],
    count: Callable[[Any], int] | None = None,
    rank: int = 0,
    skip: int = 0,
    workers: int = 0,
) -> Iterator[tuple[int, list[Any]]]:
    """Yield `(size, micro_batches)` for every optimizer step of an epoch after the first `skip`.

    `size` is what `count` returns for the step, by default its examples over all micro-batches and processes.
    `micro_batches` are those of this process, collated.
    """
    count = count or plan.num_examples
    steps = plan.steps(epoch)[skip:]
    shares = [plan.micro_batches(step, rank) for step in steps]
    loader = iter(_loader(dataset, [batch for share in shares for batch in share], collate, workers))
    for step, share in zip(steps, shares, strict=True):
        yield count(step), [next(loader) for _ in share]


def eval_batches(
    dataset: Any,
    lengths: Sequence[int],
    batch_size: int,
    *,
    collate: Callable[[list[Any]], Any],
    rank: int = 0,
    num_processes: int = 1,
    workers: int = 0,
) -> Iterator[tuple[list[int], Any]]:
    """Yield `(indices, batch)`, longest first, the same number of batches of the same size on every process.

    To make them even, the shortest examples are repeated at the end: `evaluation.gather_by_index` drops the copies.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    order = np.concatenate([order, np.resize(order[::-1], -len(order) % num_processes)])
    share = order[rank::num_processes]
    batches = [share[start : start + batch_size].tolist() for start in range(0, len(share), batch_size)]
    loader = _loader(dataset, batches, collate, workers)
    yield from zip(with_time_left(batches, "evaluation", shown=rank == 0), loader, strict=True)


def _loader(dataset: Any, batches: list[list[int]], collate: Callable[[list[Any]], Any], workers: int) -> DataLoader:
    # Each iteration draws from the generator. With the global one, a resumed run, which iterates once more, would get
    # other dropout masks.
    generator = torch.Generator().manual_seed(0)
    return DataLoader(
        dataset,
        batch_sampler=batches,  # type: ignore[arg-type]
        collate_fn=collate,
        num_workers=workers,
        # Forked workers need no pickling. Python's default differs between versions and platforms.
        multiprocessing_context="fork" if workers and "fork" in multiprocessing.get_all_start_methods() else None,
        generator=generator,
        pin_memory=torch.cuda.is_available(),
    )
