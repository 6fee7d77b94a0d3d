"""Keep the norm that a swapped norm replaced, and find its learned gain and bias."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .modeling_adanorm import SwappedNorm, is_swapped

_KEY = "_adanorm_replaced"
GIVEN_EPS = "_adanorm_given_eps"  # in the __dict__ of a swapped norm whose eps `patch_model` was given
_GAINS, _BIASES = ("dyt_gain", "gain", "weight"), ("dyt_bias", "bias")


@dataclass
class Replaced:
    """A replaced norm. It is no submodule: it has no part in the state dict, and moves only when it is put back."""

    module: nn.Module
    has_values: bool = False
    """Whether its gain and bias are those of the model. After a reload they are not."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Replaced:
        return Replaced(copy.deepcopy(self.module, memo), self.has_values)

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickle holds no tensors of the replaced norm, only its class and attributes.
        memo: dict[int, Any] = {
            id(p): nn.Parameter(p.to("meta"), requires_grad=p.requires_grad) for p in self.module.parameters()
        }
        return Replaced, (copy.deepcopy(self.module, memo),)


def remember(new: nn.Module, source: nn.Module, has_values: bool = False) -> None:
    """Keep `source` beside `new`, or what `source` itself replaced."""
    new.__dict__[_KEY] = source.__dict__.get(_KEY) if is_swapped(source) else Replaced(source, has_values)


def replaced_by(module: nn.Module) -> Replaced | None:
    """Return what `module` replaced; None for a norm that was put in by hand."""
    return module.__dict__.get(_KEY)


def source_of(module: nn.Module) -> nn.Module | None:
    """Return the norm that `module` replaced; None for a norm that was put in by hand."""
    return getattr(replaced_by(module), "module", None)


def learned_affine(norm: SwappedNorm) -> dict[str, Tensor]:
    """Return the "gain" and the "bias" that a swapped norm has learned, if any, each of its normalized_shape."""
    named = dict(norm.inner.named_parameters(recurse=False))
    size = math.prod(norm.normalized_shape)
    found: dict[str, Tensor] = {}
    for key, names in (("gain", _GAINS), ("bias", _BIASES)):
        held = [named[name] for name in names if name in named and named[name].numel() == size]
        found |= {key: held[0]} if held else {}
    return found
