"""Measures how fast a run is, and shows it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from tqdm import tqdm

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


class ProgressBar:
    """Shows steps done, speed and time left: a bar if the main process writes to a terminal, else lines."""

    def __init__(self, total: int, *, main: bool, shown: bool, first_step: int = 0, unit: str = "samples/s"):
        self.total, self.main, self.first_step, self.unit = total, main, first_step, unit
        self.started = time.perf_counter()
        self.bar = tqdm(total=total, initial=first_step, disable=not (main and shown and sys.stderr.isatty()))

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def update(self, step: int, speed: float | None) -> None:
        """Show that `step` steps are done, at `speed` units per second."""
        self.bar.set_postfix_str("" if speed is None else f"{speed:,.0f} {self.unit}", refresh=False)
        self.bar.update(step - self.bar.n)

    def log(self, step: int, speed: float | None, loss: float, lr: float) -> None:
        """Show the training loss: in the bar or, without one, as a line."""
        self.bar.set_description(f"loss {loss:.4f}", refresh=False)
        if self.main and self.bar.disable:
            pace = "" if speed is None else f", {speed:,.0f} {self.unit}"
            print(
                f"step {step}/{self.total}: loss {loss:.4f}, learning rate {lr:.3g}{pace}{self._left(step)}",
                flush=True,
            )

    def _left(self, step: int) -> str:
        done = step - self.first_step
        seconds = (time.perf_counter() - self.started) / max(done, 1) * (self.total - step)
        return f", {time_left(seconds)}" if done > 0 and step < self.total else ""
