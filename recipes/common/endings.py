"""How a run ends that cannot go on: one line, a code that says what to do, and the same for all of its processes."""

from __future__ import annotations

import atexit
import errno
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from accelerate import Accelerator
from torch.distributed import TCPStore

from common.checkpoints import EXIT_CANNOT_SAVE, SaveError, write_json
from common.options import DataError, OptionError, leave
from common.steps import DivergedError

EXIT_BAD_INPUT = 2
EXIT_DIVERGED = 3

# What the system says of a disk that takes no more.
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Fate:
    """What the processes of a run share when one of them cannot go on: all end, with its message and code.

    A process that waits for another in a collective call cannot be told by one. So every process has a thread that
    looks for the end of the run in the store by which the processes found each other.
    """

    KEY = "hf_adanorm/end"
    POLL_SECONDS = 0.3
    ECHO_SECONDS = 2.0  # in which an exception may turn out to come of another process's end
    MOST_SECONDS = 10.0  # for the others to have seen it, before the launcher kills them

    def __init__(self) -> None:
        self.store: TCPStore | None = None
        self.ending = threading.Lock()
        self.over = threading.Event()

    def share(self) -> None:
        """From here on, where one process ends by `end` or by an exception that nobody catches, all do."""
        with suppress(KeyError, RuntimeError):  # processes that met elsewhere than in a store end on their own
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            self.store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=30))
        if self.store is None:
            return
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()

        def rest() -> None:  # in C++ it would not survive the end of the interpreter
            self.over.set()
            thread.join()

        def uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
            if issubclass(kind, Exception):
                self._follow()
            sys.__excepthook__(kind, error, trace)
            if issubclass(kind, Exception):
                with suppress(RuntimeError):  # the store ended with its process
                    self.end(f"{kind.__name__}: {error}", 1)

        atexit.register(rest)
        sys.excepthook = uncaught

    def end(self, message: str, code: int) -> NoReturn:
        """Say `message` and end the process, and the others of the run, with `code`."""
        if self.store is None:
            if _speaks():
                print(f"error: {message}", file=sys.stderr, flush=True)
            leave(code)
        self.store.compare_set(self.KEY, "", json.dumps([os.environ["RANK"], message, code]))
        self._leave(message)

    def _watch(self) -> None:
        try:
            while not self.store.check([self.KEY]):
                if self.over.wait(self.POLL_SECONDS):
                    return
        except RuntimeError:  # the store ended with its process
            return
        self._leave(None)

    def _follow(self) -> None:
        """Leave as another process does, if one has ended the run: what went wrong here may come of that, a connection
        that closed or a folder that is gone, and be there before the watching thread has looked."""
        until = time.monotonic() + self.ECHO_SECONDS
        with suppress(RuntimeError):  # the store ended with its process
            while time.monotonic() < until:
                if self.ending.locked():  # by the watching thread, which ends this process
                    time.sleep(self.MOST_SECONDS)
                if self.store.check([self.KEY]):
                    self._leave(None)
                time.sleep(self.POLL_SECONDS / 3)

    def _leave(self, own: str | None) -> NoReturn:
        self.ending.acquire()  # for ever: one thread speaks
        rank, message, code = json.loads(self.store.get(self.KEY))
        if _speaks():
            print(f"error: {'' if own == message else f'process {rank}: '}{message}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        until = time.monotonic() + self.MOST_SECONDS
        with suppress(RuntimeError):
            seen = self.store.add(f"{self.KEY}/seen", 1)
            while seen < int(os.environ["WORLD_SIZE"]) and time.monotonic() < until:
                time.sleep(self.POLL_SECONDS / 3)
                seen = self.store.add(f"{self.KEY}/seen", 0)
        with suppress(SystemExit):
            leave(code)
        os._exit(code)  # an orderly exit would wait for the others


def _speaks() -> bool:
    """Whether this process says for its machine what all have to say."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", 0))) == 0


fate = Fate()


@contextmanager
def clear_errors() -> Iterator[None]:
    """While a run is set up, end it on the user's mistakes with one line and code 2 instead of a traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        if os.environ.get("HF_ADANORM_DEBUG"):
            raise
        fate.end(str(error), EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        sys.exit("stopped by Ctrl-C before the training began")


@contextmanager
def clear_use(arguments: Any) -> Iterator[None]:
    """While the saved `arguments.model` is used on a file: one that is not there or of another kind, or data that does
    not fit, ends the process with one line and code 2 instead of a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("HF_ADANORM_DEBUG"):
            raise
        message = " ".join(str(error).split())
        if not isinstance(error, (DataError, OptionError, OSError)):
            message = f"--model {arguments.model}: {message}"
        if isinstance(error, OSError) and not error.filename and not Path(arguments.model).is_dir():
            message = f"--model {arguments.model}: no such folder, and it could not be had from the Hub: {message}"
        print(f"error: {message}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)


@contextmanager
def clear_endings(accelerator: Accelerator, output_dir: Path, record: dict[str, Any]) -> Iterator[None]:
    """While a run trains and writes its results, end it with one line and the code that says what to do when the loss
    is not finite (`record` goes into `diverged.json`) or the disk is full."""
    try:
        yield
    except DivergedError as error:
        if accelerator.is_main_process:
            write_json(output_dir / "diverged.json", {**record, "step": error.step, "diverged": str(error)})
        accelerator.wait_for_everyone()  # all are here
        fate.end(str(error), EXIT_DIVERGED)
    except DataError as error:  # an example that could not be checked before
        fate.end(str(error), EXIT_BAD_INPUT)
    except OSError as error:
        if not isinstance(error, SaveError) and error.errno not in DISK_FULL:
            raise
        hint = "" if isinstance(error, SaveError) else ": make room, and start the same command again"
        fate.end(f"{error}{hint}", EXIT_CANNOT_SAVE)
