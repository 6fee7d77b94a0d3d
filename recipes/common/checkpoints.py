"""Writes checkpoints that are complete or absent, and files that are complete or unchanged.

Everything is written under a temporary name and renamed once it is on disk. `checkpoint-N` contains what
`accelerate.Accelerator.save_state` saves (weights as safetensors, optimizer, gradient scaler, the random state of
every process) and `progress.json`. `best-N` is the model of step N as `save_pretrained` writes it; it is deleted only
after a checkpoint that refers to a newer one has been written. So a run that is killed at any time finds the best
model of its newest checkpoint. With several machines, `output_dir` must be on a shared disk.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import platform
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import RNG_STATE_NAME, load
from safetensors import SafetensorError

from common.endings import OptionError, SaveError
from hf_adanorm.saving import TEMPORARY, write_file

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]


class ResumeError(ValueError):
    """The checkpoints in `output_dir` belong to a run with other options."""


@dataclass(kw_only=True)
class Progress:
    """Where a run stands, as saved in `progress.json`."""

    step: int = 0  # optimizer steps done
    epoch: int = 0  # epochs completed
    epoch_step: int = 0  # steps done in the current epoch
    samples: int = 0  # examples seen by all processes
    timed_samples: int = 0  # of these, the ones that the training time below was measured on
    timed_seconds: float = 0.0
    skipped_steps: int = 0  # not finite, or a spike
    recent_steps: list[list[float]] = field(default_factory=list)  # loss and gradient norm, to detect spikes
    running_loss: float = 0.0  # the sum of the losses since one was logged
    running_steps: int = 0
    best_step: int | None = None
    best_metrics: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)  # one entry an evaluation
    train_history: list[dict[str, Any]] = field(default_factory=list)  # the training loss whenever it was logged


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as JSON: the file at `path` is either the old one or the whole new one.

    NaN and infinity, for which JSON has no name, become null.
    """
    write_file(path, json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, (list, tuple)) else value


_locks: dict[Path, int] = {}  # held until the process ends


def lock_folder(folder: Path) -> None:
    """Reserve `folder` for this process until it ends in any way. Raises OptionError if another process has it.

    The kernel releases a record lock with its process, and network file systems know it between machines. Forked
    processes do not hold it. Without locks, as on Windows, nothing is reserved.
    """
    path = folder.resolve() / ".lock"
    if fcntl is None or path in _locks:
        return
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(descriptor, 1000).decode(errors="replace").strip()
        os.close(descriptor)
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return  # a file system without locks
        raise OptionError(
            f"--output_dir {folder}: another run, {holder or 'which has just begun'}, writes there: wait until it ends"
        ) from None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {platform.node()}".encode())
    _locks[path] = descriptor


def publish_folder(temporary: Path, target: Path) -> None:
    """Put a complete folder in its place by one rename, after its files are on the disk."""
    for path in sorted(temporary.rglob("*")):
        if path.is_file():
            _fsync(path)
    if target.exists():
        _remove(target)
    os.rename(temporary, target)
    _fsync(target.parent)


