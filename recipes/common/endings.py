"""How a run ends: its exit codes, the errors behind them, and the single line that it prints."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

EXIT_BAD_INPUT = 2
EXIT_DIVERGED = 3
EXIT_CANNOT_SAVE = 74  # EX_IOERR
EXIT_RESUME = 75  # EX_TEMPFAIL

# For --help.
EXIT_CODES = """\
exit codes:
  0   finished
  2   bad input: one line names the value and the nearest fix; no checkpoint or result was touched
  3   the loss or a gradient was not finite; the last checkpoint is intact
  74  a checkpoint or the results could not be written: make room, then run the same command again
  75  stopped by SIGTERM or Ctrl-C after saving a checkpoint: run the same command again to resume
Launchers (torchrun, accelerate launch) end with 1 instead of 2 to 75; the printed line says what happened.
"""

USE_EXIT_CODES = "exit codes: 0 finished; 2 bad input, which one line names"  # of scripts that apply a saved model

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class OptionError(ValueError):
    """An option, or a combination of options, cannot be used. The message names it and the nearest fix."""


class DataError(ValueError):
    """The data cannot be used. The message names the file or split, what is wrong and the nearest fix."""


class DivergedError(ArithmeticError):
    """Optimizer step `step`, counted from 1, was not finite or a spike, and the options say to stop."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


class SaveError(OSError):
    """A checkpoint cannot be written, for instance because the disk is full. The one before it is intact."""


def is_first_on_machine() -> bool:
    """Return whether this process reports, for its machine, what all of its processes find alike."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", 0))) == 0


def end(message: str, code: int, *, alike: bool = True) -> NoReturn:
    """Print `message` as an error and end this process with `code`; the launcher then stops the other processes.

    Args:
        alike: whether every process finds the same error. Then one process per machine prints it.
    """
    rank = os.environ.get("RANK", "0")
    if not alike or is_first_on_machine():
        where = "" if alike or rank == "0" else f"process {rank}: "
        print(f"error: {where}{message}", file=sys.stderr, flush=True)
    sys.exit(code)


def plain_warnings() -> None:
    """From now on print each warning as one line without its place in the code, on one process per machine."""

    def one_line(message: Warning | str, *_: Any, **__: Any) -> str:
        return f"warning: {' '.join(str(message).split())}\n" if is_first_on_machine() else ""

    warnings.formatwarning = one_line


@contextmanager
def clear_errors() -> Iterator[None]:
    """While a run is set up, end it on bad input with one line and code 2 instead of a traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        end(str(error), EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        sys.exit("stopped by Ctrl-C before training started")


@contextmanager
def clear_use(arguments: Any) -> Iterator[None]:
    """While a saved model is applied to a file, end on bad input with one line and code 2 instead of a traceback."""
    plain_warnings()
    try:
        yield
    except (ValueError, OSError) as error:
        names_its_cause = isinstance(error, (DataError, OptionError)) or getattr(error, "filename", None)
        end(("" if names_its_cause else f"--model {arguments.model}: ") + " ".join(str(error).split()), EXIT_BAD_INPUT)


@contextmanager
def clear_endings() -> Iterator[None]:
    """While a run trains and writes its results, end it with one line and the code that says what to do next."""
    try:
        yield
    except DivergedError as error:
        end(str(error), EXIT_DIVERGED)
    except DataError as error:  # an example that could not be checked earlier
        end(str(error), EXIT_BAD_INPUT, alike=False)
    except OSError as error:
        if not isinstance(error, SaveError) and error.errno not in DISK_FULL:
            raise
        hint = "" if isinstance(error, SaveError) else ": make room, then run the same command again"
        end(f"{error}{hint}", EXIT_CANNOT_SAVE, alike=False)
