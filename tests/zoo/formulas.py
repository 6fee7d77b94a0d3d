"""The norms' formulas in float64, written from the paper, and helpers that compare a norm with them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_adanorm import modeling_adanorm

H = 24
SIMPLE = ("layernorm-simple", {})
ADANORM = ("adanorm", {"C": 1.3, "k": 0.07})
DETACHED = ("detachnorm", {})
MEAN_DETACHED = ("detachnorm", {"detach_variance": False})
VARIANCE_DETACHED = ("detachnorm", {"detach_mean": False})
NORMS = [SIMPLE, ADANORM, DETACHED, MEAN_DETACHED, VARIANCE_DETACHED]
IDS = ["simple", "adanorm", "detach", "detach-mean", "detach-variance"]


def make(norm, shape=H, eps=1e-3, **kwargs) -> nn.Module:
    name, arguments = norm
    return modeling_adanorm.NORM_CLASSES[name](shape, eps=eps, **arguments, **kwargs)


def reference(norm, x: Tensor, dims, eps: float, centered: bool = True) -> Tensor:
    """Return the paper's definitions, word for word: section 2.1 for N, 3.2 for DetachNorm, 4.2 for AdaNorm."""
    name, arguments = norm
    mu = x.mean(dims, keepdim=True) if centered else torch.zeros((), dtype=x.dtype)
    sigma = ((x - mu) ** 2).mean(dims, keepdim=True).add(eps).sqrt()
    if name == "detachnorm":
        mu = mu.detach() if arguments.get("detach_mean", True) else mu
        sigma = sigma.detach() if arguments.get("detach_variance", True) else sigma
    y = (x - mu) / sigma
    if name == "adanorm":
        phi = arguments["C"] * (1 - arguments["k"] * y)
        return phi.detach() * y
    return y


def random(*size: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def derivatives(function, x: Tensor, dz: Tensor, v: Tensor) -> list[Tensor]:
    """Return output, gradient, and the gradient of <gradient, v> with respect to x and to dz."""
    x, dz = leaf(x), leaf(dz)
    z = function(x)
    (dx,) = torch.autograd.grad(z, x, dz, create_graph=True)
    second = torch.autograd.grad((dx * v).sum(), (x, dz), allow_unused=True)
    return [z, dx, *(torch.zeros_like(x) if g is None else g for g in second)]


def ulps(value: Tensor, exact: Tensor) -> float:
    """Return the largest error in units in the last place of the exact value's binade."""
    info = torch.finfo(value.dtype)
    exponent = torch.floor(torch.log2(exact.abs().clamp_min(info.tiny)))
    return ((value.double() - exact).abs() / (2.0**exponent * info.eps)).max().item()


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Return the bytes that a forward pass keeps for the backward pass; shared storage counts once."""
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x)
    return sum(saved.values())
