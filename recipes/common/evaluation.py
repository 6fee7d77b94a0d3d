"""Gathers the predictions of several processes, and runs saved models in fresh processes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

T = TypeVar("T")


def main_first(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """Call `function` on the main process, then on the others, which find its caches filled.

    An exception on the main process is raised on every process, instead of leaving the others to wait.
    """
    if accelerator.num_processes == 1:
        return function()
    outcome: list[Any] = [None]
    result = None
    if accelerator.is_main_process:
        try:
            result = function()
        except Exception as error:
            outcome = [error]
    broadcast_object_list(outcome)
    if outcome[0] is not None:
        raise outcome[0]
    return result if accelerator.is_main_process else function()  # type: ignore[return-value]


def accuracy(predictions: Sequence[int], labels: Sequence[int]) -> float:
    """Return the share of predictions that equal their label, in percent."""
    return 100 * float(np.mean(np.asarray(predictions) == np.asarray(labels)))


def gather_by_index(accelerator: Accelerator, indices: Sequence[int], values: Sequence[Any], total: int) -> list[Any]:
    """Put the values of all processes in the order of the data set, on every process.

    Args:
        indices: the example that each value belongs to. An example on several processes counts once.
        total: the number of examples. An AssertionError says if one is missing.
    """
    pairs = list(zip((int(index) for index in indices), values, strict=True))
    if accelerator.num_processes > 1:
        pairs = gather_object(pairs)
    ordered = dict(pairs)
    assert ordered.keys() == set(range(total)), f"{len(ordered)} of {total} examples were evaluated"
    return [ordered[index] for index in range(total)]


def run_fresh_process(script: Path, arguments: Sequence[str], stop: Callable[[], bool] = lambda: False) -> bool:
    """Run a Python script without the launcher's variables. When `stop` returns true, end it and return False.

    Its output is shown. Raises RuntimeError with its stderr if it fails.
    """
    launcher = ("ACCELERATE_", "TORCHELASTIC_", "OMPI_", "PMI_", "FSDP_")
    names = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK"}
    names |= {"ROLE_NAME", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    environment = {
        name: value for name, value in os.environ.items() if name not in names and not name.startswith(launcher)
    }
    if paths := environment.get("PYTHONPATH"):  # relative ones, "" included, mean the folder that we are in
        environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(path) for path in paths.split(os.pathsep))
    command = [sys.executable, str(script), *arguments]
    # In a private folder: in a shared one, others could place modules that Python would import.
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as said:
        child = subprocess.Popen(command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, stderr=said)
        try:
            while child.poll() is None:
                if stop():
                    return False
                with suppress(subprocess.TimeoutExpired):
                    child.wait(timeout=0.2)
        finally:
            child.kill()
            child.wait()
        if child.returncode != 0:
            said.seek(0)
            raise RuntimeError(f"{script.name} {' '.join(arguments)} failed:\n{said.read().decode(errors='replace')}")
    return True


def peak_memory_mb() -> float | None:
    """Return the peak memory of this process in MiB: on the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def is_better(scores: Mapping[str, float], best: Mapping[str, float] | None, name: str, *, higher: bool) -> bool:
    """Return whether the score `name` is better than the `best` so far; a score that is not finite never is."""
    if not all(math.isfinite(scores[key]) for key in {name, "loss"}):
        return False
    return not best or (scores[name] > best[name] if higher else scores[name] < best[name])


def mean(values: Sequence[float]) -> float:
    """Return the mean, summed in float64."""
    return float(np.mean(np.asarray(values, dtype=np.float64)))
