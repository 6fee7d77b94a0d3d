"""Runs of a recipe in real processes that can be killed: so cheap that dozens of kills are affordable.

What can happen to one: SIGKILL at an exact moment (a file operation), a limit of the size of files (as a full disk),
being one of two processes.
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
    """Run `recipe` with `argv`, its output into `log`.

    Args:
        kill_at: (audit event, regular expression): SIGKILL before the first such operation on a matching path.
        raise_at: the same for an exception that no code expects.
        file_size: no file can grow beyond so many bytes; writing more fails as on a full disk.
        environment: variables, such as those a launcher sets.
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
    """The newest checkpoint's step, 0 for none. Every file under a final name must be whole.

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
            progress = json.loads((path / "progress.json").read_text(encoding="utf-8"))
            assert progress["step"] == step
            assert (path / "model.safetensors").is_file()
            assert (path / "optimizer.bin").is_file()
            newest = max(newest, step)
    return newest


def same_weights(left: Path, right: Path) -> bool:
    """Whether two checkpoints hold the same weights, bit for bit."""
    a, b = load_file(left / "model.safetensors"), load_file(right / "model.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def resumed_from(log: Path) -> int:
    """The step that a run said it went on from, 0 when it began afresh."""
    found = re.search(r"resuming from step (\d+)", log.read_text(encoding="utf-8"))
    return int(found[1]) if found else 0


def two_processes(
    recipe: str, argvs: Sequence[Sequence[object]], folder: Path, *, kill_when: Path | None = None, **faults: Any
) -> tuple[list[int], list[str]]:
    """Exit codes and outputs of two processes of one run, each with its own arguments and `faults` of `start`; the
    second is killed as soon as `kill_when` exists."""
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
