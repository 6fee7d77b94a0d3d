"""Sets up a run: accelerator, patch, schedules of the norms, optimizer, learning rate."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

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
from torch import nn

import hf_adanorm
from common.options import OptimizationOptions, OptionError, PatchOptions, RunOptions
from hf_adanorm.modeling_adanorm import is_swapped
from hf_adanorm.norms import STOCK, did_you_mean, digest, files_of, name_of, parse_value, resolve_norm, settings_of
from hf_adanorm.settings import NormSchedule

# The number of training examples for a fold that is fitted, and for a k for each norm.
CALIBRATION_EXAMPLES = 32
LAYER_DROPS = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")


def make_accelerator(options: Any) -> Accelerator:
    """Return the accelerator of a recipe. Raises OptionError for an unknown tracker, or one that is not installed.

    The recipe's own plan divides batches over processes, so no data loader is prepared, and the loop sets the learning
    rate, so no scheduler is. `accelerator.accumulate` counts micro-batches: `gradient_accumulation_steps` per step.
    """
    launched, known = int(os.environ.get("WORLD_SIZE", 1)), [str(kind) for kind in LoggerType]
    for name in options.report_to:
        if name not in known:
            raise OptionError(f"--report_to {name}: expected {', '.join(known)}{did_you_mean(name, known)}")
        if name not in [*map(str, get_available_trackers()), "all"]:
            raise OptionError(f"--report_to {name}: it is not installed: pip install {name}")
    accelerator = Accelerator(
        # By default accelerate treats processes that torchrun starts on CPUs as single runs.
        cpu=launched > 1 and not torch.accelerator.is_available(),
        mixed_precision=options.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=options.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        dataloader_config=DataLoaderConfiguration(even_batches=False),
        dynamo_backend="inductor" if options.compile else None,
        log_with=list(options.report_to) or None,
        project_dir=options.output_dir,
    )
    # Otherwise each process would train alone and write to the same folder.
    if launched not in (1, accelerator.num_processes):
        raise RuntimeError(
            f"the launcher started {launched} processes, but accelerate found {accelerator.num_processes}: see "
            "recipes/launch for files that fit this machine"
        )
    if accelerator.state.deepspeed_plugin is not None:
        # DeepSpeed requires a batch size if no data loader is prepared. It only affects its own reports.
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
    # It warns about tied weights at each checkpoint. They are saved once on purpose.
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    set_seed(options.seed)
    if not (accelerator.is_main_process and sys.stderr.isatty()):  # in a log file bars are noise
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    return accelerator


def processes_line(accelerator: Accelerator, script: str) -> str:
    """Return the first line of a run: how many processes it has and, for a single one, how to start two."""
    processes, device = accelerator.num_processes, accelerator.device.type
    if processes > 1:
        return f"{processes} processes on {device}"
    launcher = "torchrun --nproc_per_node 2" if device == "cpu" else "accelerate launch --multi_gpu --num_processes 2"
    return f"1 process on {device} (two: {launcher} recipes/{script} ...)"


def calibration_rows(data: Any) -> list[Any]:
    """Return examples spread over a training set, the same on every process and in every run."""
    step = max(len(data) // CALIBRATION_EXAMPLES, 1)
    return [data[index] for index in range(0, len(data), step)][:CALIBRATION_EXAMPLES]


def apply_patch(
    model: nn.Module, options: PatchOptions, inputs: Callable[[], dict[str, torch.Tensor]] | None = None
) -> int:
    """Patch `model` in place as the options say. Return the number of its norms of the wanted kind.

    Args:
        inputs: returns a batch of training data as the model takes it; called for a fold or a calibration only.

    Raises OptionError when the options cannot be applied to this model.
    """
    if options.norm == STOCK:
        if hf_adanorm.is_patched(model):
            raise OptionError(
                "--norm layernorm is the unpatched control, but this pretrained model is already patched; "
                "give the norm it was patched with, or start from an unpatched model"
            )
        return count_norms(model, options.norm)
    names = ("eps", "include", "exclude", "layers", "targets", "affine")
    chosen, settings = {name: getattr(options, name) for name in names}, dict(options.norm_settings)
    try:
        cls, _ = resolve_norm(options.norm)
        calibrates = options.calibrate_k and "k" in settings_of(cls)
        batch = inputs() if inputs is not None and (calibrates or options.affine == "fold") else None
        if calibrates and batch is not None:
            settings["k"] = hf_adanorm.calibrate_k(model, [batch], k=settings.get("k", settings_of(cls)["k"])).k
        how = {"unfoldable": options.unfoldable, "tied": options.tied, "tolerance": options.tolerance}
        if options.affine == "fold":
            chosen["affine"] = hf_adanorm.Fold(**how, inputs=batch)
        elif how != {"unfoldable": "keep", "tied": "keep", "tolerance": None}:
            raise ValueError(f"{', '.join(how)} go with affine='fold', got affine={options.affine!r}")
        hf_adanorm.patch_model(model, cls, **chosen, **settings)
    except (ValueError, TypeError, RuntimeError) as error:  # RuntimeError: a fold that would move the outputs
        raise OptionError(f"--norm {options.norm}: {error}") from error
    return count_norms(model, options.norm)


def norm_schedules(options: PatchOptions, model: nn.Module, total_steps: int) -> list[NormSchedule]:
    """Return what `--norm_schedule` asks for, and set the norms to its start; nothing for the control.

    Raises OptionError for another form, and for a value that the norms refuse, now or later.
    """
    found = []
    for text in options.norm_schedule if options.norm != STOCK else ():
        try:
            setting, shape, first, last, over = text.split(":") + ["1.0"] * (text.count(":") == 3)
            schedule = NormSchedule(shape=shape, over=parse_value(over), **{setting: (float(first), float(last))})
        except (ValueError, TypeError) as error:
            raise OptionError(
                f"--norm_schedule {text}: expected SETTING:SHAPE:FROM:TO[:OVER], such as k:linear:0:0.1:0.3: {error}"
            ) from error
        try:
            for step in (total_steps, 0):
                schedule.apply(model, step, total_steps)
        except (ValueError, TypeError) as error:
            raise OptionError(f"--norm_schedule {text}: {error}") from error
        found.append(schedule)
    return found


def count_norms(model: nn.Module, norm: str) -> int:
    """Return the number of modules of `model` that compute `norm`."""
    if norm == STOCK:
        return sum(isinstance(module, nn.LayerNorm) for module in model.modules())
    name = name_of(resolve_norm(norm)[0])
    return sum(is_swapped(module) and module.norm_name == name for module in model.modules())


def describe_norm(options: PatchOptions) -> dict[str, Any]:
    """Return the norm, all of its settings, and the hash of each file that the user wrote for it."""
    if options.norm == STOCK:
        return {"norm": options.norm, "settings": {}, "norm_files": {}}
    cls, _ = resolve_norm(options.norm)
    files = {path.name: digest(path) for path in files_of(cls)} if ":" in options.norm else {}
    settings = {**settings_of(cls), **options.norm_settings}
    return {"norm": options.norm, "settings": settings, "norm_files": files}


def allow_unused_parameters(accelerator: Accelerator, model: nn.Module) -> None:
    """Let DDP not wait for gradients of layers that a process dropped at random. Call before `accelerator.prepare`."""
    configs = [model.config, *(getattr(model.config, name) for name in getattr(model.config, "sub_configs", {}))]
    dropped = (getattr(config, name, 0.0) for config in configs for name in LAYER_DROPS)
    if accelerator.num_processes > 1 and any(dropped):
        accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)


def make_optimizer(model: nn.Module, options: OptimizationOptions) -> torch.optim.AdamW:
    """Return AdamW; parameters with fewer than two dimensions (biases, gains of norms) are not decayed."""
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
        fused=options.fused_adam,
    )


def learning_rate_at(step: int, total_steps: int, options: OptimizationOptions) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0.

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


@contextmanager
def norms_to_trackers(
    accelerator: Accelerator, model: nn.Module, options: RunOptions, step: int
) -> Iterator[Callable[[int], None]]:
    """Yield a function to call after every step, which sends `--watch_norms` to the trackers as scalars.

    On several processes they describe the main process's share of the batch.
    """
    if options.watch_norms is None:
        yield lambda step: None
        return
    with hf_adanorm.watch_norms(model, every=options.watch_norms, start_step=step) as log:

        def send(step: int) -> None:
            if log.records:
                accelerator.log(log.scalars(), step=step)
                log.records.clear()

        yield send
