"""Runs of a recipe in real processes that can be killed: so cheap that dozens of kills are affordable.

A run can be killed at an exact moment (a file operation), hit a limit on the size of files (as on a full disk), or be
one of two processes.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.zoo.processes import context, ranks, start_server, wait, write_output_to

__all__ = ["check_whole", "read_results", "resumed_from", "same_weights", "start", "two_processes", "wait", "weights"]


def start(
    recipe: str,
    argv: Sequence[object],
    log: Path,
    *,
    kill_at: tuple[str, str] | None = None,
    file_size: int | None = None,
    environment: dict[str, str] | None = None,
) -> BaseProcess:
    """Run `recipe` with `argv`, its output into `log`.

    Args:
        kill_at: (audit event, regular expression): SIGKILL before the first such operation on a matching path.
        file_size: the largest size of a file. Writing more fails, as on a full disk.
        environment: variables, such as those a launcher sets.
    """
    start_server()
    arguments = (recipe, [str(value) for value in argv], str(log), kill_at, file_size, environment or {})
    process = context.Process(target=_run, args=arguments)
    process.start()
    return process


def _run(
    recipe: str,
    argv: list[str],
    log: str,
    kill_at: tuple[str, str] | None,
    file_size: int | None,
    environment: dict[str, str],
) -> None:
    write_output_to(log)
    os.environ.update(environment)
    torch.set_num_threads(1)
    if file_size is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    if kill_at:
        event, pattern = kill_at[0], re.compile(kill_at[1])

        def die(name: str, arguments: tuple[Any, ...]) -> None:
            path = arguments[0] if arguments else None
            if name == event and isinstance(path, (str, os.PathLike)) and pattern.search(os.fspath(path)):
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(die)
    try:
        importlib.import_module(recipe).main(argv)
    except Exception:
        sys.excepthook(*sys.exc_info())  # as the interpreter does, and multiprocessing does not
        sys.exit(1)


def check_whole(folder: Path) -> int:
    """Return the newest checkpoint's step, 0 for none. Every file under a final name must be whole.

    Raises AssertionError, or what the readers of JSON, safetensors and torch files raise on a torn one.
    """
    newest = 0
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.name.startswith(".tmp-"):
            continue
        for file in path.rglob("*") if path.is_dir() else [path]:
            if file.suffix == ".json":
                json.loads(file.read_text(encoding="utf-8"))
            elif file.suffix == ".safetensors":
                load_file(file)
            elif file.suffix in {".bin", ".pkl"}:
                torch.load(file, weights_only=False)
        if found := re.fullmatch(r"checkpoint-(\d+)", path.name):
            step = int(found[1])
            assert json.loads((path / "progress.json").read_text(encoding="utf-8"))["step"] == step
            assert (path / "model.safetensors").is_file()
            assert (path / "optimizer.bin").is_file()
            newest = max(newest, step)
    return newest


def read_results(folder: Path) -> dict[str, Any]:
    """Return the results of a finished run."""
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint."""
    return load_file(folder / f"checkpoint-{step}" / "model.safetensors")


def same_weights(left: Path, right: Path) -> bool:
    """Return whether two checkpoints or models contain the same weights, bit for bit."""
    a, b = load_file(left / "model.safetensors"), load_file(right / "model.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def resumed_from(log: Path) -> int:
    """Return the step that a run says it resumed from, 0 if it started afresh."""
    found = re.search(r"resuming from step (\d+)", log.read_text(encoding="utf-8"))
    return int(found[1]) if found else 0


def two_processes(
    recipe: str,
    argv: Sequence[object],
    folder: Path,
    *,
    kill_when: Path | None = None,
    first_file_size: int | None = None,
) -> tuple[list[int], list[str]]:
    """Return the exit codes and outputs of two processes of one run.

    Args:
        kill_when: kill the second process as soon as this path exists.
        first_file_size: `file_size` of the first process.
    """
    logs = [folder / f"log{rank}" for rank in range(2)]
    sizes = (first_file_size, None)
    processes = [
        start(recipe, argv, log, environment=environment, file_size=size)
        for log, environment, size in zip(logs, ranks(), sizes, strict=True)
    ]
    while kill_when and not kill_when.exists() and processes[1].is_alive():
        time.sleep(0.001)
    if kill_when:
        processes[1].kill()
    return [wait(process) for process in processes], [log.read_text() for log in logs]
