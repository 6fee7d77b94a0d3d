"""Find the formula that a module computes by running a copy of it. The module itself is never run or changed.

The copy gets random float32 parameters, and runs on the CPU, or on the module's own device if its code needs that.
Global random state, autocast and default devices have no effect. A least-squares fit of the output to the normalized
input gives gain and bias per channel, which are matched with the parameters by value. The eps is measured on inputs
of ever smaller variance.
"""

from __future__ import annotations

import copy
import inspect
import math
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

MAX_NUMEL = 1 << 20
"""Modules with more parameters than this are not run."""


@dataclass(frozen=True, kw_only=True)
class NormInfo:
    """What a norm module computes."""

    kind: Literal["layernorm", "rmsnorm", "other"]
    """`"layernorm"` subtracts the mean, `"rmsnorm"` does not, `"other"` is skipped for `reason`."""
    normalized_shape: tuple[int, ...] = ()
    """Sizes of the normalized axes, e.g. `(768,)`; empty for `"other"`."""
    eps: float = 0.0
    """The eps in effect (inside the root), which need not be an attribute of the module."""
    channels_first: bool = False
    """Axis 1 is normalized (N, C, ...) instead of the trailing axes."""
    gain_offset: float = 0.0
    """1.0 where the gain applied is 1 + weight."""
    gain_name: str | None = None
    """Name of the parameter or buffer that is the gain, usually `"weight"`; None without a gain."""
    bias_name: str | None = None
    """Name of the parameter or buffer that is the bias."""
    parametrized: bool = False
    """Whether it is under `torch.nn.utils.parametrize`. Replacing it would drop the parametrization."""
    inside: str = ""
    """Name and class of the conditioned norm this one is part of, e.g. `"block.0.norm1 (AdaLayerNorm)"`."""
    reason: str = ""
    """Why a module of kind `"other"` is not one of the two formulas."""


def other(reason: str) -> NormInfo:
    """Describe a module that is not one of the two formulas."""
    return NormInfo(kind="other", reason=reason)


def own_forward(module: nn.Module) -> Any:
    """Return a forward set on the instance, but not one of accelerate's hooks, which keep the original; or None."""
    if "_hf_hook" in module.__dict__:
        original = module.__dict__.get("_old_forward")
        same = getattr(original, "__func__", None) is type(module).forward
        return None if same else original
    return module.__dict__.get("forward")


