"""Write the gains, biases and scales of a fold into weights, in float64 and rounded once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from hf_adanorm.modeling_adanorm import ADDED_BIAS, ADJUSTED_EPS
from hf_adanorm.running import SLOW_BAR
from hf_adanorm.swapping import Change

from .plan import FoldPlan, eps_name

_BLOCK = 1 << 18  # elements of a weight that are folded at a time


class _Edit(NamedTuple):
    """The change of a linear layer with weight W and bias c by one norm."""

    factor: Tensor
    """W is multiplied by it; it has a shape that fits W."""
    moved: Callable[[Tensor, slice], Tensor]
    """Computes from these rows of W what is added to c."""
    scale: float = 1.0
    """W and c are divided by it at the end."""


@torch.no_grad()
def write(plan: FoldPlan, change: Change) -> list[str]:
    """Fold every norm of the plan into its readers, its branches and the eps of the next norms, and set its gain to 1
    and its bias to 0. Return the linear layers that got a bias."""
    edits: dict[str, list[_Edit]] = {}
    needs_bias: dict[str, bool] = {}
    for step in plan.steps.values():
        for name, columns in step.readers.items():
            edits.setdefault(name, []).append(_of_columns(plan.modules[name], columns, step.gain, step.bias))
            needs_bias[name] = needs_bias.get(name, False) or bool(step.bias.any())
        for name in step.branches:
            assert step.branch_bias is not None
            edits.setdefault(name, []).append(_of_branch(plan.modules[name], step.branch_bias, step.scale))
            needs_bias[name] = needs_bias.get(name, False) or bool(step.branch_bias.any())
        for name in step.next_norms:
            _divide_eps(plan.modules[name], step.scale)
    added = []
    for name, its_edits in tqdm(edits.items(), desc="folding", unit="layer", **SLOW_BAR):
        if _write_layer(name, plan.modules[name], its_edits, needs_bias[name], change):
            added.append(name)
    for name in plan.steps:
        info, module = plan.infos[name], plan.modules[name]
        for key, value in ((info.gain_name, 1.0 - info.gain_offset), (info.bias_name, 0.0)):
            if key is not None and isinstance(tensor := getattr(module, key, None), Tensor):
                change.keep(tensor)
                tensor.fill_(value)
    return added


def _divide_eps(norm: nn.Module, scale: float) -> None:
    key = eps_name(norm)
    assert key is not None  # checked by the plan
    setattr(norm, key, getattr(norm, key) / scale**2)
    norm.__dict__[ADJUSTED_EPS] = True


def _of_columns(module: nn.Module, columns: tuple[int, ...], gain: Tensor, bias: Tensor) -> _Edit:
    """Return the edit W diag(g), c + W b of a linear layer, Conv1D (weight transposed) or (grouped) convolution."""
    weight = cast(Tensor, module.weight)
    index = torch.tensor(columns, device=weight.device)
    # A negative number is a column that reads another tensor: it stays as it is.
    factor = torch.where(index >= 0, gain.to(index.device)[index.clamp_min(0)], 1.0)
    shift = torch.where(index >= 0, bias.to(index.device)[index.clamp_min(0)], 0.0)
    if isinstance(module, Conv1D):
        return _Edit(factor[:, None], lambda w, rows: shift @ w)
    if isinstance(module, nn.Linear):
        return _Edit(factor, lambda w, rows: w @ shift)
    groups = int(module.groups)  # type: ignore[arg-type]
    # Output channels of group i read input channels i * width .. (i + 1) * width.
    factor, shift = (t.view(groups, -1).repeat_interleave(len(weight) // groups, 0) for t in (factor, shift))
    factor, shift = (t.view(*t.shape, *[1] * (weight.ndim - 2)) for t in (factor, shift))
    return _Edit(factor, lambda w, rows: (w * shift).flatten(1).sum(1))


def _of_branch(module: nn.Module, bias: Tensor, scale: float) -> _Edit:
    """Return the edit W / s, (c + b) / s."""
    bias = bias.to(cast(Tensor, module.weight).device)
    return _Edit(bias.new_ones(1), lambda w, rows: bias[rows], scale)


def _write_layer(name: str, module: Any, edits: list[_Edit], needs_bias: bool, change: Change) -> bool:
    """Apply `edits` to the weight and bias of a linear layer, in blocks of rows. Return whether it got a bias that it
    lacked."""
    weight, bias = module.weight.detach(), getattr(module, "bias", None)
    outputs = weight.shape[1] if isinstance(module, Conv1D) else weight.shape[0]
    biases = torch.zeros(outputs, dtype=torch.float64, device=weight.device)
    if bias is not None:
        biases += bias.detach()
    blocks = [slice(None)]
    if isinstance(module, nn.Linear):
        rows = max(_BLOCK // weight.shape[1], 1)
        blocks = [slice(start, start + rows) for start in range(0, outputs, rows)]
    for block in blocks:
        part = weight[block]
        wide, factor = part.double(), torch.ones((), dtype=torch.float64, device=weight.device)
        for edit in edits:
            biases[block] = (biases[block] + edit.moved(wide * factor, block)) / edit.scale
            factor = factor * edit.factor / edit.scale
        new = (wide * factor).to(weight.dtype)
        _check_finite(name, part, new)
        change.keep(part, new, functools.partial(_divided, factor))
        part.copy_(new)
    new_bias = biases.to(weight.dtype)
    _check_finite(name, weight if bias is None else bias, new_bias)
    if bias is not None:
        change.keep(bias)
        bias.copy_(new_bias)
    elif needs_bias:
        module.bias = nn.Parameter(new_bias, requires_grad=module.weight.requires_grad)
        module.__dict__[ADDED_BIAS] = True
        return True
    return False


def _divided(factor: Tensor, x: Tensor) -> Tensor:
    return (x.double() / factor).to(x.dtype)


def _check_finite(name: str, old: Tensor, new: Tensor) -> None:
    if bool(new.sum(dtype=torch.float64).isfinite()):
        return
    raise RuntimeError(
        f"folding into {name} overflows {new.dtype}; the model is unchanged. Fold in float32"
        if bool(old.isfinite().all())
        else f"the weights of {name} are not finite: there is nothing to fold into"
    )
