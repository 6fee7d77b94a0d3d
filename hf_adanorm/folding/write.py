"""Write the gains, biases and scales of a fold into weights, in float64 and rounded once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from hf_adanorm.modeling_adanorm import ADDED_BIAS, ADJUSTED_EPS
from hf_adanorm.running import SLOW_BAR
from hf_adanorm.swapping import Change

from .plan import FoldPlan, by_column, eps_name
from .watch import num_inputs

_BLOCK = 1 << 18  # elements of a weight that are folded at a time


@dataclass
class _Edit:
    """The change of a linear layer with weight W and bias c: to W * factor, and c / scale + W shift + bias."""

    factor: Tensor
    """float64, (inputs,), as the shift."""
    shift: Tensor
    bias: Tensor
    """float64, (outputs,)."""
    scale: float = 1.0


@torch.no_grad()
def write(plan: FoldPlan, change: Change) -> list[str]:
    """Fold every norm of the plan into its readers, its branches and the eps of the next norms, and set its gain to 1
    and its bias to 0. Return the linear layers that got a bias."""
    edits: dict[str, _Edit] = {}
    for step in plan.steps.values():
        for name in (*step.readers, *step.branches):
            edits[name] = edits.get(name) or _begin(plan.modules[name])
        for name, columns in step.readers.items():
            edit = edits[name]
            gain, bias = by_column(columns, step.gain, step.bias, edit.factor.device)
            edit.shift = edit.shift + edit.factor * bias
            edit.factor = edit.factor * gain
        for name in step.branches:
            edit = edits[name]
            edit.factor, edit.shift = edit.factor / step.scale, edit.shift / step.scale
            edit.bias = (edit.bias + step.branch_bias.to(edit.bias.device)) / step.scale
            edit.scale *= step.scale
        for name in step.next_norms:
            norm, key = plan.modules[name], eps_name(plan.modules[name])
            assert key is not None  # checked by the plan
            setattr(norm, key, getattr(norm, key) / step.scale**2)
            norm.__dict__[ADJUSTED_EPS] = True
    bar = tqdm(edits.items(), desc="folding", unit="layer", **SLOW_BAR)
    added = [name for name, edit in bar if _write_layer(name, plan.modules[name], edit, change)]
    for name in plan.steps:
        info, module = plan.infos[name], plan.modules[name]
        for key, value in ((info.gain_name, 1.0 - info.gain_offset), (info.bias_name, 0.0)):
            if key is not None:
                change.keep(getattr(module, key))
                getattr(module, key).fill_(value)
    return added


def _begin(module: Any) -> _Edit:
    """Return the edit that changes nothing."""
    inputs = torch.ones(num_inputs(module), dtype=torch.float64, device=module.weight.device)
    return _Edit(inputs, torch.zeros_like(inputs), inputs.new_zeros(_rows(module).shape[:2].numel()))


def _rows(module: Any) -> Tensor:
    """Return a view of the weight as (groups, outputs of a group, inputs of a group, kernel)."""
    weight: Tensor = module.weight.detach()
    weight, groups = weight.T if isinstance(module, Conv1D) else weight, getattr(module, "groups", 1)
    return weight.view(groups, len(weight) // groups, weight.shape[1], -1)


def _write_layer(name: str, module: Any, edit: _Edit, change: Change) -> bool:
    """Apply an edit, in blocks of rows. Return whether the layer got a bias that it lacked."""
    weight, old = _rows(module), module.bias
    factor, shift = (value.view(len(weight), 1, -1, 1) for value in (edit.factor, edit.shift))
    moved = []
    for part in torch.split(weight, max(_BLOCK // weight[:, :1].numel(), 1), dim=1):
        wide = part.double()
        moved.append((wide * shift).sum((2, 3)))
        new = _finite(name, wide * factor, part.dtype)
        change.keep(part, new, lambda x: (x.double() / factor).to(x.dtype))
        part.copy_(new)
    bias = edit.bias + torch.cat(moved, 1).flatten()
    if old is not None:
        change.keep(old)
        old.copy_(_finite(name, bias + old.detach().double() / edit.scale, old.dtype))
    elif bool(bias.any()):
        module.bias = nn.Parameter(_finite(name, bias, weight.dtype), requires_grad=module.weight.requires_grad)
        module.__dict__[ADDED_BIAS] = True
        return True
    return False


def _finite(name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values rounded to `dtype`. Raise RuntimeError if they are not finite there."""
    values = values.to(dtype)
    if not bool(values.sum(dtype=torch.float64).isfinite()):
        raise RuntimeError(f"folding into {name} overflows {dtype}: fold in float32, and look for NaN in its weights")
    return values
