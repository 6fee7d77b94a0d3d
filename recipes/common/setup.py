"""What the training loops share: set-up, optimiser, learning rate, the checks around a step, timing."""

from __future__ import annotations

import atexit
import errno
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import datasets
import torch
import transformers
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    LoggerType,
    set_seed,
)
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch import nn
from torch.distributed import TCPStore

import hf_adanorm
from common.checkpoints import EXIT_CANNOT_SAVE, Progress, SaveError, write_json
from common.options import OptimizationOptions, OptionError, PatchOptions, RunOptions, did_you_mean
from common.steps import DivergedError
from tasks.data import DataError

EXIT_BAD_INPUT = 2
EXIT_DIVERGED = 3

# The first steps of a process pay for memory allocation and compilation: timing leaves them out.
UNTIMED_STEPS = 5
# A fold by a fit and a k for each norm are taken from so many training examples.
CALIBRATION_EXAMPLES = 32
# What the system says of a disk that takes no more.
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
LAYER_DROPS = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")


class Fate:
    """What the processes of a run share when one of them cannot go on: all end, with its message and code.

    A process that waits for another in a collective call cannot be told by one. So every process has a thread that
    looks for the end of the run in the store by which the processes found each other.
    """

    KEY = "hf_adanorm/end"
    POLL_SECONDS = 0.3
    MOST_SECONDS = 5.0  # for the others to have seen it, before the launcher kills them

    def __init__(self) -> None:
        self.store: TCPStore | None = None
        self.ending = threading.Lock()
        self.over = threading.Event()

    def share(self) -> None:
        """From here on, where one process ends by `end`, all do."""
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=30))
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()

        def rest() -> None:  # in C++ it would not survive the end of the interpreter
            self.over.set()
            thread.join()

        atexit.register(rest)

    def end(self, message: str, code: int) -> NoReturn:
        """Say `message` and end the process, and the others of the run, with `code`."""
        if self.store is None:
            if _speaks():
                print(f"error: {message}", file=sys.stderr, flush=True)
            sys.exit(code)
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


def make_accelerator(run: RunOptions, optimization: OptimizationOptions) -> Accelerator:
    """The accelerator of a recipe.

    Batches are divided over processes by the recipe's own plan, so no data loader is prepared with it, and the
    learning rate is set by the step, so no scheduler is. `accelerator.accumulate` counts micro-batches; a step always
    has `gradient_accumulation_steps` of them.
    """
    launched = int(os.environ.get("WORLD_SIZE", 1))
    known, installed = LoggerType.list(), [str(tracker) for tracker in get_available_trackers()]
    for name in run.report_to:
        if name not in known:
            raise OptionError(f"--report_to {name}: expected {', '.join(known)}{did_you_mean(name, known)}")
        if name not in [*installed, "all"]:
            raise OptionError(f"--report_to {name}: it is not installed: pip install {name}")
    accelerator = Accelerator(
        # Without being told, accelerate takes processes that torchrun starts on CPUs for so many single runs.
        cpu=launched > 1 and not torch.accelerator.is_available(),
        mixed_precision=run.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=optimization.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        dataloader_config=DataLoaderConfiguration(even_batches=False),
        dynamo_backend="inductor" if run.compile else None,
        log_with=list(run.report_to) or None,
        project_dir=run.output_dir,
    )
    if launched not in (
        1,
        accelerator.num_processes,
    ):  # each would take itself for the only one, and write to the same folder
        raise RuntimeError(
            f"the launcher started {launched} processes, but accelerate found {accelerator.num_processes}: see "
            "recipes/launch for files that fit this machine"
        )
    if launched > 1:
        fate.share()
    if accelerator.state.deepspeed_plugin is not None:
        # DeepSpeed asks for the size of a batch where no data loader is prepared; it only enters its own reports.
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
    set_seed(run.seed)
    if not (accelerator.is_main_process and run.progress_bar and sys.stderr.isatty()):
        # In a log file bars are noise; the loop's own lines tell where it stands.
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    return accelerator


def calibration_rows(data: Any) -> list[Any]:
    """A few examples from all over a training set, the same on every process and on every start."""
    step = max(len(data) // CALIBRATION_EXAMPLES, 1)
    return [data[index] for index in range(0, len(data), step)][:CALIBRATION_EXAMPLES]


def apply_patch(
    model: nn.Module, options: PatchOptions, inputs: Callable[[], dict[str, torch.Tensor]] | None = None
) -> int:
    """Patch `model` in place as the options say; return how many norms of the wanted kind it now has.

    `inputs` gives a batch of training data as the model takes it, for a fold or a calibration; it is called only then.
    Raises OptionError when the options cannot be applied to this model.
    """
    if options.norm == "layernorm":
        if hf_adanorm.is_patched(model):
            raise OptionError(
                "--norm layernorm is the unpatched control, but this pretrained model is already patched; "
                "give the norm it was patched with, or start from an unpatched model"
            )
        return sum(isinstance(module, nn.LayerNorm) for module in model.modules())
    try:
        calibrates = options.calibrate_k and options.norm == "adanorm"
        batch = inputs() if inputs is not None and (calibrates or options.affine == "fold") else None
        k: float | dict[str, float] = options.k
        if calibrates and batch is not None:
            k = hf_adanorm.calibrate_k(model, [batch], k=options.k).k
        hf_adanorm.patch_model(
            model,
            options.norm,
            C=options.C,
            k=k,
            detach_mean=options.detach_mean,
            detach_variance=options.detach_variance,
            eps=options.eps,
            include=options.include,
            exclude=options.exclude,
            layers=options.layers,
            targets=options.targets,
            affine=options.affine,
            on_unfoldable=options.on_unfoldable,
            fold_inputs=batch if options.affine == "fold" else None,
        )
    except (ValueError, TypeError, RuntimeError) as error:  # the last: a fold that would have moved the outputs
        raise OptionError(f"--norm {options.norm}: {error}") from error
    return count_norms(model, options.norm)


def count_norms(model: nn.Module, norm: str) -> int:
    """How many modules of `model` compute `norm`."""
    if norm == "layernorm":
        return sum(isinstance(module, nn.LayerNorm) for module in model.modules())
    swapped = (module for module in model.modules() if getattr(module, "is_adanorm_module", False))
    return sum(module.norm == norm for module in swapped)


def allow_unused_parameters(accelerator: Accelerator, model: nn.Module) -> None:
    """Let DDP not wait for gradients of layers that a process dropped at random. Call before `accelerator.prepare`."""
    configs = [model.config, *(getattr(model.config, name) for name in getattr(model.config, "sub_configs", {}))]
    dropped = (getattr(config, name, 0.0) for config in configs for name in LAYER_DROPS)
    if accelerator.num_processes > 1 and any(dropped):
        accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)


