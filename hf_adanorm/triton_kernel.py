"""The forward and the backward pass of AdaNorm, DetachNorm and LayerNorm-simple as one Triton kernel each, for GPUs.

The norm is bound by memory: a row is read once and written once in either pass, five tensors in all (x, z, x, dz, dx).
Off unless it is asked for, until figures of a GPU stand beside it:

    from hf_adanorm import triton_kernel
    triton_kernel.enable()                  # enable(False) takes it back

From then on norms in training mode run on it where it serves (`supports`). As with the CPU's loops, eager mode alone
does: where operations are recorded or differentiated twice, the formula is written out. The same passes stand in
torch's library as `torch.ops.hf_adanorm.normalize` and `normalize_backward`, known to torch.compile, torch.export and
autograd (twice, too); and as `layers`, in the form that Hugging Face's `kernels` puts into a model.

Under TRITON_INTERPRET=1 everything here runs on a CPU, slowly: so it is tested where there is no GPU.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any, ClassVar, cast

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from . import modeling_adanorm

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WIDEST = 16_384  # elements of a row that are held at once; a wider one is read in pieces, twice in either pass
_PIECE = 4_096
_TILE = 2_048  # elements that a program takes at least: several rows, where they are narrow


def enable(on: bool = True) -> None:
    """Let the norms train on these kernels on a GPU, or on torch's operators again."""
    modeling_adanorm.gpu_kernel = sys.modules[__name__] if on else None


