"""Applies an optimizer step only if its loss and gradient are finite, and reports where they are not."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from common.checkpoints import Progress
from common.endings import DivergedError
from common.options import OptimizationOptions

# A spike is detected by the mean and the spread over this many steps. Earlier, steep steps are common.
SPIKE_WINDOW = 128


def check_trained(progress: Progress) -> None:
    """Raise DivergedError at the end of a run that has trained nothing, or never had a finite score."""
    if progress.skipped_steps == progress.step:
        raise DivergedError(f"all {progress.step} steps were skipped: nothing was trained", progress.step)
    if progress.best_step is None:
        raise DivergedError(f"no evaluation up to step {progress.step} gave a finite score", progress.step)


def optimizer_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Any,
    loss: torch.Tensor,
    progress: Progress,
    options: OptimizationOptions,
    inputs: dict[str, torch.Tensor] | None = None,
    *,
    warming: bool = False,
) -> bool:
    """Clip, check and apply the gradients of the step after `progress.step`; return False if the step was skipped.

    Every process decides alike. Under fp16, the gradient scaler skips a step that overflows and lowers its scale.

    Args:
        loss: this process's share of the step's loss, a scalar.
        inputs: those of the last micro-batch, to name the first module whose output is not finite.

    Raises DivergedError, naming the step, if something is not finite and `--on_nonfinite` is "stop", and at a spike if
    `--on_spike` is "stop".
    """
    bare = accelerator.unwrap_model(model, keep_torch_compile=False)  # keeping it would remove DDP permanently
    norm = accelerator.clip_grad_norm_(model.parameters(), options.max_grad_norm or math.inf)
    whole_loss = accelerator.reduce(loss.detach(), "sum").item()
    finite = math.isfinite(whole_loss) and (norm is None or bool(torch.isfinite(torch.as_tensor(norm))))
    scaled = accelerator.scaler is not None and accelerator.scaler.is_enabled()
    # After dozens of halvings, the precision is not the cause of the overflow.
    hopeless = scaled and not finite and accelerator.scaler.get_scale() < 1e-3
    problem, response, hint = "", "report", ""
    if not finite and (not scaled or hopeless):
        problem = f"loss {whole_loss}, gradient norm {norm if norm is None else float(norm)}: not finite"
        response, hint = options.on_nonfinite, "--on_nonfinite skip"
        if response == "stop" and inputs:
            problem += _first_nonfinite(model, inputs)
    elif not finite:
        scale, where = accelerator.scaler.get_scale(), _overflown(bare)
        accelerator.print(
            f"step {progress.step + 1}: overflow in fp16 at a loss scale of {scale:g}{where}: step skipped, "
            "the scale is lowered"
        )
    elif norm is not None:
        # While the learning rate rises, losses and gradients keep changing: nothing is a spike.
        problem = "" if warming else _spike(progress.recent_steps, whole_loss, float(norm), options.spike_sigmas)
        response, hint = options.on_spike, "--on_spike skip"
        if problem:
            problem += _steepest(bare)
        progress.recent_steps = [*progress.recent_steps[1 - SPIKE_WINDOW :], [whole_loss, float(norm)]]
    if problem and response == "stop":
        raise DivergedError(
            f"step {progress.step + 1}: {problem}. The last checkpoint is intact; lower the learning rate, clip "
            f"harder, or skip such steps with {hint}",
            progress.step + 1,
        )
    if problem:
        skipped = ": step skipped" if response == "skip" else ""
        accelerator.print(f"step {progress.step + 1}: {problem}{skipped}")
    if response == "skip" and problem:
        if scaled:
            accelerator.scaler.update()  # required after unscaling, as no step follows
        optimizer.zero_grad()
        return False
    optimizer.step()
    optimizer.zero_grad()
    return not accelerator.optimizer_step_was_skipped


def _spike(recent: list[list[float]], loss: float, norm: float, sigmas: float) -> str:
    """Describe a loss or gradient norm that exceeds those of the recent steps by `sigmas`, or return ""."""
    if len(recent) < SPIKE_WINDOW:
        return ""
    past = np.asarray(recent)  # (steps, 2)
    usual = past.mean(0)
    spread = np.maximum(past.std(0), 0.01 * np.abs(usual))  # rounding is no spike when all steps are alike
    for name, value, mean, std in zip(("loss", "gradient norm"), (loss, norm), usual, spread, strict=True):
        if value > mean + sigmas * std:
            far = (value - mean) / std if std else math.inf
            return (
                f"{name} {value:.4g} is a spike, {far:.1f} standard deviations above the mean {mean:.4g} "
                f"of the {len(recent)} steps before"
            )
    return ""


def _overflown(model: nn.Module) -> str:
    """Describe the first parameter whose gradient is not finite, or return ""."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
            return f", first in the gradient of {name}"
    return ""


def _steepest(model: nn.Module) -> str:
    """Describe the parameter with the largest gradient, or return ""."""
    squares = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            square = parameter.grad.detach().float().square().sum()
            # FSDP2 keeps a shard of each: their sum is gathered.
            squares[name] = float(square.full_tensor() if hasattr(square, "full_tensor") else square)
    if not squares:
        return ""
    largest = max(squares, key=squares.__getitem__)
    share = squares[largest] / (sum(squares.values()) or 1.0)
    return f"; the largest gradient is that of {largest}, {share:.0%} of the square"


@torch.no_grad()
def _first_nonfinite(model: nn.Module, inputs: dict[str, torch.Tensor]) -> str:
    """Describe the first module whose output is not finite in a forward pass."""
    found: list[str] = []

    def check(name: str, module: nn.Module, output: Any) -> None:
        tensors = output if isinstance(output, (tuple, list)) else [output]
        if not found and not all(t.isfinite().all() for t in tensors if isinstance(t, torch.Tensor)):
            found.append(f"{name} ({type(module).__name__})")

    handles = [
        module.register_forward_hook(lambda module, _, output, name=name: check(name, module, output))
        for name, module in model.named_modules()
        if name
    ]
    try:
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return f", first in the output of {found[0]}" if found else ", though the forward pass is finite"
