"""Fit the gains and biases of a fold to the source's activations on a batch of real data, by least squares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hf_adanorm.running import SLOW_BAR, evaluating, hooked
from hf_adanorm.state import tensors_in

from .linear import channel_dim
from .plan import FoldPlan, Step
from .uses import norm_rows


def fit(plan: FoldPlan, replacements: Mapping[str, Callable[[Tensor], Tensor]]) -> None:
    """Run the model once with each fitted norm replaced, and set the gain, bias and scale of its step.

    Norm by norm, z is what the replacement computes, with everything before it replaced and fitted; h is what the
    source's norm returned. Per channel the readers get the gain and bias that bring z closest to h. No weight is
    written: what the fitted readers would get instead of h is computed from z on the spot.

    A norm that runs more than once is fitted to all of its calls, at the end, and acts as its source until then.
    """
    inputs = plan.watched.inputs.values
    targets = plan.watched.norm_outputs
    late: dict[str, list[Tensor]] = {name: [] for name in plan.fitted if len(targets[name]) > 1}

    def replace(name: str) -> Any:
        step = plan.steps[name]

        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            z = replacements[name](args[0])
            rows = norm_rows(plan.model, name, plan.infos[name], inputs, z)
            if name in late:
                late[name].append(rows)
                return output
            _solve(name, step, rows.double(), targets.pop(name)[0].double())
            bar.update()
            gain, bias = (step.scale, step.branch_bias) if step.branches else (step.gain, step.bias)
            info = plan.infos[name]
            form = (-1, *[1] * (z.ndim - 2)) if info.channels_first else info.normalized_shape
            return z * _shaped(gain, form, z) + _shaped(bias, form, z)

        return plan.modules[name].register_forward_hook(hook)

    def read(name: str, reader: str) -> Any:
        """What `reader` gets is scaled as the residual path needs it: give it its own gain and bias."""
        step = plan.steps[name]

        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            (x,) = tensors_in((args, kwargs))
            index = torch.tensor(step.readers[reader], device=x.device)
            gain = step.gain / step.scale
            bias = step.bias - gain * cast(Tensor, step.branch_bias)
            form = (-1, *[1] * (x.ndim - 1 - channel_dim(module, x.ndim)))
            own = index >= 0
            gain, bias = (value.to(x.device)[index.clamp_min(0)] for value in (gain, bias))
            gain, bias = torch.where(own, gain, 1.0), torch.where(own, bias, 0.0)
            return (x * _shaped(gain, form, x) + _shaped(bias, form, x),), {}

        return plan.modules[reader].register_forward_pre_hook(hook, with_kwargs=True)

    def hooks() -> Iterator[Any]:
        for name in plan.fitted:
            yield replace(name)
            if plan.steps[name].branches and name not in late:
                yield from (read(name, reader) for reader in plan.steps[name].readers)

    bar = tqdm(total=len(plan.fitted), desc="fitting", unit="norm", **SLOW_BAR)
    with bar, evaluating(plan.model), hooked(hooks()):
        plan.model(**inputs)
        for name, rows in late.items():
            _solve(name, plan.steps[name], torch.cat(rows).double(), torch.cat(targets.pop(name)).double())


def _shaped(value: Tensor | float | None, form: tuple[int, ...], like: Tensor) -> Tensor | float:
    return value.view(form).to(like) if isinstance(value, Tensor) else value or 0.0


def _solve(name: str, step: Step, z: Tensor, h: Tensor) -> None:
    """Set the gain, the bias and the scale of a step. z, h: (rows, channels), float64."""
    if len(z) < 2:
        raise ValueError(f"inputs bring {len(z)} row to {name}: a fit needs a batch of real data")
    shares = 0.0 if step.without_bias else 1.0  # of the means: none, so that no bias is left for them
    z_mean, h_mean = shares * z.mean(0), shares * h.mean(0)
    z0, h0 = z - z_mean, h - h_mean
    variance, covariance = z0.square().sum(0), (z0 * h0).sum(0)
    moves = variance > 1e-8 * len(z)  # a channel that stands still has no slope: it keeps its gain
    step.gain = torch.where(moves, covariance / variance.clamp_min(1e-30), step.gain)
    step.bias = h_mean - step.gain * z_mean
    if step.branches:
        step.scale = float(covariance.sum() / variance.sum())
        if not step.scale > 0:  # NaN, too
            raise RuntimeError(f"{name} at these settings has nothing in common with its source: choose a smaller k")
        step.branch_bias = h_mean - step.scale * z_mean
    fitted = step.scale * z + step.branch_bias if step.branch_bias is not None else step.gain * z + step.bias
    step.lost = float((h - fitted).norm() / (h - h.mean(0)).norm().clamp_min(1e-30))