def extra_inputs(module: nn.Module) -> list[str]:
    """Return the names of the inputs of forward after the first."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    return [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)][2:]  # without self


def reason_for_other(module: nn.Module) -> str:
    """Describe what a module that is named like a norm computes instead."""
    name = type(module).__name__.lower()
    if isinstance(module, nn.GroupNorm) or "groupnorm" in name:
        return "a group norm: statistics over groups of channels and all positions"
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return "an instance norm: statistics over positions"
    if isinstance(module, nn.modules.batchnorm._NormBase) or "batchnorm" in name:
        return "a batch norm: statistics over the batch, or stored ones"
    if isinstance(module, (nn.LocalResponseNorm, nn.CrossMapLRN2d)):
        return "a local response norm"
    if extra := extra_inputs(module):
        return f"its forward takes further inputs ({', '.join(extra)})"
    return "it does not compute LayerNorm or RMSNorm"


def probe(module: nn.Module) -> NormInfo:
    """Run a copy with random parameters and return the formula that it computes."""
    if extra_inputs(module):
        return other(reason_for_other(module))
    own = own_forward(module)
    if own is not None and getattr(own, "__self__", None) is not module:
        return other("its forward was replaced on this instance")
    tensors = (*module.parameters(), *module.buffers())
    own_device = next((t.device for t in tensors if t.device.type not in ("cpu", "meta")), None)
    info, error = _probe_on(module, torch.device("cpu"))
    if info is None and own_device is not None:  # kernels that only exist there
        info, error = _probe_on(module, own_device)
    if info is None:
        return other(
            f"unrecognized: its forward on random input raised {error}" if error else reason_for_other(module)
        )
    return info


def _probe_on(module: nn.Module, device: torch.device) -> tuple[NormInfo | None, str | None]:
    """Return the formula and None, or None and the first error if no input worked."""
    generator = torch.Generator().manual_seed(0)
    cuda = [device] if device.type == "cuda" else []
    error: str | None = None
    with (
        torch.random.fork_rng(devices=cuda),
        torch.no_grad(),
        torch.device(device),
        torch.autocast(device.type, enabled=False),
    ):
        clone = _random_copy(module, device, generator)
        ran = False
        for shape, first, last in _layouts(module):
            x = _random_rows(shape, generator).to(device)
            try:
                y = clone.forward(x)
            except Exception as e:  # user code: whatever it raises is the reason
                error = error or f"{type(e).__name__}: {str(e)[:120]}"
                continue
            ran = True
            if isinstance(y, Tensor) and y.shape == x.shape and (info := _match(clone, x, y, first, last)):
                return info, None
    return None, None if ran else error


def _random_copy(module: nn.Module, device: torch.device, generator: torch.Generator) -> Any:
    """Return a copy without hooks, with random float32 parameters (0.5 .. 1.5). The source may be on meta."""
    cls: Any = source_class(module)
    clone = cls.__new__(cls)
    nn.Module.__init__(clone)
    skip = {"forward", "_old_forward", "_hf_hook", *clone.__dict__}
    for key, value in module.__dict__.items():
        if key in skip:
            continue
        try:
            clone.__dict__[key] = copy.deepcopy(value)
        except Exception:  # e.g. a handle that cannot be copied: share it
            clone.__dict__[key] = value
    shapes = tensor_shapes(module)
    sizes = {shape for key, shape in shapes.items() if key not in module._buffers}
    clone._parameters.update(dict.fromkeys(module._parameters))
    clone._buffers.update(dict.fromkeys(module._buffers))
    for key, shape in shapes.items():
        buffer = module._buffers.get(key)
        if buffer is not None and (shape not in (sizes or {shape}) or not buffer.is_floating_point()):
            value = torch.ones_like(buffer, device=device) if buffer.is_meta else buffer.detach().to(device).clone()
        else:
            value = (torch.rand(shape, generator=generator, device="cpu") + 0.5).to(device)
        if buffer is not None:
            clone._buffers[key] = value
        else:
            clone._parameters[key] = nn.Parameter(value, requires_grad=False)
    for key, child in module._modules.items():
        if key != "parametrizations":
            clone._modules[key] = None if child is None else _random_copy(child, device, generator)
    clone.training = False
    if (own := own_forward(module)) is not None:
        clone.__dict__["forward"] = types.MethodType(own.__func__, clone)
    return clone


def _widths(module: nn.Module) -> list[tuple[int, ...]]:
    """Return the shapes that this module may normalize, the likeliest first."""
    found: list[tuple[int, ...]] = []
    declared: Any = getattr(module, "normalized_shape", None)
    if isinstance(declared, int):
        declared = (declared,)
    if declared is not None and is_sizes(tuple(declared)):
        found.append(tuple(declared))
    found += [shape for shape in tensor_shapes(module).values() if 1 <= len(shape) <= 3]
    if not found:
        found += [(v,) for v in module.__dict__.values() if type(v) is int and v > 1][:3]
    return [s for s in dict.fromkeys(found) if math.prod(s) > 1 and math.prod(s) <= MAX_NUMEL]


def _layouts(module: nn.Module) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """Yield the input shapes to try, each with the range of axes [first, last) that carries the gain."""
    for size in _widths(module):
        a, b, c = [n for n in (5, 4, 3, 6, 7, 8) if n not in size][:3]
        k = len(size)
        yield (a, b, *size), 2, 2 + k
        yield (a, c, b, *size), 3, 3 + k
        yield (a * b, *size), 1, 1 + k
        if k == 1:
            yield (a, *size, b), 1, 2
            yield (a, *size, b, c), 1, 2
    if not _widths(module):  # any width shows what it computes
        yield (5, 4, 7), 2, 3


def _random_rows(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return rows of different mean and scale, so large that no sensible eps has an effect."""
    x = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
    offset = torch.randn((*shape[:1], *(1 for _ in shape[1:])), generator=generator, device="cpu")
    scale = 100 * (1 + torch.rand((*shape[:2], *(1 for _ in shape[2:])), generator=generator, device="cpu"))
    return (x + 0.7 * offset + 0.5) * scale


def _normalized(x: Tensor, axes: tuple[int, ...], centered: bool) -> tuple[Tensor, Tensor]:
    """Return x over its root mean square along `axes`, in float64, and the mean square."""
    x = x.double()
    if centered:
        x = x - x.mean(axes, keepdim=True)
    square = x.square().mean(axes, keepdim=True)
    return x / square.sqrt(), square


def _match(clone: Any, x: Tensor, y: Tensor, first: int, last: int) -> NormInfo | None:
    """Fit y = a * N(x) + b for each choice of normalized axes; axes [first, last) carry `a` and `b`."""
    y = y.double()
    scale = max(1.0, float(y.abs().max()))
    rows = [i for i in range(x.ndim) if not first <= i < last]
    for count in range(last - first, 0, -1):
        axes = tuple(range(last - count, last))
        for centered in (True, False):
            n, _ = _normalized(x, axes, centered)
            n_mean, y_mean = n.mean(rows, keepdim=True), y.mean(rows, keepdim=True)
            a = ((n - n_mean) * (y - y_mean)).sum(rows, keepdim=True) / (n - n_mean).square().sum(rows, keepdim=True)
            b = y_mean - a * n_mean
            if not bool(((a * n + b - y).abs() <= 2e-4 * scale).all()):
                continue
            size = tuple(x.shape[first:last])
            formula = "LayerNorm" if centered else "RMSNorm"
            if count < last - first:
                return other(f"a multi-head {formula}: over the last axis of {size}, with a gain for all")
            return _describe(clone, x, a, b, axes, centered)
    return None


