"""Run a recipe in real processes that are cheap enough to be killed dozens of times, alone or as one of two."""

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

from tests.zoo.processes import RECIPES, context, ranks, start_server, wait, write_output_to

__all__ = ["RECIPES", "check_whole", "resumed_from", "same_weights", "start", "two_processes", "wait"]


def start(
    recipe: str,
    argv: Sequence[object],
    log: Path,
    *,
    kill_at: tuple[str, str] | None = None,
    raise_at: tuple[str, str] | None = None,
    file_size: int | None = None,
    environment: dict[str, str] | None = None,
) -> BaseProcess:
    """Run `recipe` with `argv` and write its output to `log`.

    `kill_at` is an audit event and a regular expression: SIGKILL comes before the first such operation on a matching
    path. `raise_at` raises an unexpected exception there instead. `file_size` limits files to so many bytes, as a full
    disk does. `environment` adds variables, such as those of a launcher.
    """
    arguments = (recipe, [str(value) for value in argv], str(log), kill_at, raise_at, file_size, environment or {})
    start_server()
    process = context.Process(target=_run, args=arguments)
    process.start()
    return process


def _run(
    recipe: str,
    argv: list[str],
    log: str,
    kill_at: tuple[str, str] | None,
    raise_at: tuple[str, str] | None,
    file_size: int | None,
    environment: dict[str, str],
) -> None:
    write_output_to(log)
    os.environ.update(environment)
    torch.set_num_threads(1)
    if file_size is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    if moment := kill_at or raise_at:
        event, pattern = moment[0], re.compile(moment[1])

        def die(name: str, arguments: tuple[Any, ...]) -> None:
            path = arguments[0] if arguments else None
            if name == event and isinstance(path, (str, os.PathLike)) and pattern.search(os.fspath(path)):
                if raise_at:
                    raise RuntimeError("the tokens have run out")
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(die)
    try:
        importlib.import_module(recipe).main(argv)
    except Exception:
        sys.excepthook(*sys.exc_info())  # as the interpreter does, and multiprocessing does not
        sys.exit(1)


def check_whole(folder: Path) -> int:
    """Check that every file under a final name is whole, and return the newest checkpoint's step, 0 for none."""
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
            progress = json.loads((path / "progress.json").read_text(encoding="utf-8"))
            assert progress["step"] == step
            assert (path / "model.safetensors").is_file()
            assert (path / "optimizer.bin").is_file()
            newest = max(newest, step)
    return newest


def same_weights(left: Path, right: Path) -> bool:
    """Return whether two checkpoints hold the same weights, bit for bit."""
    a, b = load_file(left / "model.safetensors"), load_file(right / "model.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def resumed_from(log: Path) -> int:
    """Return the step that a run resumed from according to its log, 0 for a fresh start."""
    found = re.search(r"resuming from step (\d+)", log.read_text(encoding="utf-8"))
    return int(found[1]) if found else 0


def two_processes(
    recipe: str, argvs: Sequence[Sequence[object]], folder: Path, *, kill_when: Path | None = None, **faults: Any
) -> tuple[list[int], list[str]]:
    """Return exit codes and outputs of two processes of a run, each with its own arguments and `faults` of `start`.

    The second is killed as soon as `kill_when` exists.
    """
    logs = [folder / f"log{rank}" for rank in range(2)]
    processes = []
    for rank, environment in enumerate(ranks()):
        its_faults = {name: values[rank] for name, values in faults.items()}
        processes.append(start(recipe, argvs[rank], logs[rank], environment=environment, **its_faults))
    while kill_when and not kill_when.exists() and processes[1].is_alive():
        time.sleep(0.001)
    if kill_when:
        processes[1].kill()
    return [wait(process) for process in processes], [log.read_text() for log in logs]