def save_folder(save: Callable[[Path], Any], target: Path) -> None:
    """Write a folder by `save(folder)`: the one at `target` is either the old one or the whole new one."""
    temporary = target.with_name(f"{TEMPORARY}{target.name}")
    _remove(temporary)
    save(temporary)
    publish_folder(temporary, target)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Some file systems cannot sync a folder; the rename itself stands.
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Checkpoints:
    """The checkpoints of one run in `output_dir`. All methods are called on every process.

    Args:
        output_dir: the run's folder. It is created if necessary.
        accelerator: prepares the model and the optimizer.
        config: the run's options. Those not in `free` must be the same when a run is resumed.
        content: a hash of the run's data by option. It must be the same, too.
        keep: how many of the newest checkpoints to keep.
        overwrite: start afresh; the files of an earlier run are deleted when this one begins to train.
    """

    def __init__(
        self,
        output_dir: str | Path,
        accelerator: Accelerator,
        config: Mapping[str, Any],
        *,
        content: Mapping[str, str] = MappingProxyType({}),
        free: frozenset[str] = frozenset(),
        keep: int = 1,
        overwrite: bool = False,
    ):
        self.folder = Path(output_dir)
        self.accelerator = accelerator
        self.config = json.loads(json.dumps({**config, "num_processes": accelerator.num_processes}))
        self.content = dict(content)
        self.free = free | {"content"}
        self.keep = keep
        self.overwrite = overwrite
        if accelerator.is_main_process:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                lock_folder(self.folder)
            except OSError as error:
                raise OptionError(f"--output_dir {output_dir}: cannot be written: {error.strerror}") from error
            for path in self.folder.glob(f"{TEMPORARY}*"):
                _remove(path)
        accelerator.wait_for_everyone()

    def latest(self) -> Path | None:
        """Return the newest complete checkpoint, or None if there is none or it will be overwritten."""
        found = [] if self.overwrite else self._numbered("checkpoint")
        return found[-1] if found else None

    def check_resumable(self) -> Path | None:
        """Return the checkpoint that this run would resume from, after reading only its options.

        Raises ResumeError naming every option that differs from the run that wrote it, or for a finished run without
        a checkpoint, which would be trained anew over its results.
        """
        latest, finished = self.latest(), (self.folder / "results.json").exists()
        afresh = "another --output_dir, or --overwrite_output_dir true to start afresh"
        if latest is None:
            if finished and not self.overwrite:
                raise ResumeError(
                    f"{self.folder} contains the results.json of a finished run, but no checkpoint: {afresh}"
                )
            return None
        try:
            saved = json.loads((latest / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ResumeError(
                f"{latest / 'config.json'} cannot be read ({error}): delete {latest.name} to resume from the "
                "checkpoint before it, or give another --output_dir"
            ) from error
        differing = [
            f"{name}: {saved.get(name)!r} in the checkpoint, {self.config.get(name)!r} now"
            for name in sorted(saved.keys() | self.config.keys())
            if name not in self.free and saved.get(name) != self.config.get(name)
        ]
        if changed := changed_content(saved.get("content"), self.content):
            raise ResumeError(f"{latest} was written by a run on other data: {changed}. Give that data, {afresh}")
        if differing:
            best = self.folder / "best"
            extend = f". To train its model further, give --model_name_or_path {best} instead of model_config"
            raise ResumeError(
                f"{latest} was written with other options ({'; '.join(differing)}). Give the same options, "
                f"{afresh}{extend if finished else ''}"
            )
        return latest

    def resume(self) -> Progress:
        """Load the newest checkpoint into what was prepared. Return its progress, or a fresh one.

        The run begins here. So obsolete files are deleted now, and not before its input has been checked.
        """
        if self.accelerator.is_main_process:
            for path in self.folder.iterdir():
                ours = re.fullmatch(r"best|results\.json|(checkpoint|best)-\d+", path.name)
                if path.name == "diverged.json" or (self.overwrite and ours):
                    _remove(path)
        self.overwrite = False
        self.accelerator.wait_for_everyone()
        latest = self.check_resumable()
        if latest is None:
            return Progress()
        self.accelerator.load_state(str(latest))
        _check_random_state(latest / f"{RNG_STATE_NAME}_{self.accelerator.process_index}.pkl")
        return Progress(**json.loads((latest / "progress.json").read_text(encoding="utf-8")))

    def save(self, progress: Progress) -> Path:
        """Write `checkpoint-{step}`, then delete superfluous checkpoints and best models."""
        target = self.folder / f"checkpoint-{progress.step}"
        with self.staged(target) as temporary:
            self.accelerator.save_state(str(temporary), safe_serialization=True)
            if self.accelerator.is_main_process:
                write_json(temporary / "progress.json", asdict(progress))
                write_json(temporary / "config.json", {**self.config, "content": self.content})
        if self.accelerator.is_main_process:
            for old in self._numbered("checkpoint")[: -self.keep]:
                _remove(old)
            for old in self._numbered("best"):
                if old.name != f"best-{progress.best_step}":
                    _remove(old)
        self.accelerator.wait_for_everyone()
        return target

    def promote_best(self, step: int) -> Path:
        """Give the best model its final name, `best`."""
        final = self.folder / "best"
        if self.accelerator.is_main_process:
            best = self.folder / f"best-{step}"
            if best.exists():
                publish_folder(best, final)
            elif not final.exists():
                raise FileNotFoundError(f"neither {best} nor {final} exists: the run's best model was removed")
        self.accelerator.wait_for_everyone()
        return final

    @contextlib.contextmanager
    def staged(self, target: Path) -> Iterator[Path]:
        """Yield a temporary folder to write into, which becomes `target` when every process is done with it.

        Raises SaveError when it cannot be written.
        """
        temporary = target.with_name(f"{TEMPORARY}{target.name}")
        if self.accelerator.is_main_process:
            _remove(temporary)
            temporary.mkdir()
        self.accelerator.wait_for_everyone()
        try:
            yield temporary
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                publish_folder(temporary, target)
        except BaseException as error:
            if self.accelerator.is_main_process:
                _remove(temporary)  # half a checkpoint must not keep a full disk full
            if not _is_write_error(error):
                raise
            latest = self.latest()
            raise SaveError(
                f"{target} cannot be written: {str(error).splitlines()[0]}. "
                f"{latest.name + ' is intact' if latest else 'There is no earlier one'}: make room, then run the same "
                "command again"
            ) from error
        self.accelerator.wait_for_everyone()

    def _numbered(self, prefix: str) -> list[Path]:
        found = [path for path in self.folder.iterdir() if re.fullmatch(rf"{prefix}-\d+", path.name)]
        return sorted(found, key=lambda path: int(path.name.rsplit("-", 1)[1]))


def changed_content(then: Mapping[str, str] | None, now: Mapping[str, str]) -> str:
    """Describe which inputs changed since the run started, or return ""."""
    names = [f"--{name}" for name, content in now.items() if (then or {}).get(name, content) != content]
    return f"what {' and '.join(names)} name{'s' * (len(names) == 1)} has changed since" if names else ""


def _is_write_error(error: BaseException) -> bool:
    # torch writes its files in C++, whose errors come as RuntimeError.
    from_torch = re.search("inline_container|PytorchStreamWriter|iostream error", str(error))
    return isinstance(error, (OSError, SafetensorError)) or bool(from_torch and isinstance(error, RuntimeError))


def _remove(path: Path) -> None:
    """Delete a file or a folder. A folder is renamed first, so that nothing finds it half deleted."""
    if path.is_dir() and not path.is_symlink():
        if not path.name.startswith(TEMPORARY):
            doomed = path.with_name(f"{TEMPORARY}deleted-{path.name}")
            shutil.rmtree(doomed, ignore_errors=True)
            path = path.rename(doomed)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _check_random_state(path: Path) -> None:
    """Raise RuntimeError unless the random state was restored: accelerate ignores a file that it cannot read."""
    saved = load(path)["torch_manual_seed"]
    if not torch.equal(saved, torch.get_rng_state()):
        raise RuntimeError(f"the random state in {path} could not be restored, so the run cannot be resumed exactly")


class Interruption:
    """Catches SIGTERM and Ctrl-C, so that the loop can save and end with `EXIT_RESUME`.

    A context manager that restores the earlier handlers. A second Ctrl-C ends the process immediately.
    """

    NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}  # noqa: RUF012

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.signalled = False
        self.name = "a signal to another process"

    def __enter__(self) -> Interruption:
        self.previous = {number: signal.signal(number, self._note) for number in self.NAMES}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.signalled:
            self.signalled, self.name, self.since = True, self.NAMES[signal.Signals(number)], now
        elif number == signal.SIGINT and now - self.since > 1:  # sooner, a launcher forwards the first one
            raise KeyboardInterrupt

    def requested(self) -> bool:
        """Return whether any process got a signal. A collective call."""
        if self.accelerator.num_processes == 1:
            return self.signalled
        flag = torch.tensor([int(self.signalled)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum").item())