def _describe(clone: Any, x: Tensor, a: Tensor, b: Tensor, axes: tuple[int, ...], centered: bool) -> NormInfo:
    """Match the fitted gain and bias with the parameters, measure eps, and describe the norm."""
    size = tuple(x.shape[i] for i in axes)
    formula = "LayerNorm" if centered else "RMSNorm"
    gain_name = bias_name = None
    offset = 0.0
    fitted = [t.double().reshape(size) for t in (a, b)]
    tensors = (*clone.named_parameters(recurse=False), *clone.named_buffers(recurse=False))
    own = {name: tensor.double() for name, tensor in tensors if tuple(tensor.shape) == size}

    def close(left: Tensor, right: Tensor | float) -> bool:
        return bool(((left - right).abs() < 2e-3).all())

    for key, value in own.items():
        if close(fitted[0], value):
            gain_name = key
        elif close(fitted[0], 1 + value):
            gain_name, offset = key, 1.0
        if close(fitted[1], value):
            bias_name = key
    if gain_name is None and not close(fitted[0], 1.0):
        return other(f"close to {formula}, but it scales by something else than its gain")
    if bias_name is None and not close(fitted[1], 0.0):
        return other(f"close to {formula}, but it adds something else than its bias")
    if not _widths(clone):
        return other(f"{formula} over the last axis, but it does not know the axis' size")
    eps = _find_eps(clone, x, a, b, axes, centered)
    if eps is None:
        return other(f"close to {formula}, but its eps is not added to the variance")
    return NormInfo(
        kind="layernorm" if centered else "rmsnorm",
        normalized_shape=size,
        eps=eps,
        channels_first=axes[-1] != x.ndim - 1,
        gain_offset=offset,
        gain_name=gain_name,
        bias_name=bias_name,
    )


def _find_eps(clone: Any, x: Tensor, a: Tensor, b: Tensor, axes: tuple[int, ...], centered: bool) -> float | None:
    """Return the eps of y = a * d / sqrt(v + eps) + b from inputs of mean square v near eps; None for other formulas.

    If r is the shrinkage of y compared with the norm without eps, r^2 = v / (v + eps), so eps = v * (1 / r^2 - 1).
    """
    unit = _normalized(x, axes, centered=True)[0]
    shift = 0.0 if centered else 0.3  # an RMSNorm works at any mean

    def measure(mean_square: float) -> float:
        small = ((unit + shift) * math.sqrt(mean_square / (1 + shift * shift))).to(x)
        n, v = _normalized(small, axes, centered)
        r = ((clone.forward(small).double() - b) / a * n).mean() / n.square().mean()
        return float(v.mean() * (1 / r.square() - 1)) if float(r) > 0 else math.nan

    for exponent in range(0, -17, -2):
        v = 10.0**exponent
        eps = measure(v)
        if eps > 0.3 * v:  # eps now weighs as much as the variance: the estimate is good to about 1e-6
            break
    else:
        return 0.0
    again = measure(eps * 3)
    if not math.isfinite(eps) or abs(again - eps) > 1e-3 * eps:
        return None
    known = [value for value in clone.__dict__.values() if type(value) is float]
    for value in (*known, float(f"{eps:.1g}"), float(f"{eps:.2g}")):
        if abs(value - eps) <= 1e-3 * eps:
            return value
    return eps


def source_class(module: nn.Module) -> type[nn.Module]:
    """Return the module's class without the subclass that `parametrize` adds."""
    cls = type(module)
    return cls.__mro__[1] if parametrize.is_parametrized(module) else cls


def tensor_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the module's own parameters and buffers. ZeRO-3 keeps the real one in `ds_shape`."""
    tensors: dict[str, Tensor] = {k: v for k, v in module._parameters.items() if v is not None}
    tensors |= {k: v for k, v in module._buffers.items() if v is not None}
    shapes = {k: tuple(getattr(v, "ds_shape", v.shape)) for k, v in tensors.items()}
    if parametrize.is_parametrized(module):
        for key, plist in module.parametrizations.items():  # type: ignore[operator,union-attr]
            original = plist.original if hasattr(plist, "original") else plist.original0
            shapes[key] = tuple(original.shape)
    return shapes


def is_sizes(value: Any) -> bool:
    """Return whether `value` is a tuple or list of integers."""
    return isinstance(value, (tuple, list)) and all(isinstance(v, int) for v in value)
