"""Decide whether a kernel computes a norm, and connect it to autograd.

A norm is bound by memory. Built from torch's operators it reads and writes the activations about twice as often as one
loop does. `run` computes in eager mode, for the devices in `BACKENDS` and the inputs that their backend supports. It
declines wherever operations are recorded or transformed (torch.compile, export, tracing, torch.func, forward-mode
derivatives), so that these modes see the plain formula.

A backend is a module with `supports`, `forward` and `backward`, as in `cpu`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hf_adanorm.modeling_adanorm import HALF, output_dtype

BACKENDS: dict[str, Any] = {}  # by type of device
FEW_ELEMENTS = 2**15


class Arguments(NamedTuple):
    """What a kernel computes: z = C (1 - k y) y with y = (x - mean(x)) / sqrt(var(x) + eps) over the last axis."""

    eps: float
    C: float = 1.0
    k: float = 0.0
    centered: bool = True
    """False computes y = x / sqrt(mean(x^2) + eps)."""
    detach_mean: bool = False
    """Whether the mean is a constant in the backward pass."""
    detach_std: bool = False


# C functions, called in every forward pass: on a small input a few lines of Python take as long as the norm itself.
_is_tracing = torch._C._is_tracing
_num_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
_is_legacy_batch = torch._C._functorch.is_legacy_batchedtensor
_unwrap_dead = torch._C._functorch.unwrap_if_dead


def is_recorded(x: Tensor) -> bool:
    """Return whether operations on `x` are recorded or transformed."""
    return (
        type(x) is not Tensor
        or torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or bool(_num_dispatch_modes() or _is_tracing() or _functorch_active() or _is_legacy_batch(x))
    )


def torch_is_faster(x: Tensor) -> bool:
    """Return whether F.layer_norm without gain costs less than the Python that autograd calls for a kernel."""
    return x.numel() < FEW_ELEMENTS and x.dtype not in HALF


def run(norm: Any, x: Tensor) -> Tensor | None:
    """Return the output of `norm` for `x`, channels last, or None to decline."""
    if is_recorded(x):
        return None
    with_backward = x.requires_grad and torch.is_grad_enabled()
    if with_backward and norm.norm_name == "layernorm-simple" and norm.centered and torch_is_faster(x):
        return None
    backend = BACKENDS.get("cpu" if x.is_cpu else x.device.type)  # building that string takes longer than the question
    dtype = output_dtype(x) if x.dtype in HALF else x.dtype
    if backend is None or not backend.supports(x, norm.normalized_shape, dtype):
        return None
    arguments = ARGUMENTS[norm.norm_name](norm)
    if with_backward:
        return cast(Tensor, _apply(_unwrap_dead(x), dtype, arguments, backend))
    return cast(Tensor, backend.forward(x, dtype, arguments, False)[0])


ARGUMENTS: dict[str, Callable[[Any], Arguments]] = {
    "layernorm-simple": lambda norm: Arguments(norm.eps, centered=norm.centered),
    "adanorm": lambda norm: Arguments(norm.eps, norm.C, norm.k, norm.centered),
    "detachnorm": lambda norm: Arguments(norm.eps, 1.0, 0.0, norm.centered, norm.detach_mean, norm.detach_variance),
}


class _Fused(torch.autograd.Function):
    """Saves the input and the rows' statistics, or only the latter where the backward pass does not need the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, arguments: Arguments, backend: Any) -> Tensor:
        ctx.arguments, ctx.backend, ctx.dtype = arguments, backend, x.dtype
        z, stats = backend.forward(x, dtype, arguments, True)
        if arguments.detach_std and arguments.k == 0.0:
            ctx.save_for_backward(stats)
        else:
            ctx.save_for_backward(stats, x)
        return cast(Tensor, z)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        stats, *saved = ctx.saved_tensors
        x = saved[0] if saved else None
        compute = written_backward if torch.is_grad_enabled() or is_recorded(dz) else ctx.backend.backward
        return compute(dz, x, stats, ctx.arguments, ctx.dtype), None, None, None


# `apply` without its checks for functorch, which take as long as a small input: `run` made them.
_apply: Any = super(torch.autograd.Function, _Fused).apply


def written_backward(dz: Tensor, x: Tensor | None, stats: Tensor, arguments: Arguments, dtype: torch.dtype) -> Tensor:
    """Return dl/dx (of `dtype`) from dl/dz by torch's operators, to be differentiated again, batched or traced.

    With dy = phi(y) dz, where phi is a constant, dx = (dy - mean(dy) - y mean(dy y)) / std. The second term comes from
    the mean and the third from the standard deviation.
    """
    eps, C, k, centered, detach_mean, _ = arguments
    dy = dz.float() if dz.dtype in HALF else dz
    if x is None:  # the standard deviation is a constant, and so is phi
        rstd = stats[0].view(*dz.shape[:-1], 1)
        return ((dy if detach_mean or not centered else dy - dy.mean(-1, keepdim=True)) * rstd).to(dtype)
    wide = x.float() if x.dtype in HALF else x
    mean = wide.mean(-1, keepdim=True) if centered else torch.zeros_like(wide[..., :1])
    rstd = torch.rsqrt((wide - mean).square().mean(-1, keepdim=True) + eps)
    y = (wide - mean) * rstd
    dy = dy * (C - (C * k) * y.detach())
    # The derivative of the variance knows the mean also where the norm takes the mean for a constant.
    projected = (dy * ((wide - mean.detach()) * rstd if detach_mean else y)).mean(-1, keepdim=True)
    dx = dy - y * projected
    return ((dx if detach_mean or not centered else dx - dy.mean(-1, keepdim=True)) * rstd).to(dtype)
