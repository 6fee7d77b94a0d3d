"""Measures how fast a run is, and estimates the time left."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from common.checkpoints import Progress

T = TypeVar("T")

# The first steps of a process pay for memory allocation and compilation: timing leaves them out.
UNTIMED_STEPS = 5


def time_left(seconds: float) -> str:
    """Return a text such as "3:20 left" or "2:03:20 left"."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d} left" if hours else f"{minutes}:{seconds:02d} left"


def with_time_left(batches: Sequence[T], what: str, *, every: float = 30.0, shown: bool = True) -> Iterator[T]:
    """Yield the batches; every `every` seconds a line reports how many are done and estimates the time left."""
    started = said = time.monotonic()
    for done, batch in enumerate(batches, start=1):
        yield batch
        now = time.monotonic()
        if shown and now - said >= every and done < len(batches):
            left = time_left((now - started) / done * (len(batches) - done))
            print(f"{what}: {done:,} of {len(batches):,} batches, about {left}", flush=True)
            said = now


class Stopwatch:
    """Counts examples and training time, except for the first steps of this process and for pauses."""

    def __init__(self, progress: Progress):
        self.progress = progress
        self.steps = 0
        self.started: float | None = None

    def step(self, num_samples: int) -> None:
        """Note a finished step of `num_samples` examples over all processes."""
        now = time.perf_counter()
        self.steps += 1
        self.progress.samples += num_samples
        if self.started is not None:
            self.progress.timed_samples += num_samples
            self.progress.timed_seconds += now - self.started
        self.started = now if self.steps >= UNTIMED_STEPS else None

    def pause(self) -> None:
        """Leave out the time until `resume`: evaluation, saving."""
        self.started = None

    def resume(self) -> None:
        """Resume timing after a pause."""
        self.started = time.perf_counter() if self.steps >= UNTIMED_STEPS else None

    @property
    def samples_per_second(self) -> float | None:
        """Return the speed, or None while no step was timed."""
        seconds = self.progress.timed_seconds
        return self.progress.timed_samples / seconds if seconds else None

    @property
    def seconds_per_step(self) -> float | None:
        """Return the time of a step of mean size, or None while no step was timed."""
        speed = self.samples_per_second
        return self.progress.samples / self.progress.step / speed if speed else None
