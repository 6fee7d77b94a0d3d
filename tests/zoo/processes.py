"""Start real processes cheaply: fork them from a server that has imported torch, transformers and the recipes."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

RECIPES = ("classification", "translation", "language_modeling")

context = multiprocessing.get_context("forkserver")


@functools.cache
def start_server() -> None:
    """Start the server. It finds what it preloads by PYTHONPATH alone, and silently skips what it does not find."""
    context.set_forkserver_preload([*RECIPES, "tests.recipes.recipe_process"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def wait(process: BaseProcess, seconds: float = 600) -> int:
    """Return the exit code of a process, -N if signal N ended it. Kill a hanging one and fail."""
    process.join(seconds)
    hangs = process.is_alive()
    if hangs:
        process.kill()
        process.join()
    assert not hangs, f"still running after {seconds} s"
    assert process.exitcode is not None
    return process.exitcode


def write_output_to(log: str) -> None:
    """Write what this process prints from here on to `log`."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


_stores: list[dist.TCPStore] = []


def ranks() -> list[dict[str, str]]:
    """Return the variables that a launcher sets for each of two processes on this machine.

    This process hosts their store, as torchrun does: nobody else can take the port before they listen.
    """
    _stores.append(dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_stores[-1].port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    common |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]


def alone(worker: Callable[..., None], folder: Path, *arguments: Any) -> None:
    """Run `worker(*arguments)`, a function of a module, in a process of its own; its log goes into `folder`."""
    start_server()
    process = context.Process(target=_logged, args=(str(folder / "log"), worker, arguments))
    process.start()
    assert wait(process) == 0, (folder / "log").read_text()


def _logged(log: str, worker: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    write_output_to(log)
    torch.set_num_threads(1)
    worker(*arguments)


def together(worker: Callable[..., None], folder: Path, *arguments: Any) -> None:
    """Run `worker(*arguments)`, a function of a module, in two processes of a gloo group; logs go into `folder`."""
    start_server()
    logs = [str(folder / f"log{rank}") for rank in range(2)]
    processes = [
        context.Process(target=_in_group, args=(environment, log, worker, arguments))
        for environment, log in zip(ranks(), logs, strict=True)
    ]
    for process in processes:
        process.start()
    assert [wait(process) for process in processes] == [0, 0], [Path(log).read_text() for log in logs]


def _in_group(environment: dict[str, str], log: str, worker: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    dist.init_process_group("gloo")
    _logged(log, worker, arguments)
    dist.destroy_process_group()


class Scripts:
    """Run scripts one after the other, each in a fork of a process that has imported `modules` once.

    `environment` is in force during these imports, so what a module reads then, such as the Hub's address, stays.
    A module in `hidden` cannot be imported.
    """

    WORKER = """
import importlib, json, os, sys
sys.modules.update(dict.fromkeys(sys.argv[1].split()))
for module in sys.argv[2:]:
    importlib.import_module(module)
for line in sys.stdin:
    (module, *sys.argv), logs, environment, folder = json.loads(line)
    child = os.fork()
    if not child:
        os.environ.update(environment)
        for descriptor, log in enumerate(logs, start=1):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        os.chdir(folder)
        code = 0
        try:
            if module == "-c":
                exec(sys.argv.pop(1), {"__name__": "__main__"})
            else:
                importlib.import_module(module).main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(bool(end.code))
        except BaseException:
            sys.excepthook(*sys.exc_info())
            code = 1
        sys.stdout.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

    def __init__(self, modules: list[str], folder: Path, environment: dict[str, str], hidden: str = ""):
        self.logs = [str(folder / "stdout"), str(folder / "stderr")]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        command = [sys.executable, "-c", self.WORKER, hidden, *modules]
        self.worker = subprocess.Popen(command, env={**os.environ, **environment}, **pipes)

    def __enter__(self) -> Scripts:
        return self

    def __exit__(self, *_: object) -> None:
        self.worker.communicate()  # the end of its input

    def run(self, script: Path | str, *argv: object, **environment: str | None) -> subprocess.CompletedProcess[str]:
        """Run a script, or a module by its name, with additional variables except those that are None."""
        module = script.stem if isinstance(script, Path) else script
        return self._run([module, str(script), *map(str, argv)], environment)

    def run_code(self, code: str, *argv: object, folder: Path = Path()) -> subprocess.CompletedProcess[str]:
        """Run `python -c code` in `folder`. Raises AssertionError with its stderr if it fails."""
        done = self._run(["-c", "-c", code, *map(str, argv)], {}, folder)
        assert done.returncode == 0, done.stderr[-3000:]
        return done

    def _run(
        self, command: list[str], environment: dict[str, str | None], folder: Path = Path()
    ) -> subprocess.CompletedProcess[str]:
        given = {name: value for name, value in environment.items() if value is not None}
        self.worker.stdin.write(json.dumps([command, self.logs, given, str(folder.absolute())]) + "\n")
        code = int(self.worker.stdout.readline())
        return subprocess.CompletedProcess(command[1:], code, *(Path(log).read_text() for log in self.logs))
