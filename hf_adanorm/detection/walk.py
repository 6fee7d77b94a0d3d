"""Recognize norm modules of any architecture by what they compute.

Names do not suffice: `T5LayerNorm` is an RMSNorm, `NoNorm` does not normalize, `ConvNextLayerNorm` works on either
layout. A candidate is a small module with parameters shaped like a gain and a bias, or with a class named like a norm.
A copy of each candidate runs on random input (see `probe.py`), and its output is compared with

    y = a * (x - mean) / sqrt(var + eps) + b        LayerNorm
    y = a * x / sqrt(mean(x^2) + eps) + b           RMSNorm

over the trailing axes or over axis 1. `nn.LayerNorm`, `nn.RMSNorm` and subclasses that keep their forward need no run,
and large modules are never run. A module that is named like a norm and computes neither formula gets `kind="other"`
and a reason.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hf_adanorm.modeling_adanorm import is_swapped

from .probe import (
    MAX_NUMEL,
    NormInfo,
    extra_inputs,
    is_sizes,
    other,
    own_forward,
    probe,
    reason_for_other,
    source_class,
    tensor_shapes,
)


def recognize(module: nn.Module, name: str = "") -> NormInfo | None:
    """Return what norm `module` computes, or None if nothing about it is norm-like.

    `name` is its name in the model, if known. A module without parameters counts if its class, or the attribute that
    holds it, is named like a norm.
    """
    return _recognize(module, name, {})


def check_module(model: object, name: str = "model") -> None:
    """Raise TypeError unless `model` is a module. `name` is the caller's name for it."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {type(model).__name__}")


def iter_norms(model: nn.Module) -> Iterator[tuple[str, nn.Module, NormInfo]]:
    """Yield `(name, module, info)` for everything norm-like in `model`, in the order of `named_modules`.

    Swapped norms are included, and what is inside them is not. Norms inside a conditioned norm carry its name in
    `info.inside`. A module with several parents comes once, under its first name.
    """
    cache: dict[Any, NormInfo | None] = {}
    conditioned = ""  # name of the conditioned norm that contains the current module
    label = ""
    inside_swapped: str | None = None  # how the names of what is inside the last swapped norm begin
    for name, module in model.named_modules():
        if inside_swapped is not None and name.startswith(inside_swapped):
            continue
        if is_swapped(module):
            inside_swapped = f"{name}." if name else ""
        info = _recognize(module, name, cache)
        if info is None:
            continue
        if conditioned and name.startswith(conditioned + "."):
            info = replace(info, inside=label)
        elif _is_conditioned(module, cache):
            conditioned, label = name, f"{name} ({type(module).__name__})"
        yield name, module, info


# --- which modules are looked at ----------------------------------------------------------------------------

_NORM_LIKE = re.compile(r"(?i:norm(?!al(?!i[sz]))|cmvn|standardi[sz])|(?:^|[a-z0-9_])LN(?=$|[A-Z0-9_])|^ln_?\w*$")
"""Somewhere in a class or attribute name: "norm" (but not "normal"), "LN", "ln_1", "CMVN" (speech features)."""
_NORM_ENDING = re.compile(
    r"norm(alization)?_?(\dd|1p|gated|zero|single|continuous|final|layer|act|_)*$", re.IGNORECASE
)
"""A class name that says that the module is a norm, not that it contains one."""
_OTHER_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LocalResponseNorm, nn.CrossMapLRN2d)


def _recognize(module: nn.Module, name: str, cache: dict[Any, NormInfo | None]) -> NormInfo | None:
    if is_swapped(module):
        return _of_swapped(module)
    cls = source_class(module)
    if isinstance(module, _OTHER_NORMS):
        return other(reason_for_other(module))
    if cls.__module__.startswith("torch.") and not isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return None  # torch's own modules have no further norms
    if (info := _of_torch_norm(module)) is not None:
        return info
    children = [child for key, child in module._modules.items() if child is not None and key != "parametrizations"]
    named = bool(_NORM_LIKE.search(cls.__name__)) or hasattr(module, "normalized_shape")
    if any(True for child in children for _ in child.parameters()) or (
        named and any(_recognize(child, "", cache) for child in children)
    ):
        return _of_container(module, cache) if named else None
    if not (named or _NORM_LIKE.search(name.rpartition(".")[2])) and not _has_affine_shape(module):
        return None
    if sum(math.prod(shape) for shape in tensor_shapes(module).values()) > MAX_NUMEL:
        return None
    key = _cache_key(module)
    if key not in cache:
        info = replace(probe(module), parametrized=parametrize.is_parametrized(module))
        claims = bool(_NORM_ENDING.search(cls.__name__)) or hasattr(module, "normalized_shape")
        is_near = info.kind != "other" or info.reason.startswith(("close to", "LayerNorm", "RMSNorm"))
        cache[key] = info if claims or is_near else None
    return cache[key]