@triton.jit
def _forward(
    x_ptr, z_ptr, stats_ptr, rows, H, eps, C, k, ROWS: tl.constexpr, PIECE: tl.constexpr, WHOLE: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    j = tl.arange(0, PIECE)[None, :]
    x_ptr += row * H
    z_ptr += row * H
    if WHOLE:
        inside = (row < rows) & (j < H)
        x = tl.load(x_ptr + j, mask=inside, other=0.0).to(tl.float32)
        mean = tl.sum(x, 1, keep_dims=True) / H
        d = tl.where(inside, x - mean, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(d * d, 1, keep_dims=True) / H + eps)
        y = d * rstd
        tl.store(z_ptr + j, (C - C * k * y) * y, mask=inside)
    else:  # the pieces' means and sums of squares are joined as by Chan, Golub and LeVeque
        mean = tl.zeros([ROWS, 1], tl.float32)
        squares = tl.zeros([ROWS, 1], tl.float32)
        for start in range(0, H, PIECE):
            inside = (row < rows) & (start + j < H)
            x = tl.load(x_ptr + start + j, mask=inside, other=0.0).to(tl.float32)
            count = tl.minimum(H - start, PIECE)
            piece_mean = tl.sum(x, 1, keep_dims=True) / count
            d = tl.where(inside, x - piece_mean, 0.0)
            step = piece_mean - mean
            share = count / (start + count)
            squares += tl.sum(d * d, 1, keep_dims=True) + step * (step * (start * share))
            mean += step * share
        rstd = 1.0 / tl.sqrt(squares / H + eps)
        for start in range(0, H, PIECE):
            inside = (row < rows) & (start + j < H)
            y = (tl.load(x_ptr + start + j, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
            tl.store(z_ptr + start + j, (C - C * k * y) * y, mask=inside)
    tl.store(stats_ptr + row, rstd, mask=row < rows)
    tl.store(stats_ptr + rows + row, mean, mask=row < rows)


@triton.jit
def _dy_and_y(x_ptr, dz_ptr, inside, mean, rstd, C, k, WITH_X: tl.constexpr):
    dy = tl.load(dz_ptr, mask=inside, other=0.0).to(tl.float32)
    y = tl.zeros_like(dy)
    if WITH_X:
        y = (tl.load(x_ptr, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
        dy = (C - C * k * y) * dy
    return dy, y


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
    PIECE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """dy = phi(y) * dz with phi constant; dx = rstd * (dy - mean(dy) - y * mean(dy * y)). The second term comes from
    the mean and the third from the standard deviation: a factor of 0 takes that one for a constant. Without x,
    phi = 1 and the standard deviation is one."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    j = tl.arange(0, PIECE)[None, :]
    x_ptr += row * H
    dz_ptr += row * H
    dx_ptr += row * H
    rstd = tl.load(stats_ptr + row, mask=row < rows, other=0.0)
    mean = tl.load(stats_ptr + rows + row, mask=row < rows, other=0.0)
    if WHOLE:
        inside = (row < rows) & (j < H)
        dy, y = _dy_and_y(x_ptr + j, dz_ptr + j, inside, mean, rstd, C, k, WITH_X)
        mean_dy = tl.sum(dy, 1, keep_dims=True) * (through_mean / H)
        mean_dyy = tl.sum(dy * y, 1, keep_dims=True) * (through_std / H)
        tl.store(dx_ptr + j, rstd * (dy - mean_dy - y * mean_dyy), mask=inside)
    else:
        mean_dy = tl.zeros([ROWS, 1], tl.float32)
        mean_dyy = tl.zeros([ROWS, 1], tl.float32)
        for start in range(0, H, PIECE):
            inside = (row < rows) & (start + j < H)
            dy, y = _dy_and_y(x_ptr + start + j, dz_ptr + start + j, inside, mean, rstd, C, k, WITH_X)
            mean_dy += tl.sum(dy, 1, keep_dims=True)
            mean_dyy += tl.sum(dy * y, 1, keep_dims=True)
        mean_dy *= through_mean / H
        mean_dyy *= through_std / H
        for start in range(0, H, PIECE):
            inside = (row < rows) & (start + j < H)
            dy, y = _dy_and_y(x_ptr + start + j, dz_ptr + start + j, inside, mean, rstd, C, k, WITH_X)
            tl.store(dx_ptr + start + j, rstd * (dy - mean_dy - y * mean_dyy), mask=inside)


_INTERPRETED = not isinstance(_forward, triton.JITFunction)


def _launch(kernel: Any, x: Tensor, rows: int, H: int, *arguments: Any, **constants: Any) -> None:
    if rows == 0:
        return
    whole = H <= _WIDEST
    piece = max(16, triton.next_power_of_2(H)) if whole else _PIECE
    per_program = max(1, _TILE // piece)
    warps = min(16, max(4, piece * per_program // 512))
    with torch.cuda.device_of(x) if x.is_cuda else contextlib.nullcontext():
        kernel[(triton.cdiv(rows, per_program),)](
            *arguments, ROWS=per_program, PIECE=piece, WHOLE=whole, num_warps=warps, **constants
        )


# ------------------------------------------------------------------- what modeling_adanorm asks of a kernel


def supports(x: Tensor, normalized_shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether the kernels serve this input and output: float32, bfloat16 or float16 on a GPU, one normalised
    dimension."""
    return (
        (x.is_cuda or _INTERPRETED)
        and x.dtype in _DTYPES
        and dtype in _DTYPES
        and len(normalized_shape) == 1
        and x.shape[-1:] == normalized_shape
    )


def forward(x: Tensor, dtype: torch.dtype, eps: float, C: float = 1.0, k: float = 0.0) -> tuple[Tensor, Tensor]:
    """z = C * (1 - k * y) * y with y = (x - mean) * rstd, over the last axis; computed in float32.

    Args:
        x: (*, H), float32, bfloat16 or float16, in any layout (a copy is made of one that is not contiguous).
        dtype: of z.
        eps, C, k: as in `AdaNorm`; the defaults give z = y.

    Returns:
        z of x's shape, contiguous; and the rows' rstd and mean, (2, rows), float32.
    """
    x = x.contiguous()
    H = x.shape[-1]
    rows, z = x.numel() // H, torch.empty_like(x, dtype=dtype)
    stats = x.new_empty((2, rows), dtype=torch.float32)
    _launch(_forward, x, rows, H, x, z, stats, rows, H, eps, C, k)
    return z, stats


def backward(
    dz: Tensor,
    x: Tensor | None,
    stats: Tensor,
    C: float = 1.0,
    k: float = 0.0,
    through_mean: bool = True,
    through_std: bool = True,
) -> Tensor:
    """dl/dx (of x's dtype) from dl/dz, phi taken for a constant.

    Args:
        x, stats: what `forward` was given and what it returned; x may be None with k = 0, C = 1 and a constant std:
            dl/dx has dz's dtype then.
        through_mean, through_std: False takes the statistic for a constant, as DetachNorm does.
    """
    dz = dz.contiguous()
    like = dz if x is None else x.contiguous()  # without x no pointer to it is followed
    H = dz.shape[-1]
    rows, dx = dz.numel() // H, torch.empty_like(like)
    factors = float(through_mean), float(through_std)
    _launch(_backward, dz, rows, H, like, dz, dx, stats, rows, H, C, k, *factors, WITH_X=x is not None)
    return dx


# ---------------------------------------------------------------------------------------------- torch's library


@torch.library.custom_op("hf_adanorm::normalize", mutates_args=())
def normalize(
    x: Tensor, dtype: torch.dtype, eps: float, C: float, k: float, detach_mean: bool, detach_variance: bool
) -> tuple[Tensor, Tensor]:
    """`forward`, with a derivative."""
    return forward(x, dtype, eps, C, k)


@normalize.register_fake
def _(
    x: Tensor, dtype: torch.dtype, eps: float, C: float, k: float, detach_mean: bool, detach_variance: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((2, x.numel() // x.shape[-1]), dtype=torch.float32)


@torch.library.custom_op("hf_adanorm::normalize_backward", mutates_args=())
def normalize_backward(
    dz: Tensor, x: Tensor, stats: Tensor, eps: float, C: float, k: float, detach_mean: bool, detach_variance: bool
) -> Tensor:
    """`backward`, with a derivative."""
    return backward(dz, x, stats, C, k, not detach_mean, not detach_variance)


@normalize_backward.register_fake
def _(
    dz: Tensor, x: Tensor, stats: Tensor, eps: float, C: float, k: float, detach_mean: bool, detach_variance: bool
) -> Tensor:
    return x.new_empty(x.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, *ctx.arguments = inputs
    ctx.save_for_backward(x, output[1])
    ctx.mark_non_differentiable(output[1])


def _first(ctx: Any, dz: Tensor, _: Any) -> tuple[Any, ...]:
    x, stats = ctx.saved_tensors
    return normalize_backward(dz, x, stats, *ctx.arguments), *[None] * 6


def _keep_again(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dz, x, _, *ctx.arguments = inputs
    ctx.save_for_backward(dz, x)


def _second(ctx: Any, ddx: Tensor) -> tuple[Any, ...]:
    """By the formula written out: phi, and what is detached, are constants in dx's formula as well."""
    eps, C, k, detach_mean, detach_variance = ctx.arguments
    with torch.enable_grad():
        dz, x = (saved.detach().requires_grad_() for saved in ctx.saved_tensors)
        arguments = (x.shape[-1:], eps, True, detach_mean, detach_variance, torch.float32)
        y = modeling_adanorm._detachnorm_written(x, *arguments)
        z = ((C - C * k * y.detach()) * y).to(dz.dtype)
        (dx,) = torch.autograd.grad(z, x, dz, create_graph=True)
        return *torch.autograd.grad(dx, (dz, x), ddx, allow_unused=True), *[None] * 6


normalize.register_autograd(_first, setup_context=_keep)
normalize_backward.register_autograd(_second, setup_context=_keep_again)


# ------------------------------------------------------------------------------------- layers, as `kernels` has them


def _layer(norm: Any, x: Tensor, C: float, k: float, detach_mean: bool, detach_variance: bool) -> Tensor:
    """What `norm` gives for x: by the kernels, or by its own class where they do not serve."""
    dtype = modeling_adanorm._output_dtype(x)
    plain = norm.centered and not norm.channels_first and norm.reference == "paper"
    if not (plain and supports(x, norm.normalized_shape, dtype)):
        return cast(Tensor, type(norm).forward(norm, x))
    return cast(Tensor, normalize(x, dtype, norm.eps, C, k, detach_mean, detach_variance)[0])


class layers:  # noqa: N801
    """Stateless classes whose `forward` takes the place of that of the norm of the same name."""

    class AdaNorm(nn.Module):
        has_backward: ClassVar[bool] = True
        can_torch_compile: ClassVar[bool] = True

        def forward(self, x: Tensor) -> Tensor:
            return _layer(self, x, self.C, self.k, False, False)  # type: ignore[arg-type]

    class DetachNorm(nn.Module):
        has_backward: ClassVar[bool] = True
        can_torch_compile: ClassVar[bool] = True

        def forward(self, x: Tensor) -> Tensor:
            return _layer(self, x, 1.0, 0.0, self.detach_mean, self.detach_variance)  # type: ignore[arg-type]

    class LayerNormSimple(nn.Module):
        has_backward: ClassVar[bool] = True
        can_torch_compile: ClassVar[bool] = True

        def forward(self, x: Tensor) -> Tensor:
            return _layer(self, x, 1.0, 0.0, False, False)
