"""Calls timed in turns, and what a measurement says."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One contender in one case: a row of the CSV."""

    level: str
    """One of `LEVELS` of `measure`."""
    case: str
    """The shape ("4096x768") or the model ("bert")."""
    dtype: str
    mode: str
    """One of its `MODES`."""
    task: str
    """What was timed, such as "forward+backward"."""
    norm: str
    seconds: float
    """Median over the rounds."""
    ratio: float
    """Median, over the rounds, of the ratio to the baseline."""
    ratio_low: float
    """Lower and upper quartile of that ratio."""
    ratio_high: float
    rounds: int
    tokens_per_second: float | None = None
    bytes: int | None = None
    """Of what is saved for the backward pass (op level), or the peak of a step beyond parameters and optimizer
    state (model level)."""
    parameters: int | None = None
    modules: int | None = None
    """Norm modules that the model has."""


def clock_name(device: torch.device) -> str:
    """With what `device` is timed. One thread on a CPU is timed by what it computes, as its wall time would hold the
    turns of other processes as well."""
    if device.type == "cuda":
        return "CUDA events"
    return "CPU time" if torch.get_num_threads() == 1 else "wall time"


def seconds_of(function: Callable[[], Any], device: torch.device, repeats: int, wall: bool = False) -> float:
    """Seconds of one call, of `repeats` in a row: by CUDA events, CPU time or wall time (see `clock_name`)."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        for _ in range(repeats):
            function()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / repeats
    now = time.process_time if not wall and clock_name(device) == "CPU time" else time.perf_counter
    begin = now()
    for _ in range(repeats):
        function()
    return (now() - begin) / repeats


def take_turns(
    functions: Mapping[str, Callable[[], Any]],
    device: torch.device,
    rounds: int,
    min_seconds: float = 0.0,
    wall: bool = False,
) -> dict[str, list[float]]:
    """Seconds of one call of every function, per round, after a warm-up that is not counted.

    Args:
        min_seconds: a call is repeated until it is expected to take this long, and averaged.
        wall: wall time in any case, for what waits on a disk.
    """
    names = list(functions)
    repeats = {}
    for name in names:
        functions[name]()
        once = seconds_of(functions[name], device, 1, wall)
        repeats[name] = max(1, min(1000, math.ceil(min_seconds / max(once, 1e-7))))
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            times[name].append(seconds_of(functions[name], device, repeats[name], wall))
    return times


def summarize(times: Mapping[str, Sequence[float]], baseline: str = "layernorm") -> dict[str, dict[str, Any]]:
    """Medians, and the median and quartiles of the ratio to the baseline in the same round, by name."""
    out = {}
    for name, values in times.items():
        ratios = [value / base for value, base in zip(values, times[baseline], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
        out[name] = {
            "seconds": statistics.median(values),
            "ratio": statistics.median(ratios),
            "ratio_low": low,
            "ratio_high": high,
            "rounds": len(values),
        }
    return out