def _of_swapped(module: Any) -> NormInfo:
    return NormInfo(
        kind="layernorm" if module.centered else "rmsnorm",
        normalized_shape=tuple(module.normalized_shape),
        eps=module.eps,
        channels_first=module.channels_first,
    )


def _of_torch_norm(module: nn.Module) -> NormInfo | None:
    """Describe an `nn.LayerNorm`, an `nn.RMSNorm` or a subclass that keeps forward, without running it; else None.

    Sizes come from `normalized_shape`: under ZeRO-3 or FSDP the parameters' own shapes are empty or flat.
    """
    cls: Any = type(module)
    is_layernorm = isinstance(module, nn.LayerNorm) and cls.forward is nn.LayerNorm.forward
    is_rmsnorm = isinstance(module, nn.RMSNorm) and cls.forward is nn.RMSNorm.forward
    if not (is_layernorm or is_rmsnorm) or own_forward(module) is not None:
        return None
    if any(isinstance(module.__dict__.get(key), Tensor) for key in ("weight", "bias")):  # it is no parameter then
        return other("its weight is computed from other parameters (weight_norm, spectral_norm or the like)")
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    eps: float | None = module.eps  # type: ignore[assignment]
    if eps is None:  # nn.RMSNorm's default
        eps = torch.finfo(weight.dtype if isinstance(weight, Tensor) else torch.get_default_dtype()).eps
    return NormInfo(
        kind="layernorm" if is_layernorm else "rmsnorm",
        normalized_shape=tuple(module.normalized_shape),  # type: ignore[arg-type]
        eps=float(eps),
        gain_name=None if weight is None else "weight",
        bias_name=None if bias is None else "bias",
        parametrized=parametrize.is_parametrized(module),
    )


def _of_container(module: nn.Module, cache: dict[Any, NormInfo | None]) -> NormInfo | None:
    """Describe a module with children that hold parameters; it is never run.

    A norm inside is listed instead of it, except that a conditioned norm is listed, too.
    """
    if _is_conditioned(module, cache):
        return other(f"a conditioned norm: gain and bias are computed from {', '.join(extra_inputs(module))}")
    inside = list(module.modules())[1:]
    if not _NORM_ENDING.search(type(module).__name__) or len(inside) > 11:
        return None
    return None if any(_recognize(child, "", cache) for child in inside) else other(reason_for_other(module))


def _is_conditioned(module: nn.Module, cache: dict[Any, NormInfo | None]) -> bool:
    """Return whether the class is named like a norm, holds a norm and a linear layer, and takes further inputs."""
    children = list(module.children())
    if not children or not _NORM_LIKE.search(type(module).__name__) or not extra_inputs(module):
        return False
    if not any(hasattr(child, "in_features") and hasattr(child, "out_features") for child in children):
        return False
    infos = (_recognize(child, "", cache) for child in children)
    return any(info is not None and info.kind != "other" for info in infos)


def _has_affine_shape(module: nn.Module) -> bool:
    """Return whether it has one or two one-dimensional parameters of one size: a gain, perhaps a bias."""
    shapes = [shape for name, shape in tensor_shapes(module).items() if name not in module._buffers]
    return 1 <= len(shapes) <= 2 and len(set(shapes)) == 1 and len(shapes[0]) == 1 and shapes[0][0] > 1


def _cache_key(module: nn.Module) -> Any:
    """Return a key of everything that can make two modules of a class compute different things.

    Ids stay valid while the model is walked, which is as long as the cache lives.
    """
    simple = (int, float, str, bool, type(None), torch.dtype)
    attributes = tuple(
        (key, value if isinstance(value, simple) else tuple(value) if is_sizes(value) else id(value))
        for key, value in sorted(module.__dict__.items())
        if not (key.startswith("_") and isinstance(value, (dict, set))) and key != "training"
    )
    return type(module), attributes, tuple(sorted(tensor_shapes(module).items()))
