"""Fit the gains and biases of a fold to the source's activations on a batch of real data, by least squares."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from hf_adanorm.running import SLOW_BAR, evaluating, hooked
from hf_adanorm.state import tensors_in

from .plan import FoldPlan, Step, by_column
from .watch import channel_dim, norm_rows


def fit(plan: FoldPlan, replaced: Callable[[str, Tensor], Tensor]) -> None:
    """Run the model once with each fitted norm replaced, and set the gain, bias and scale of its step.

    Norm by norm, z is what the replacement computes, with everything before it replaced and fitted; h is what the
    source's norm returned. Per channel, the readers get the gain and bias that bring z closest to h. No weight is
    written: the hooks compute from z what the fitted readers would get instead of h.

    A norm that runs more than once is fitted to all of its calls at the end, and acts as its source until then.
    """
    inputs, targets = plan.watched.inputs.values, plan.watched.norm_outputs
    late: dict[str, list[Tensor]] = {name: [] for name in plan.fitted if len(targets[name]) > 1}

    def solve(name: str, rows: Tensor) -> None:
        target = torch.cat([load_file(file)["rows"] for file in targets[name]])
        _solve(name, plan.steps[name], rows.double(), target.to(rows.device).double())
        bar.update()

    def replace(name: str) -> Any:
        step, info = plan.steps[name], plan.infos[name]

        def hook(module: Any, args: Any, output: Tensor) -> Tensor:
            z = replaced(name, args[0])
            rows = norm_rows(plan.model, name, info, inputs, z)
            if name in late:
                late[name].append(rows)
                return output
            solve(name, rows)
            gain, bias = (step.scale, step.branch_bias) if step.branches else (step.gain, step.bias)
            form = (-1, *[1] * (z.ndim - 2)) if info.channels_first else info.normalized_shape
            return z * _shaped(gain, form, z) + _shaped(bias, form, z)

        return plan.modules[name].register_forward_hook(hook)

    def read(name: str, reader: str) -> Any:
        """Give `reader` its own gain and bias, as its input has those of the residual path."""
        step = plan.steps[name]

        def hook(module: Any, args: Any, kwargs: Any) -> Any:
            (x,) = tensors_in((args, kwargs))
            gain = step.gain / step.scale
            gain, bias = by_column(step.readers[reader], gain, step.bias - gain * step.branch_bias, x.device)
            form = (-1, *[1] * (x.ndim - 1 - channel_dim(module, x.ndim)))
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
            solve(name, torch.cat(rows))


def _shaped(value: Tensor | float, form: tuple[int, ...], like: Tensor) -> Tensor | float:
    return value.view(form).to(like) if isinstance(value, Tensor) else value


def _solve(name: str, step: Step, z: Tensor, h: Tensor) -> None:
    """Set the gain, the bias and the scale of a step. z, h: (rows, channels), float64; both are overwritten."""
    if len(z) < 2:
        raise ValueError(f"inputs bring {len(z)} row to {name}: a fit needs a batch of real data")
    spread = (h - h.mean(0)).norm().clamp_min(1e-30)
    share = 0.0 if step.without_bias else 1.0  # of the means: none, so that no bias is left for them
    z_mean, h_mean = share * z.mean(0), share * h.mean(0)
    z -= z_mean
    h -= h_mean
    variance, covariance = z.square().sum(0), (z * h).sum(0)
    moves = variance > 1e-8 * len(z)  # a channel that does not vary has no slope: it keeps its gain
    step.gain = torch.where(moves, covariance / variance.clamp_min(1e-30), step.gain)
    step.bias = h_mean - step.gain * z_mean
    if step.branches:
        step.scale = float(covariance.sum() / variance.sum())
        if not step.scale > 0:  # NaN, too
            raise RuntimeError(f"{name} at these settings has nothing in common with its source: choose a smaller k")
        step.branch_bias = h_mean - step.scale * z_mean
    h -= z * (step.scale if step.branches else step.gain)
    step.lost = float(h.norm() / spread)
