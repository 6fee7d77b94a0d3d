"""Counts the mean-subtracting norms of a model by running it, independently of `hf_adanorm.detection`.

During one real forward pass every call of `F.layer_norm` is attributed to the module that made it, and every small
module whose output has the shape of its input is noted. Each of those is then called once more with its own
parameters, on random rows with different means and scales. It subtracts the mean if its output is, per channel, an
affine function of the rows' (x - mean) / std and not of the rows themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

__all__ = ["census"]


_SMALL = 4  # modules, itself included: a norm may hold an activation or a quantizer


class _LayerNormCalls(TorchFunctionMode):
    """Notes which module is innermost when `torch.nn.functional.layer_norm` is called."""

    def __init__(self, stack: list[nn.Module]) -> None:
        super().__init__()
        self.stack = stack
        self.callers: dict[int, nn.Module] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("layer_norm", "native_layer_norm") and self.stack:
            self.callers[id(self.stack[-1])] = self.stack[-1]
        return func(*args, **(kwargs or {}))


def census(model: nn.Module, call: Any) -> tuple[set[str], set[str]]:
    """Names of the modules that subtract a mean and normalize, and of all small modules that `call()` ran.

    A module around another that does so is not counted a second time.
    """
    stack: list[nn.Module] = []
    seen: dict[int, tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = {}

    def before(module: nn.Module, args: Any) -> None:
        stack.append(module)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        stack.pop()
        if (
            id(module) in seen
            or sum(1 for _ in module.modules()) > _SMALL
            or not args
            or not isinstance(args[0], Tensor)
        ):
            return
        result = output[0] if isinstance(output, tuple) and output else output
        if isinstance(result, Tensor) and result.shape == args[0].shape and result.is_floating_point():
            seen[id(module)] = (module, args, {})

    mode = _LayerNormCalls(stack)
    handles = [register_module_forward_pre_hook(before), register_module_forward_hook(after, always_call=True)]
    try:
        with mode, torch.no_grad():
            call()
    finally:
        for handle in handles:
            handle.remove()
    names = {id(module): name for name, module in model.named_modules()}
    found = {names[key] for key in mode.callers if key in names}
    with torch.no_grad():
        found |= {
            names[key] for key, (module, args, _) in seen.items() if key in names and _subtracts_mean(module, args)
        }
    found = {name for name in found if not any(other.startswith(f"{name}.") for other in found)}
    return found, {names[key] for key in (*seen, *mode.callers) if key in names}


def _subtracts_mean(module: nn.Module, args: tuple[Any, ...]) -> bool:
    generator = torch.Generator().manual_seed(0)
    for shape in dict.fromkeys(((6, *args[0].shape[1:]), (6 * args[0].shape[0], *args[0].shape[1:]), args[0].shape)):
        if args[0].ndim < 2:
            return False
        x = torch.randn(shape, generator=generator)
        means = torch.randn((*shape[:1], *(1 for _ in shape[1:])), generator=generator)
        scales = 1 + 3 * torch.rand((*shape[:1], *(1 for _ in shape[1:])), generator=generator)
        x = ((x + 2 * means) * scales * 5).to(args[0].dtype)
        try:
            y = module.forward(x, *args[1:])
        except Exception:
            continue
        y = y[0] if isinstance(y, tuple) else y
        if not isinstance(y, Tensor) or y.shape != x.shape:
            continue
        return any(_is_affine_of_normalized(x, y, axis) for axis in {1, x.ndim - 1} if x.shape[axis] > 2)
    return False


def _is_affine_of_normalized(x: Tensor, y: Tensor, axis: int) -> bool:
    rows = x.double().movedim(axis, -1).reshape(-1, x.shape[axis])
    out = y.double().movedim(axis, -1).reshape(-1, x.shape[axis])
    if rows.shape[0] < 4 or float(out.std()) == 0:
        return False
    centered = rows - rows.mean(-1, keepdim=True)
    normalized = centered / centered.square().mean(-1, keepdim=True).sqrt()
    rms = rows / rows.square().mean(-1, keepdim=True).sqrt()
    residual = _misfit(normalized, out)
    return residual < 1e-3 and _misfit(rows, out) > 10 * residual + 1e-3 and _misfit(rms, out) > 10 * residual + 1e-3


def _misfit(n: Tensor, y: Tensor) -> float:
    """Return the residual of a per-channel line through (n, y), relative to the spread of y."""
    n, y = n - n.mean(0), y - y.mean(0)
    slope = (n * y).sum(0) / n.square().sum(0).clamp_min(1e-30)
    return float((y - slope * n).square().mean().sqrt() / y.square().mean().sqrt().clamp_min(1e-30))