def make_optimizer(model: nn.Module, options: OptimizationOptions) -> torch.optim.AdamW:
    """AdamW; parameters with fewer than two dimensions (biases, gains of norms) are not decayed."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon,
    )


def learning_rate_at(step: int, total_steps: int, options: OptimizationOptions) -> float:
    """The learning rate of optimiser step `step`, counted from 0.

    It rises linearly from `warmup_init_lr` to `learning_rate` over the warm-up, then stays (constant), falls to
    `min_lr` at `total_steps` (linear, cosine), or falls with the inverse square root of the step.
    """
    peak = options.learning_rate
    warmup = options.warmup_steps or round(options.warmup_ratio * total_steps)
    if step < warmup:
        return options.warmup_init_lr + (peak - options.warmup_init_lr) * (step + 1) / warmup
    if options.lr_schedule == "constant":
        return peak
    if options.lr_schedule == "inverse_sqrt":
        return peak * math.sqrt(max(warmup, 1) / max(step + 1, warmup, 1))
    done = (step - warmup) / max(total_steps - warmup, 1)
    if options.lr_schedule == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    return peak + (options.min_lr - peak) * done


def set_learning_rate(optimizer: Any, value: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = value


@contextmanager
def norms_to_trackers(
    accelerator: Accelerator, model: nn.Module, options: RunOptions, step: int
) -> Iterator[Callable[[int], None]]:
    """Within the block, call what it yields with the number of every finished step: `--watch_norms` as scalars to the
    trackers. On several processes they are those of the main process's share of the batch."""
    if options.watch_norms is None:
        yield lambda step: None
        return
    with hf_adanorm.watch_norms(model, every=options.watch_norms, start_step=step) as log:

        def send(step: int) -> None:
            if log.records:
                accelerator.log(log.scalars(), step=step)
                log.records.clear()

        yield send


class Stopwatch:
    """Counts what was trained on and how long it took, without the first steps of this process and without pauses."""

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
        """Go on timing after a pause."""
        self.started = time.perf_counter() if self.steps >= UNTIMED_STEPS else None

    @property
    def samples_per_second(self) -> float | None:
        """None while no step was timed."""
        seconds = self.progress.timed_seconds
        return self.progress.timed_samples / seconds if seconds else None

    @property
    def seconds_per_step(self) -> float | None:
        """By the mean size of a step; None while no step was timed."""
        speed = self.samples_per_second
        return self.progress.samples / self.progress.step / speed if speed else None


class ProgressBar:
    """Steps done, speed and time left: a bar on the main process's terminal, if it is to be `shown`, else lines."""

    def __init__(self, total: int, *, main: bool, shown: bool, first_step: int = 0, unit: str = "samples/s"):
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
        )
        console = Console(stderr=True)
        self.unit = unit
        self.main = main
        self.total = total
        self.first_step = first_step
        self.started = time.perf_counter()
        self.bar = Bar(*columns, console=console, disable=not (main and shown and console.is_terminal))
        self.task = self.bar.add_task("training", total=total, completed=first_step, speed="")

    def __enter__(self) -> ProgressBar:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def update(self, step: int, speed: float | None) -> None:
        """Show that `step` steps are done at `speed` a second."""
        self.bar.update(self.task, completed=step, speed="" if speed is None else f"{speed:,.0f} {self.unit}")

    def log(self, step: int, speed: float | None, loss: float, lr: float) -> None:
        """Show the training loss: in the bar, or where there is none as a line."""
        self.bar.update(self.task, description=f"loss {loss:.4f}")
        if self.main and self.bar.disable:
            pace = "" if speed is None else f", {speed:,.0f} {self.unit}"
            print(
                f"step {step}/{self.total}: loss {loss:.4f}, learning rate {lr:.3g}{pace}{self._left(step)}",
                flush=True,
            )

    def _left(self, step: int) -> str:
        done = step - self.first_step
        seconds = (time.perf_counter() - self.started) / max(done, 1) * (self.total - step)
        return f", {int(seconds // 60)}:{int(seconds % 60):02d} left" if done > 0 and step < self.total else ""
