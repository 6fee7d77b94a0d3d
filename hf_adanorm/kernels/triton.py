"""Compute the norms on a GPU by one Triton kernel for each pass.

A row is read once and written once in either pass: five tensors in all (x, z, x, dz, dx). Off until measured on a GPU:

    from hf_adanorm.kernels import triton
    triton.enable()                  # enable(False) takes it back

With TRITON_INTERPRET=1 the kernels run on a CPU, slowly, for tests.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import fused
from .fused import Arguments

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WIDEST = 16_384  # elements of a row that fit into one load; for wider rows, torch's operators run
_TILE = 2_048  # elements that a program takes at least: several rows, where they are narrow


def enable(on: bool = True) -> None:
    """Compute the norms on CUDA GPUs by these kernels, or by torch's operators again."""
    if on:
        fused.BACKENDS["cuda"] = sys.modules[__name__]
    else:
        fused.BACKENDS.pop("cuda", None)


@triton.jit
def _forward(
    x_ptr, z_ptr, stats_ptr, rows, H, eps, C, k, CENTERED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    j = tl.arange(0, WIDTH)[None, :]
    inside = (row < rows) & (j < H)
    x = tl.load(x_ptr + row * H + j, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1, keep_dims=True) / H if CENTERED else tl.zeros([ROWS, 1], tl.float32)
    d = tl.where(inside, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(d * d, 1, keep_dims=True) / H + eps)
    y = d * rstd
    tl.store(z_ptr + row * H + j, (C - C * k * y) * y, mask=inside)
    tl.store(stats_ptr + row, rstd, mask=row < rows)
    tl.store(stats_ptr + rows + row, mean, mask=row < rows)


@triton.jit
def _backward(
    x_ptr,
    dz_ptr,
    dx_ptr,
    stats_ptr,
    rows,
    H,
    C,
    k,
    through_mean,
    through_std,
    WITH_X: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Compute dx = rstd * (dy - mean(dy) - y * mean(dy * y)), where dy = phi(y) * dz with phi constant.

    The second term comes from the mean and the third from the standard deviation. A factor of 0 treats that one as a
    constant. Without x, phi = 1 and the standard deviation is 1.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    j = tl.arange(0, WIDTH)[None, :]
    inside = (row < rows) & (j < H)
    rstd = tl.load(stats_ptr + row, mask=row < rows, other=0.0)
    dy = tl.load(dz_ptr + row * H + j, mask=inside, other=0.0).to(tl.float32)
    y = tl.zeros_like(dy)
    if WITH_X:
        mean = tl.load(stats_ptr + rows + row, mask=row < rows, other=0.0)
        y = (tl.load(x_ptr + row * H + j, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
        dy = (C - C * k * y) * dy
    mean_dy = tl.sum(dy, 1, keep_dims=True) * (through_mean / H)
    mean_dyy = tl.sum(dy * y, 1, keep_dims=True) * (through_std / H)
    tl.store(dx_ptr + row * H + j, rstd * (dy - mean_dy - y * mean_dyy), mask=inside)


_INTERPRETED = not isinstance(_forward, triton.JITFunction)


def _launch(kernel: Any, x: Tensor, rows: int, H: int, *arguments: Any, **constants: Any) -> None:
    if rows == 0:
        return
    width = max(16, triton.next_power_of_2(H))
    per_program = max(1, _TILE // width)
    warps = min(16, max(4, width * per_program // 512))
    with torch.cuda.device_of(x) if x.is_cuda else contextlib.nullcontext():
        kernel[(triton.cdiv(rows, per_program),)](
            *arguments, ROWS=per_program, WIDTH=width, num_warps=warps, **constants
        )


def supports(x: Tensor, normalized_shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Return whether the kernels serve this input and output dtype: float32, bfloat16, float16, one normalized
    dimension of at most 16,384."""
    return (
        (x.is_cuda or _INTERPRETED)
        and x.dtype in _DTYPES
        and dtype in _DTYPES
        and len(normalized_shape) == 1
        and x.shape[-1:] == normalized_shape
        and normalized_shape[0] <= _WIDEST
        and not x.is_neg()
    )


def forward(x: Tensor, dtype: torch.dtype, arguments: Arguments, with_stats: bool) -> tuple[Tensor, Tensor]:
    """Return z of x's shape and `dtype`, contiguous, and the rows' 1 / std and mean, (2, rows), float32.

    Args:
        x: (*, H), float32, bfloat16 or float16; it is copied if it is not contiguous.
        with_stats: has no effect: the kernel always writes them.
    """
    x = x.contiguous()
    H = x.shape[-1]
    rows, z = x.numel() // H, torch.empty_like(x, dtype=dtype)
    stats = x.new_empty((2, rows), dtype=torch.float32)
    eps, C, k, centered, _, _ = arguments
    _launch(_forward, x, rows, H, x, z, stats, rows, H, eps, C, k, CENTERED=centered)
    return z, stats


def backward(dz: Tensor, x: Tensor | None, stats: Tensor, arguments: Arguments, dtype: torch.dtype) -> Tensor:
    """Return dl/dx, of x's shape and `dtype`, from dl/dz.

    Args:
        x, stats: what `forward` received and returned. x may be None if k = 0, C = 1 and the std is a constant.
    """
    dz = dz.contiguous()
    H = dz.shape[-1]
    rows, dx = dz.numel() // H, torch.empty_like(dz, dtype=dtype)
    _, C, k, centered, detach_mean, detach_std = arguments
    like = dz if x is None else x.contiguous()  # without x the kernel does not read it
    factors = float(centered and not detach_mean), float(not detach_std)
    _launch(_backward, dz, rows, H, like, dz, dx, stats, rows, H, C, k, *factors, WITH_X=x is not None)
    return dx
