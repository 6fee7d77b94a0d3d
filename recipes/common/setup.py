"""What a run is set up with: accelerator, patch, optimiser, learning rate."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
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
from common.options import (
    NORMS,
    PATCH_OPTIONS,
    OptimizationOptions,
    OptionError,
    PatchOptions,
    RunOptions,
    did_you_mean,
)

# A fold by a fit and a k for each norm are taken from so many training examples.
CALIBRATION_EXAMPLES = 32
LAYER_DROPS = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")


def make_accelerator(run: RunOptions, optimization: OptimizationOptions) -> Accelerator:
    """The accelerator of a recipe.

    Batches are divided over processes by the recipe's own plan, so no data loader is prepared with it, and the
    learning rate is set by the step, so no scheduler is. `accelerator.accumulate` counts micro-batches; a step always
    has `gradient_accumulation_steps` of them.
    """
    launched = int(os.environ.get("WORLD_SIZE", 1))
    check_trackers(run.report_to)
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
    # Each would take itself for the only one, and write to the same folder.
    if launched not in (1, accelerator.num_processes):
        raise RuntimeError(
            f"the launcher started {launched} processes, but accelerate found {accelerator.num_processes}: see "
            "recipes/launch for files that fit this machine"
        )
    if accelerator.state.deepspeed_plugin is not None:
        # DeepSpeed asks for the size of a batch where no data loader is prepared; it only enters its own reports.
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
    # It reports tied weights at each checkpoint. They are saved once, on purpose.
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    set_seed(run.seed)
    if not (accelerator.is_main_process and run.progress_bar and sys.stderr.isatty()):
        # In a log file bars are noise; the loop's own lines tell where it stands.
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


def check_trackers(names: Iterable[str]) -> None:
    """Raise OptionError for a tracker that accelerate does not know, or that is not installed."""
    known = [str(kind) for kind in LoggerType]
    for name in names:
        if name not in known:
            raise OptionError(f"--report_to {name}: expected {', '.join(known)}{did_you_mean(name, known)}")
        if name not in [*map(str, get_available_trackers()), "all"]:
            raise OptionError(f"--report_to {name}: it is not installed: pip install {name}")


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
        return count_norms(model, options.norm)
    try:
        calibrates = options.calibrate_k and "k" in NORMS[options.norm].settings
        batch = inputs() if inputs is not None and (calibrates or options.affine == "fold") else None
        of_others = {name for norm in NORMS.values() for name in norm.settings} - {*NORMS[options.norm].settings}
        names = [name for name in PATCH_OPTIONS if hasattr(options, name) and name not in of_others]
        settings = {name: getattr(options, name) for name in names}
        if calibrates and batch is not None:
            settings["k"] = hf_adanorm.calibrate_k(model, [batch], k=options.k).k
        hf_adanorm.patch_model(model, **settings, fold_inputs=batch if options.affine == "fold" else None)
    except (ValueError, TypeError, RuntimeError) as error:  # the last: a fold that would have moved the outputs
        raise OptionError(f"--norm {options.norm}: {error}") from error
    return count_norms(model, options.norm)


def count_norms(model: nn.Module, norm: str) -> int:
    """How many modules of `model` compute `norm`."""
    if norm == "layernorm":
        return sum(isinstance(module, nn.LayerNorm) for module in model.modules())
    swapped = (module for module in model.modules() if getattr(module, "is_adanorm_module", False))
    return sum(module.norm_name == norm for module in swapped)


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
        fused=options.fused_adam,
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
