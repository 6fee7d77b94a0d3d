"""A fold by a least-squares fit to the source's activations on a batch of real data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hf_adanorm.running import SLOW_BAR, hooked, real_rows, run
from hf_adanorm.swapping import Change

from .plan import Fold, FoldPlan


def fold_by_fit(
    plan: FoldPlan, inputs: Mapping[str, Any], replacements: Mapping[str, Callable[[Tensor], Tensor]], change: Change
) -> None:
    """Fold the norms of the plan, by a fit from the first on that is more than a change of scale (k > 0) or whose fold
    drops something: its new output z is what the model gives with every norm before it replaced, and per channel the
    readers get the gain and bias that bring z closest to the source's output h.

    Two forward passes do, as the layers that take up a fold run after its norm. A norm that runs more than once, or
    after a layer that it folds into, ends its pass and is fitted to all that it saw there.
    """
    targets: dict[str, list[Tensor]] = {name: [] for name in plan.fitted}
    waiting, seen = list(plan.fitted), list[Tensor]()

    def rows(name: str, output: Tensor) -> Tensor:
        """(rows, channels), without padding."""
        info = plan.infos[name]
        if info.channels_first:
            output = output.movedim(1, -1)
        flat = output.reshape(-1, torch.Size(info.normalized_shape).numel())
        real = real_rows(plan.model, name, inputs, output.shape[: -len(info.normalized_shape)])
        return flat.clone() if real is None else flat[real.reshape(-1)]

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            targets[name].append(rows(name, output))

        return plan.modules[name].register_forward_hook(hook)

    def fit(name: str) -> None:
        _fit(plan, name, torch.cat(seen).double(), torch.cat(targets.pop(name)).double())
        waiting.pop(0)
        plan.absorb(name, change)
        bar.update()

    def replace(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            if name in waiting[1:]:
                return output
            z = replacements[name](args[0])
            if name in waiting:
                seen.append(rows(name, z))
                if plan.in_passing(name):
                    fit(name)
                    seen.clear()
            return z

        return plan.modules[name].register_forward_hook(hook)

    with hooked(watch(name) for name in plan.fitted):
        run(plan.model, inputs)
    for name in plan.order[: -len(plan.fitted)]:
        plan.absorb(name, change)
    bar = tqdm(total=len(waiting), desc="fitting", unit="norm", **SLOW_BAR)
    with bar, hooked(replace(name) for name in plan.folds):
        while waiting:
            first = waiting[0]
            seen.clear()
            run(plan.model, inputs)
            if first in waiting:
                fit(first)


def _fit(plan: FoldPlan, name: str, z: Tensor, h: Tensor) -> None:
    """Set the gain, the bias and the scale of a norm's fold. z, h: (rows, channels), float64."""
    fold: Fold = plan.folds[name]
    if len(z) < 2:
        raise ValueError(f"fold_inputs bring {len(z)} row to {name}: a fit needs a batch of real data")
    shares = 0.0 if fold.without_bias else 1.0  # of the means: none, so that no bias is left for them
    z_mean, h_mean = shares * z.mean(0), shares * h.mean(0)
    z0, h0 = z - z_mean, h - h_mean
    variance, covariance = z0.square().sum(0), (z0 * h0).sum(0)
    moves = variance > 1e-8 * len(z)  # a channel that stands still has no slope: it keeps its gain
    fold.gain = torch.where(moves, covariance / variance.clamp_min(1e-30), fold.gain)
    fold.bias = h_mean - fold.gain * z_mean
    if fold.branches:
        scale = float(covariance.sum() / variance.sum())
        if not scale > 0:  # NaN, too
            raise RuntimeError(f"{name} at these settings has nothing in common with its source: choose a smaller k")
        fold.scale, fold.branch_bias = scale, h_mean - scale * z_mean
    lost = h - (fold.scale * z + fold.branch_bias if fold.branches else fold.gain * z + fold.bias)
    fold.lost = float(lost.norm() / (h - h.mean(0)).norm().clamp_min(1e-30))
