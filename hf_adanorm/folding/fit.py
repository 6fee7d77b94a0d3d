"""A fold by a least-squares fit to the source's activations on a batch of real data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_adanorm.padding import real_rows

from .plan import Fold, FoldPlan


class Fit:
    """Fits gain and bias by least squares, for a norm that is more than a change of scale (k > 0), or that follows on
    norms whose fold dropped something: its new output z is what the model gives with every norm before it replaced,
    and per channel the readers get the gain and bias that bring z closest to the source's output h."""

    def __init__(
        self, plan: FoldPlan, inputs: Mapping[str, Any], replacements: Mapping[str, Callable[[Tensor], Tensor]]
    ):
        self.plan, self.inputs, self.replacements = plan, inputs, replacements
        self.hooks: list[Any] = []
        self.targets = self._capture(list(plan.folds))

    def _rows(self, name: str, output: Tensor) -> Tensor:
        """(rows, channels), float64, without padding."""
        shape, dims = self.plan.infos[name].normalized_shape, len(self.plan.infos[name].normalized_shape)
        if self.plan.infos[name].channels_first:
            output = output.movedim(1, -1)
        rows = output.double().reshape(-1, torch.Size(shape).numel())
        real = real_rows(self.plan.model, name, self.inputs, output.shape[:-dims])
        return rows if real is None else rows[real.reshape(-1)]

    def _capture(self, names: Sequence[str]) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {name: [] for name in names}
        hooks = [
            self.plan.modules[name].register_forward_hook(
                lambda module, args, output, name=name: found[name].append(self._rows(name, output))
            )
            for name in names
        ]
        try:
            run_quietly(self.plan.model, self.inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return {name: torch.cat(rows) for name, rows in found.items()}

    def update(self, name: str, fold: Fold) -> None:
        replacement = self.replacements[name]
        self.hooks.append(
            self.plan.modules[name].register_forward_hook(lambda module, args, output: replacement(args[0]))
        )
        z, h = self._capture([name])[name], self.targets[name]
        if len(z) < 2:
            raise ValueError(f"fold_inputs bring {len(z)} row to {name}: a fit needs a batch of real data")
        z_mean, h_mean = z.mean(0), h.mean(0)
        z0, h0 = z - z_mean, h - h_mean
        variance, covariance = z0.square().sum(0), (z0 * h0).sum(0)
        moves = variance > 1e-8 * len(z)  # a channel that stands still has no slope: it keeps its gain
        fold.gain = torch.where(moves, covariance / variance.clamp_min(1e-30), fold.gain)
        fold.bias = h_mean - fold.gain * z_mean
        if fold.branches:
            scale = float(covariance.sum() / variance.sum())
            if not scale > 0:  # NaN, too
                raise RuntimeError(
                    f"{name} at these settings has nothing in common with its source: choose a smaller k"
                )
            fold.scale, fold.branch_bias = scale, h_mean - scale * z_mean
        lost = h - (fold.scale * z + fold.branch_bias if fold.branches else fold.gain * z + fold.bias)
        fold.lost = float(lost.norm() / h0.norm().clamp_min(1e-30))

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()


def run_quietly(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """One forward pass under the same conditions as the watched one."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return model(**inputs)
    finally:
        for module, flag in training.items():
            module.training = flag
