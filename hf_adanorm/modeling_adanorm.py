"""AdaNorm and its relatives as drop-in replacements for LayerNorm, and the loader of models that contain them.

This file travels with every saved model, so `from_pretrained(..., trust_remote_code=True)` rebuilds it where
hf_adanorm is not installed. It needs torch and transformers only, opens no file and starts no process.

1. Holder. `SwappedNorm` is the base of the built-in norms; `Held` puts a norm class of the author's in its place.
2. Norms. `AdaNorm`, `LayerNormSimple`, `DetachNorm`, `NoNorm` (Xu et al., NeurIPS 2019, arXiv:1911.07013) and `DyT`.
3. Spec. `config.adanorm` lists what was swapped: groups of settings, each with the names of its modules.
4. Names. Those names are keys of the checkpoint, so they last as long as transformers can load the weights.
5. Loader. `apply_spec` swaps exactly the named modules of a model that was just built, before its weights load.
   `auto_map` in config.json names model classes that do so; `model_classes` makes them on demand.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeGuard, cast

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.autograd import forward_ad
from transformers import PreTrainedModel

try:  # how this version of transformers renames the keys of checkpoints
    from transformers.conversion_mapping import get_model_conversion_mapping
except ImportError:
    get_model_conversion_mapping = None  # type: ignore[assignment]

__version__ = "0.1.0"
FORMAT = 1  # of the spec; a reader refuses a higher one
# Marks in the __dict__ of stock modules that a fold changed beyond their tensors, for the spec.
ADDED_BIAS, ADJUSTED_EPS = "_adanorm_added_bias", "_adanorm_adjusted_eps"
# How a key in saved checkpoints ends that no model has: loaders that know nothing of us list it as what went wrong.
NOTICE = "`import hf_adanorm` or trust_remote_code=True is needed"

# ------------------------------------------------------------------------------------------------ the holder

RESERVED = ("normalized_shape", "eps", "centered", "channels_first", "reference", "output_dtype", "device", "dtype")


def settings_of(cls: type) -> dict[str, Any]:
    """Return the settings of a norm class with their defaults: the keyword-only parameters of its constructor.

    `**kwargs` hands on to the base class. A setting without a default has `inspect.Parameter.empty`.
    """
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        if base is nn.Module or "__init__" not in vars(base):
            continue
        parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
        own = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in RESERVED}
        found = {**found, **{name: default for name, default in own.items() if name not in found}}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


def short_repr(value: Any) -> str:
    """Return a value for an error message, never long (deep nesting would even raise in repr)."""
    plain = (str, int, float, bool, type(None))
    if isinstance(value, int) and abs(value) > 2**1000:
        return f"an integer of {value.bit_length()} bits"
    short_list = isinstance(value, (list, tuple)) and len(value) <= 8 and all(isinstance(v, plain) for v in value)
    if isinstance(value, plain) or short_list:
        text = repr(value)
        return text if len(text) <= 80 else text[:77] + "..."
    return f"a value of type {type(value).__name__}"


def check_number(name: str, value: Any, *, minimum: float = 0.0, inclusive: bool = True) -> float:
    """Return `value` as a float. Raise TypeError or ValueError if it is no number, out of range or of float32."""
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):  # NumPy's, too
        raise TypeError(f"{name} must be a number, got {short_repr(value)}")
    value = cast(float, value)
    if not minimum <= value <= torch.finfo(torch.float32).max or (value == minimum and not inclusive):
        raise ValueError(
            f"{name} must be a finite number {'>=' if inclusive else '>'} {minimum:g}, got {short_repr(value)}"
        )
    return float(value)


def check_bool(name: str, value: Any) -> bool:
    """Return `value`. Raise TypeError if it is not True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {short_repr(value)}")
    return value


def _check_shape(value: Any) -> tuple[int, ...]:
    shape = (value,) if isinstance(value, int) else tuple(value) if isinstance(value, (list, tuple)) else ()
    if not shape or any(isinstance(n, bool) or not isinstance(n, int) or not 1 <= n < 2**40 for n in shape):
        raise ValueError(f"normalized_shape must be one or more integers >= 1, got {short_repr(value)}")
    return shape


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> Any:
    if value not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, got {short_repr(value)}")
    return value


class SwappedNorm(nn.Module):
    """Base of the norms that take the place of a LayerNorm or RMSNorm.

    The one-element buffer `weight` takes no part in the computation. In a checkpoint it stands where a LayerNorm looks
    for its gain, so a loader that does not know these norms stops with a size mismatch; and it answers code that reads
    `norm.weight.dtype`.

    Args:
        normalized_shape: trailing dimensions to normalize.
        eps: added to the variance; >= 0.
        centered: False computes x / rms(x), as RMSNorm does.
        channels_first: normalize axis 1 of (N, C, *).
        reference: "paper", or "lancopku" for the formula in the authors' code.
        output_dtype: None returns what nn.LayerNorm returns. "weight" casts to a half-precision `weight`, as T5's norm
            does; "promote" to the wider dtype of input and `weight`.
    """

    is_adanorm_module: ClassVar[bool] = True  # recognized whichever copy of this file made the class
    norm_name: str = ""
    plain_settings: ClassVar[dict[str, Any] | None] = None
    """The settings with which the norm is exactly N(x), without gain and bias; None if there are none."""
    weight: Tensor
    bias: None = None
    elementwise_affine: ClassVar[bool] = False

    def __init__(
        self,
        normalized_shape: int | Iterable[int],
        eps: float = 1e-5,
        *,
        centered: bool = True,
        channels_first: bool = False,
        reference: str = "paper",
        output_dtype: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.normalized_shape = _check_shape(normalized_shape)
        self.eps = check_number("eps", eps)
        self.centered = check_bool("centered", centered)
        self.channels_first = check_bool("channels_first", channels_first)
        self.reference = _check_choice("reference", reference, ("paper", "lancopku"))
        self.output_dtype = _check_choice("output_dtype", output_dtype, (None, "weight", "promote"))
        if channels_first and len(self.normalized_shape) != 1:
            raise ValueError(f"channels_first normalizes one dimension, got normalized_shape={self.normalized_shape}")
        if reference == "lancopku" and not (centered and math.prod(self.normalized_shape) > 1):
            raise ValueError('reference="lancopku" needs centered=True and at least 2 elements in normalized_shape')
        self.register_buffer("weight", torch.ones(1, device=device, dtype=dtype))
        self.register_load_state_dict_pre_hook(_drop_notice)  # type: ignore[no-untyped-call]

    @property
    def variance_epsilon(self) -> float:
        """eps, under the name that some models read."""
        return self.eps

    @property
    def inner(self) -> nn.Module:
        """The module that computes: this one, or the author's."""
        return self

    def settings(self) -> dict[str, Any]:
        """Return the settings of this kind of norm, by name."""
        return {name: getattr(self, name) for name in settings_of(type(self))}

    def affine(self) -> dict[str, Tensor]:
        """Return the learned "gain" and "bias", if any, each of `normalized_shape`."""
        named = dict(self.inner.named_parameters(recurse=False))
        found = {key: named[name] for key, name in (*_GAINS, ("bias", "bias")) if name in named}
        return {key: tensor for key, tensor in found.items() if tensor.numel() == math.prod(self.normalized_shape)}

    def backward_factor(self, y: Tensor) -> Tensor | float | None:
        """Return the factor from dl/d(output) to dl/dy, with y = N(x) of (rows, H); None for 1, NaN if unknown."""
        return None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fill tensors that no checkpoint has filled. FSDP calls this for a norm that was built on the meta device."""
        for tensor in self.buffers(recurse=False):
            if not getattr(tensor, "_is_hf_initialized", False):
                tensor.fill_(1.0)

    @property
    def _is_hf_initialized(self) -> bool:
        # transformers asks this before it calls the `_init_weights` of a model, which knows no norms of ours: they
        # initialize themselves when asked.
        if not self.__dict__.get("_is_hf_initialized", False):
            self.reset_parameters()
            self._is_hf_initialized = not any(tensor.is_meta for tensor in (*self.buffers(), *self.parameters()))
        return True

    @_is_hf_initialized.setter
    def _is_hf_initialized(self, value: bool) -> None:
        self.__dict__["_is_hf_initialized"] = value

    def normalize(self, x: Tensor) -> Tensor:
        """Compute the norm over the trailing dimensions."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `x` of (*, *normalized_shape), or (N, C, *) with channels_first; the shape stays the same."""
        given: Any = x
        if not isinstance(given, Tensor) and hasattr(
            given, "tracer"
        ):  # torch.fx: one call, as torch's own modules are
            return cast(Tensor, given.tracer.create_proxy("call_module", given.tracer.path_of_module(self), (x,), {}))
        z = self.normalize(x.movedim(1, -1)).movedim(-1, 1) if self.channels_first else self.normalize(x)
        if self.output_dtype == "weight" and self.weight.dtype in (torch.float16, torch.bfloat16):
            return z.to(self.weight.dtype)
        return z.to(torch.promote_types(x.dtype, self.weight.dtype)) if self.output_dtype == "promote" else z

    def extra_repr(self) -> str:
        default = (("centered", True), ("channels_first", False), ("reference", "paper"), ("output_dtype", None))
        shown = {key: getattr(self, key) for key, value in default if getattr(self, key) != value}
        return ", ".join(
            [
                str(self.normalized_shape),
                *(f"{k}={v}" for k, v in {"eps": self.eps, **self.settings(), **shown}.items()),
            ]
        )


_GAINS = (("gain", "gain"), ("gain", "weight"))


def _drop_notice(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    state_dict.pop(prefix + NOTICE, None)


def is_swapped(module: Any) -> TypeGuard[SwappedNorm]:
    """Tell whether `module` is a swapped norm, made by whichever copy of this file. The class is asked, as wrappers
    such as PEFT's hand attributes through."""
    return bool(getattr(type(module), "is_adanorm_module", False))


class Held(SwappedNorm):
    """Hold a norm of the author's class, a plain module, in the place of the norm that it replaces.

    Args:
        make: builds the norm; called again to fill tensors that a checkpoint does not hold.
        norm_name: its name in the spec.
        settings: the settings that it was built with.
        layout: arguments of `SwappedNorm`.
    """

    def __init__(
        self, make: Callable[[], nn.Module], norm_name: str, settings: Mapping[str, Any], **layout: Any
    ) -> None:
        super().__init__(**layout)
        self.norm_name, self.make, self._settings = norm_name, make, dict(settings)
        self.norm = make()
        for module in self.norm.modules():
            module._is_hf_initialized = True  # type: ignore[assignment]  # `_init_weights` must not touch it

    @property
    def inner(self) -> nn.Module:
        return self.norm

    def settings(self) -> dict[str, Any]:
        return {**settings_of(type(self.norm)), **self._settings}

    def backward_factor(self, y: Tensor) -> Tensor | float | None:
        own = getattr(self.norm, "backward_factor", None)
        return math.nan if own is None else own(y)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.weight.is_meta:
            return
        with torch.device("cpu"):
            fresh = self.make()
        for old, new in zip(self.norm.modules(), fresh.modules(), strict=True):
            persistent = old.state_dict(keep_vars=True)
            for key, value in (*new.named_parameters(recurse=False), *new.named_buffers(recurse=False)):
                if not getattr(persistent.get(key), "_is_hf_initialized", False):
                    getattr(old, key).copy_(value)
            for key, value in vars(new).items():  # a tensor that is neither parameter nor buffer stays on meta
                if isinstance(value, Tensor):
                    setattr(old, key, value.to(self.weight.device))

    def normalize(self, x: Tensor) -> Tensor:
        z = cast(Tensor, self.norm(x))
        dtype = _output_dtype(x)
        return z if z.dtype == dtype else z.to(dtype)


# ------------------------------------------------------------------------------------------------- the norms

# Eager mode runs on torch's fused LayerNorm, with the backward passes given by hand, so that no more activations
# are saved than nn.LayerNorm saves. Wherever operations are recorded (torch.compile, torch.export, torch.jit.trace,
# torch.func), differentiated twice or forwards, the formula is written out instead: a compiler fuses it into its
# neighbours, and autograd knows every derivative of it.

_HALF = (torch.float16, torch.bfloat16)  # computed in float32 inside, rounded once at the end

# Fused loops for training on a CPU, or None: importing the package puts `hf_adanorm.cpu_kernel` here.
cpu_kernel: Any = None
# Those for training on a GPU, or None: `hf_adanorm.triton_kernel.enable()` puts them here.
gpu_kernel: Any = None

# As C functions: called in every forward pass, where a small input takes as long as a few lines of Python.
_is_tracing = torch._C._is_tracing
_num_dispatch_modes = torch._C._len_torch_dispatch_stack
_unwrap_dead = torch._C._functorch.unwrap_if_dead
_functorch_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
_is_legacy_batch = torch._C._functorch.is_legacy_batchedtensor


def _is_recorded(x: Tensor) -> bool:
    """Whether the operations on `x` are recorded or transformed, so that the written-out formula is called for."""
    if type(x) is not Tensor or torch.compiler.is_compiling():
        return True
    if _num_dispatch_modes() or forward_ad._current_level >= 0:  # make_fx, selective checkpointing, make_dual
        return True
    return bool(_is_tracing() or _functorch_active() or _is_legacy_batch(x))


def _in_forward_mode() -> bool:
    """Whether torch may be carrying tangents along (`make_dual`, `jvp`)."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def _output_dtype(x: Tensor) -> torch.dtype:
    """What nn.LayerNorm returns here. Under autocast that is the device's affair (float32 on CUDA, the input's dtype
    on CPU): torch is asked, with a tensor that has no elements."""
    dtype = x.dtype
    if dtype in _HALF:
        kind = x.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            return F.layer_norm(x.new_empty((0, 1)), (1,)).dtype
    return dtype


def _upcast(x: Tensor) -> Tensor:
    return x.float() if x.dtype in _HALF else x


def _ones(x: Tensor, normalized_shape: tuple[int, ...]) -> Tensor | None:
    """A gain of one where torch's LayerNorm wants one: its CPU kernel is faster with a gain than without in float32,
    and keeps the statistics of half types in float32 only if the gain is."""
    if x.device.type != "cpu":
        return None
    return x.new_ones(normalized_shape, dtype=torch.float32 if x.dtype in _HALF else x.dtype)


def _normalize(x: Tensor, normalized_shape: tuple[int, ...], eps: float, centered: bool) -> Tensor:
    """y = (x - mean(x)) / sqrt(var(x) + eps) over the trailing dimensions, biased variance; x / rms(x) uncentred."""
    if not centered:
        return F.rms_norm(x.to(_output_dtype(x)), normalized_shape, None, eps)
    if _is_recorded(x):
        dtype = _output_dtype(x)
        if _in_forward_mode():  # torch differentiates a tangent of its layer_norm wrongly
            return _detachnorm_written(x, normalized_shape, eps, centered, False, False, dtype)
        return F.layer_norm(_upcast(x), normalized_shape, None, None, eps).to(dtype)
    gain = None if x.dtype in _HALF else _ones(x, normalized_shape)
    return F.layer_norm(x, normalized_shape, gain, None, eps)


def _dims(normalized_shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(range(-len(normalized_shape), 0))


def _rms_reciprocal(x: Tensor, normalized_shape: tuple[int, ...], eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) of each row."""
    norm = torch.linalg.vector_norm(x, dim=_dims(normalized_shape), keepdim=True)
    rstd: Tensor = torch.rsqrt(norm * norm / math.prod(normalized_shape) + eps)
    return rstd


def _normalize_lancopku(
    x: Tensor, normalized_shape: tuple[int, ...], eps: float, detach_mean: bool = False, detach_variance: bool = False
) -> Tensor:
    """y = (x - mean) / (std + eps) with the unbiased standard deviation, as in the authors' code. Not half types."""
    mean = x.mean(_dims(normalized_shape), keepdim=True)
    std = x.std(_dims(normalized_shape), correction=1, keepdim=True)
    return (x - (mean.detach() if detach_mean else mean)) / ((std.detach() if detach_variance else std) + eps)


def _adanorm_written(
    x: Tensor, normalized_shape: tuple[int, ...], eps: float, C: float, k: float, centered: bool, dtype: torch.dtype
) -> Tensor:
    """z = phi(y) * y with phi(y) = C * (1 - k * y) detached, written out; autograd differentiates it."""
    y = _normalize(_upcast(x), normalized_shape, eps, centered)
    return ((C - (C * k) * y.detach()) * y).to(dtype)


def _adanorm_forward(
    x: Tensor, normalized_shape: tuple[int, ...], eps: float, C: float, k: float, centered: bool, dtype: torch.dtype
) -> Tensor:
    """z without a graph: with u = C * y it is u - (k / C) * u^2, so one pass in place after the norm."""
    x = _upcast(x)
    if centered:
        u = torch.native_layer_norm(x, normalized_shape, x.new_full(normalized_shape, C), None, eps)[0]
    else:
        u = x * (_rms_reciprocal(x, normalized_shape, eps) * C)
    return u.addcmul_(u, u, value=-k / C).to(dtype)


class _Function(torch.autograd.Function):
    """Without the questions that torch's `apply` asks on functorch in Python, which take as long as a small input:
    `_is_recorded` has asked them, and there remains a tensor that outlived its transform."""

    @classmethod
    def apply_eager(cls, x: Tensor, arguments: tuple[Any, ...], kernel: Any) -> Tensor:
        return cast(Tensor, super(torch.autograd.Function, cls).apply(_unwrap_dead(x), arguments, kernel))  # type: ignore[misc]


class _AdaNormFunction(_Function):
    """Saves the input alone (with the CPU kernel also the rows' statistics); the backward pass normalises it again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, arguments: tuple[Any, ...], kernel: Any) -> Tensor:
        ctx.arguments, ctx.kernel = arguments, kernel
        if kernel is not None:
            z, stats = kernel.forward(x, arguments[5], *arguments[1:4])
            ctx.save_for_backward(x, stats)
            return cast(Tensor, z)
        ctx.save_for_backward(x)
        return _adanorm_forward(x, *arguments)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        x, *stats = ctx.saved_tensors
        normalized_shape, eps, C, k, centered, dtype = ctx.arguments
        if torch.is_grad_enabled():  # to be differentiated again
            z = _adanorm_written(x, normalized_shape, eps, C, k, centered, dtype)
            dx = torch.autograd.grad(z, x, dz, create_graph=True)[0]
        elif _is_recorded(dz):
            y, rstd = _statistics(x, normalized_shape, eps, centered)
            dx = _written_backward((C - (C * k) * y) * _upcast(dz), y, rstd, normalized_shape, centered).to(x.dtype)
        elif ctx.kernel is not None:
            dx = ctx.kernel.backward(dz, x, stats[0], C, k)
        else:
            dx = _adanorm_backward(_upcast(dz), _upcast(x), normalized_shape, eps, C, k, centered).to(x.dtype)
        return dx, None, None


def _statistics(x: Tensor, normalized_shape: tuple[int, ...], eps: float, centered: bool) -> tuple[Tensor, Tensor]:
    """y = N(x), not rounded, and the reciprocal of what x - mean was divided by."""
    x = _upcast(x)
    if not centered:
        rstd = _rms_reciprocal(x, normalized_shape, eps)
        return x * rstd, rstd
    var, mean = torch.var_mean(x, _dims(normalized_shape), correction=0, keepdim=True)
    rstd = torch.rsqrt(var + eps)
    return (x - mean) * rstd, rstd


def _written_backward(
    dy: Tensor, y: Tensor | None, rstd: Tensor, normalized_shape: tuple[int, ...], through_mean: bool
) -> Tensor:
    """rstd * (dy - mean(dy) - y * mean(dy * y)), without the second term for a constant mean and without the third
    for a constant standard deviation (no y). Nothing in place: dy may stand for many gradients, or carry tangents."""
    dims = _dims(normalized_shape)
    dx = dy - dy.mean(dims, keepdim=True) if through_mean else dy
    if y is not None:
        dx = dx - y * (dy * y).mean(dims, keepdim=True)
    return dx * rstd


def _adanorm_backward(
    dz: Tensor, x: Tensor, normalized_shape: tuple[int, ...], eps: float, C: float, k: float, centered: bool
) -> Tensor:
    """dl/dx from dl/dz: dl/dy = phi(y) * dl/dz, then through N as usual."""
    if centered:  # phi(y) = C - C k y is a LayerNorm with gain -C k and bias C
        gain, bias = x.new_full(normalized_shape, -C * k), x.new_full(normalized_shape, C)
        dy, mean, rstd = torch.native_layer_norm(x, normalized_shape, gain, bias, eps)
        dy.mul_(dz)
        return _layer_norm_backward(dy, x, normalized_shape, mean, rstd)
    rstd = _rms_reciprocal(x, normalized_shape, eps)
    y = x * rstd
    dy = torch.mul(y, -C * k).add_(C).mul_(dz)
    return dy.addcmul_(y, (dy * y).mean(_dims(normalized_shape), keepdim=True), value=-1).mul_(rstd)


def _layer_norm_backward(
    dy: Tensor, x: Tensor, normalized_shape: tuple[int, ...], mean: Tensor, rstd: Tensor
) -> Tensor:
    """rstd * (dy - mean(dy) - y * mean(dy * y))"""
    dx: Tensor = torch.ops.aten.native_layer_norm_backward(
        dy, x, normalized_shape, mean, rstd, None, None, (True, False, False)
    )[0]
    return dx


def _detachnorm_written(
    x: Tensor,
    normalized_shape: tuple[int, ...],
    eps: float,
    centered: bool,
    detach_mean: bool,
    detach_variance: bool,
    dtype: torch.dtype,
) -> Tensor:
    """N(x) with the mean and / or the standard deviation detached, written out. The one that is not detached is an
    ordinary function of x: a detached mean leaves the variance's derivatives as they are."""
    x = _upcast(x)
    if centered:
        var, mean = torch.var_mean(x, _dims(normalized_shape), correction=0, keepdim=True)
        x, rstd = x - (mean.detach() if detach_mean else mean), torch.rsqrt(var + eps)
    else:
        rstd = _rms_reciprocal(x, normalized_shape, eps)
    return (x * (rstd.detach() if detach_variance else rstd)).to(dtype)


class _DetachNormFunction(_Function):
    """With the variance detached 1 / std alone is saved: the backward pass is linear in dy and knows no x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, arguments: tuple[Any, ...], kernel: Any) -> Tensor:
        ctx.arguments, ctx.kernel, ctx.input_dtype = arguments, kernel, x.dtype
        normalized_shape, eps, centered, _, detach_variance, dtype = arguments
        if kernel is not None:
            y, stats = kernel.forward(x, dtype, eps)
            ctx.save_for_backward(stats, *(() if detach_variance else (x,)))
            return cast(Tensor, y)
        if centered:
            y, mean, rstd = torch.native_layer_norm(
                x.to(dtype), normalized_shape, _ones(x, normalized_shape), None, eps
            )
        else:
            upcast = _upcast(x)
            rstd = _rms_reciprocal(upcast, normalized_shape, eps)
            y = (upcast * rstd).to(dtype)
        if detach_variance:
            ctx.save_for_backward(rstd)
        else:
            ctx.save_for_backward(rstd, x, mean)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        normalized_shape, eps, centered, detach_mean, detach_variance, dtype = ctx.arguments
        rstd, *rest = ctx.saved_tensors
        if not detach_variance and torch.is_grad_enabled():  # to be differentiated again
            y = _detachnorm_written(rest[0], normalized_shape, eps, centered, detach_mean, detach_variance, dtype)
            dx = torch.autograd.grad(y, rest[0], dy, create_graph=True)[0]
        elif detach_variance and (ctx.kernel is None or torch.is_grad_enabled() or _is_recorded(dy)):
            if ctx.kernel is not None:
                rstd = rstd[0].view(*dy.shape[:-1], 1)
            dx = _written_backward(_upcast(dy), None, rstd, normalized_shape, centered and not detach_mean)
        elif _is_recorded(dy):
            y, rstd = _statistics(rest[0], normalized_shape, eps, centered)
            dx = _written_backward(_upcast(dy), y, rstd, normalized_shape, not detach_mean)
        elif ctx.kernel is not None:
            x = None if detach_variance else rest[0]
            dx = ctx.kernel.backward(dy, x, rstd, through_mean=not detach_mean, through_std=not detach_variance)
        else:  # the gradient of an ordinary LayerNorm, and what its mean took away
            x, mean = rest
            dy = _upcast(dy)
            dx = _layer_norm_backward(dy, _upcast(x), normalized_shape, mean, rstd)
            dx = dx.add_(dy.mean(_dims(normalized_shape), keepdim=True).mul_(rstd))
        return dx.to(ctx.input_dtype), None, None


def _kernel(norm: SwappedNorm, x: Tensor, dtype: torch.dtype) -> Any:
    """Return the fused loops where they serve. Not in eval mode, so that a model computes the same bits there with and
    without the package."""
    kernel = cpu_kernel if x.is_cpu else gpu_kernel
    if kernel is None or not (norm.training and norm.centered and x.requires_grad):
        return None
    return kernel if kernel.supports(x, norm.normalized_shape, dtype) else None


class LayerNormSimple(SwappedNorm):
    """LayerNorm-simple: y = N(x) = (x - mean(x)) / sqrt(var(x) + eps), no gain, no bias (Xu et al. 2019, sec. 3).

    Args:
        normalized_shape: the trailing dimensions to normalise, an integer or several.
        eps: added to the biased variance inside the root; >= 0.
        centered: False leaves the mean in, y = x / sqrt(mean(x^2) + eps). Our extension for models with RMSNorm.
        channels_first: normalise axis 1 of (N, C, ...) instead of the last axis.
        reference: "lancopku" computes as the authors' code does, y = (x - mean) / (std + eps) with the unbiased
            standard deviation, for exact comparison (slower; at least 2 elements in normalized_shape).

    Raises:
        TypeError, ValueError: for an argument of the wrong type or out of range.
    """

    norm_name = "layernorm-simple"
    plain_settings: ClassVar = {}

    def normalize(self, x: Tensor) -> Tensor:
        if self.reference == "lancopku":
            return _normalize_lancopku(_upcast(x), self.normalized_shape, self.eps).to(_output_dtype(x))
        if gpu_kernel is not None and torch.is_grad_enabled() and not _is_recorded(x):
            dtype = _output_dtype(x)
            if _kernel(self, x, dtype) is gpu_kernel:  # phi = 1
                arguments = (self.normalized_shape, self.eps, 1.0, 0.0, True, dtype)
                return _AdaNormFunction.apply_eager(x, arguments, gpu_kernel)
        return _normalize(x, self.normalized_shape, self.eps, self.centered)


class AdaNorm(SwappedNorm):
    """AdaNorm: z = phi(y) * y with y = N(x) and phi(y) = C * (1 - k * y), a constant in the backward pass.

    With dl/dz given, dl/dy = phi(y) * dl/dz, which then flows through N as usual (Xu et al. 2019, eq. 5).

    Args:
        normalized_shape: the trailing dimensions to normalise, an integer or several.
        eps: added to the biased variance inside the root; >= 0.
        C: the mean of phi over a row; > 0.
        k: how much phi falls with y; >= 0. The paper fixes k = 1/10.
        centered: False leaves the mean in, y = x / sqrt(mean(x^2) + eps). Our extension for models with RMSNorm.
        channels_first: normalise axis 1 of (N, C, ...) instead of the last axis.
        reference: "lancopku" computes as the authors' code does, y = (x - mean) / (std + eps) with the unbiased
            standard deviation, for exact comparison (slower; at least 2 elements in normalized_shape).

    Raises:
        TypeError, ValueError: for an argument of the wrong type or out of range.

    Example:
        >>> norm = AdaNorm(4, eps=0.0)
        >>> norm(torch.tensor([[-1.0, 1.0, -1.0, 1.0]]))
        tensor([[-1.1000,  0.9000, -1.1000,  0.9000]])
    """

    norm_name = "adanorm"
    plain_settings: ClassVar = {"C": 1.0, "k": 0.0}

    def __init__(
        self,
        normalized_shape: int | Iterable[int],
        eps: float = 1e-5,
        *,
        C: float = 1.0,
        k: float = 0.1,
        **layout: Any,
    ) -> None:
        super().__init__(normalized_shape, eps, **layout)
        self.C, self.k = check_number("C", C, inclusive=False), check_number("k", k)

    def backward_factor(self, y: Tensor) -> Tensor:
        return y.mul_(-self.C * self.k).add_(self.C)  # phi(y)

    def normalize(self, x: Tensor) -> Tensor:
        dtype = _output_dtype(x)
        if self.reference == "lancopku":
            y = _normalize_lancopku(_upcast(x), self.normalized_shape, self.eps)
            return ((1.0 - self.k * y.detach()) * y * self.C).to(dtype)
        arguments = (self.normalized_shape, self.eps, self.C, self.k, self.centered, dtype)
        if _is_recorded(x):
            return _adanorm_written(x, *arguments)
        if not (x.requires_grad and torch.is_grad_enabled()):
            return _adanorm_forward(x, *arguments)
        return _AdaNormFunction.apply_eager(x, arguments, _kernel(self, x, dtype))


class DetachNorm(SwappedNorm):
    """DetachNorm: the forward pass of LayerNorm-simple; mean and / or variance are constants in the backward pass.

    The paper's probe of what the derivatives of mean and variance are worth (Xu et al. 2019, sec. 4).

    Args:
        normalized_shape: the trailing dimensions to normalise, an integer or several.
        eps: added to the biased variance inside the root; >= 0.
        detach_mean: no gradient flows through the mean.
        detach_variance: no gradient flows through the standard deviation.
        centered: False leaves the mean in, y = x / sqrt(mean(x^2) + eps). Our extension for models with RMSNorm.
        channels_first: normalise axis 1 of (N, C, ...) instead of the last axis.
        reference: "lancopku" computes as the authors' code does, y = (x - mean) / (std + eps) with the unbiased
            standard deviation, for exact comparison (slower; at least 2 elements in normalized_shape).

    Raises:
        TypeError, ValueError: for an argument of the wrong type or out of range; both flags False (that is
            `LayerNormSimple`).
    """

    norm_name = "detachnorm"
    plain_settings: ClassVar = {}

    def __init__(
        self,
        normalized_shape: int | Iterable[int],
        eps: float = 1e-5,
        *,
        detach_mean: bool = True,
        detach_variance: bool = True,
        **layout: Any,
    ) -> None:
        super().__init__(normalized_shape, eps, **layout)
        self.detach_mean = check_bool("detach_mean", detach_mean)
        self.detach_variance = check_bool("detach_variance", detach_variance)
        if not (detach_mean or detach_variance):
            raise ValueError(
                "detach_mean=False with detach_variance=False detaches nothing: set at least one to True, "
                'or use "layernorm-simple"'
            )
        if not (self.centered or detach_variance):
            raise ValueError(
                "detach_variance=False with centered=False detaches nothing, as there is no mean: "
                'set detach_variance=True, or use "layernorm-simple"'
            )

    def normalize(self, x: Tensor) -> Tensor:
        dtype, flags = _output_dtype(x), (self.detach_mean, self.detach_variance)
        if self.reference == "lancopku":
            return _normalize_lancopku(_upcast(x), self.normalized_shape, self.eps, *flags).to(dtype)
        arguments = (self.normalized_shape, self.eps, self.centered, *flags, dtype)
        if _is_recorded(x):
            return _detachnorm_written(x, *arguments)
        return _DetachNormFunction.apply_eager(x, arguments, _kernel(self, x, dtype))


class NoNorm(SwappedNorm):
    """The paper's "w/o Norm": returns a copy of its input. A copy, as models write in place into what a norm returns
    (Mixtral's jitter), which must not reach the residual stream."""

    norm_name = "none"

    def normalize(self, x: Tensor) -> Tensor:
        return x.clone()


class DyT(SwappedNorm):
    """Dynamic Tanh: z = gain * tanh(alpha * x) + bias with learned gain, bias and scalar alpha (arXiv:2503.10622).

    The parameters are called `dyt_gain`, `dyt_bias` and `dyt_alpha`, which no loader takes for those of a LayerNorm.

    Args:
        normalized_shape: trailing dimensions of gain and bias.
        eps: kept for the norm that it replaced; no effect.
        alpha: where the parameter starts; > 0.

    Example:
        >>> DyT(2)(torch.tensor([[0.0, 1e9]])).tolist()
        [[0.0, 1.0]]
    """

    norm_name = "dyt"

    def __init__(
        self, normalized_shape: int | Iterable[int], eps: float = 1e-5, *, alpha: float = 0.5, **layout: Any
    ) -> None:
        super().__init__(normalized_shape, eps, **layout)
        self.alpha = check_number("alpha", alpha, inclusive=False)
        for name, shape in (("gain", self.normalized_shape), ("bias", self.normalized_shape), ("alpha", (1,))):
            self.register_parameter(f"dyt_{name}", nn.Parameter(self.weight.new_empty(shape)))
        self.reset_parameters()

    @classmethod
    def from_norm(cls, norm: Any, **settings: Any) -> DyT:
        """Return one with the gain and the bias of `norm`."""
        new: Any = cls(norm.normalized_shape, norm.eps, **settings).to(norm.weight)
        with torch.no_grad():
            new.dyt_gain.copy_(norm.weight)
            if getattr(norm, "bias", None) is not None:
                new.dyt_bias.copy_(norm.bias)
        return cast(DyT, new)

    def affine(self) -> dict[str, Tensor]:
        return {key: self.get_parameter(f"dyt_{key}") for key in ("gain", "bias")}

    def backward_factor(self, y: Tensor) -> float:
        return math.nan

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        for name, value in (("dyt_gain", 1.0), ("dyt_bias", 0.0), ("dyt_alpha", self.alpha)):
            tensor = self.get_parameter(name)
            if not getattr(tensor, "_is_hf_initialized", False):
                tensor.fill_(value)

    def normalize(self, x: Tensor) -> Tensor:
        gain, bias, alpha = (_upcast(self.get_parameter(f"dyt_{name}")) for name in ("gain", "bias", "alpha"))
        return (gain * torch.tanh(alpha * _upcast(x)) + bias).to(_output_dtype(x))


NORM_CLASSES: dict[str, type[SwappedNorm]] = {
    cls.norm_name: cls for cls in (LayerNormSimple, AdaNorm, NoNorm, DetachNorm, DyT)
}

# -------------------------------------------------------------------------------------------------- the spec

_MAX_GROUPS, _MAX_MODULES, _MAX_NAME = 10_000, 100_000, 512  # far beyond any model: what is larger is no spec of ours
_LAYOUT = ("centered", "eps", "channels_first", "normalized_shape", "reference", "output_dtype")


def _check(condition: bool, what: str, value: Any) -> None:
    if not condition:
        raise ValueError(f"{what}, got {short_repr(value)}")


def _names(what: str, value: Any) -> tuple[str, ...]:
    _check(isinstance(value, (list, tuple)) and len(value) <= _MAX_MODULES, f"{what} must be a list of names", value)
    for name in value:
        _check(isinstance(name, str) and _is_name(name), f"{what} must hold names of modules", name)
    return tuple(value)


def _is_name(name: str) -> bool:
    parts = name.removeprefix("^").split(".")
    return len(name) <= _MAX_NAME and all(
        part == "*" or part.replace("-", "_").isidentifier() or part.isdigit() for part in parts
    )


@dataclass(frozen=True, kw_only=True)
class NormGroup:
    """Modules that share their settings, one entry of the spec's `groups`. What is None is read off each module."""

    norm: str
    """A key of NORM_CLASSES, such as "adanorm", or of the spec's `classes`."""
    modules: tuple[str, ...]
    """Names relative to the base model, such as "encoder.layer.*.output.LayerNorm"; `*` stands for one number,
    a leading `^` marks a module outside the base model. They are keys of the checkpoint, see `spec_names`."""
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Arguments of the norm's constructor, such as {"C": 1.0, "k": 0.1}."""
    centered: bool | None = None
    """False for x / rms(x); None is True."""
    eps: float | None = None
    channels_first: bool | None = None
    normalized_shape: tuple[int, ...] | None = None
    reference: str | None = None
    output_dtype: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the group as JSON types."""
        out = {key: value for key, value in vars(self).items() if value is not None and value != {}}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in out.items()}

    @classmethod
    def from_dict(cls, data: Any) -> NormGroup:
        """Inverse of `to_dict`; every value is checked (TypeError, ValueError)."""
        _check(isinstance(data, Mapping), "a group of config.adanorm must be an object", data)
        for key in data:
            _check(
                key in ("norm", "modules", "settings", *_LAYOUT), "a group of config.adanorm has an unknown key", key
            )
        norm, settings = data.get("norm"), data.get("settings", {})
        _check(isinstance(norm, str) and len(norm) <= _MAX_NAME, "the norm of a group must be a name", norm)
        _check(isinstance(settings, Mapping) and len(settings) <= 100, "settings must be an object", settings)
        for key, value in settings.items():
            plain = value is None or (isinstance(value, (str, int, float)) and len(str(value)) <= _MAX_NAME)
            _check(
                plain and isinstance(key, str) and key.isidentifier(),
                f"setting {short_repr(key)} is no plain value",
                value,
            )
        layout = {key: data[key] for key in _LAYOUT if data.get(key) is not None}
        if "normalized_shape" in layout:
            layout["normalized_shape"] = _check_shape(layout["normalized_shape"])
        if norm in NORM_CLASSES:
            check_settings(norm, NORM_CLASSES[norm], settings)
        with torch.device("meta"):  # the constructor checks the ranges
            NORM_CLASSES.get(norm, SwappedNorm)(
                **{"normalized_shape": 2, **layout}, **(settings if norm in NORM_CLASSES else {})
            )
        return cls(norm=norm, modules=_names("modules", data.get("modules")), settings=dict(settings), **layout)


@dataclass(frozen=True, kw_only=True)
class AdaNormSpec:
    """What was swapped in a model: the value of `config.adanorm`, as a dictionary there.

    >>> spec = AdaNormSpec(groups=(NormGroup(norm="adanorm", settings={"k": 0.1}, modules=("encoder.layer.*.norm",)),))
    >>> AdaNormSpec.from_dict(spec.to_dict()) == spec
    True
    """

    groups: tuple[NormGroup, ...] = ()
    biases: tuple[str, ...] = ()
    """Linear layers that were given a bias by a fold, named as in `NormGroup.modules`."""
    eps: Mapping[str, float] = field(default_factory=dict)
    """The eps of norms that were not swapped but whose eps a fold adjusted."""
    classes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The author's norms, by name: {"class": "Derf", "file": "my_norms.py", "files": {"my_norms.py": SHA-256}}."""

    def to_dict(self) -> dict[str, Any]:
        """Return the spec as JSON types: format, version, groups, and biases, eps and classes where there are any."""
        out = {"format": FORMAT, "version": __version__, "groups": [group.to_dict() for group in self.groups]}
        more = {"biases": list(self.biases), "eps": dict(self.eps), "classes": dict(self.classes)}
        return {**out, **{key: value for key, value in more.items() if value}}

    def names(self) -> list[str]:
        """Return every name of a module."""
        return [*(name for group in self.groups for name in group.modules), *self.biases, *self.eps]

    @classmethod
    def from_dict(cls, data: Any) -> AdaNormSpec:
        """Inverse of `to_dict`.

        Raises:
            TypeError, ValueError: for anything that `to_dict` does not write, and for a higher format.
        """
        if isinstance(data, AdaNormSpec):
            return data
        _check(isinstance(data, Mapping), "config.adanorm must be an object", data)
        fmt, version = data.get("format"), data.get("version")
        _check(type(fmt) is int and fmt >= 1, "the format of config.adanorm must be a whole number >= 1", fmt)
        _check(isinstance(version, str), "the version of config.adanorm must be a string", version)
        if fmt > FORMAT:
            raise ValueError(
                f"config.adanorm has format {fmt}, written by hf_adanorm {version[:40]}; hf_adanorm {__version__} "
                f"reads up to format {FORMAT}: install a newer one"
            )
        for key in data:
            known = ("format", "version", "groups", "biases", "eps", "classes")
            _check(key in known, "config.adanorm has an unknown entry", key)
        groups, eps, classes = data.get("groups"), data.get("eps", {}), data.get("classes", {})
        _check(isinstance(groups, (list, tuple)) and len(groups) <= _MAX_GROUPS, "groups must be a list", groups)
        _check(isinstance(eps, Mapping), "eps of config.adanorm must be an object", eps)
        _check(isinstance(classes, Mapping) and len(classes) <= 100, "classes must be an object", classes)
        for name, entry in classes.items():
            _check(
                isinstance(name, str) and re.fullmatch(r"[\w.:-]{1,64}", name) is not None, "no name of a class", name
            )
            _check(name not in NORM_CLASSES, "classes of config.adanorm redefine a built-in norm", name)
            entry = entry if isinstance(entry, Mapping) else {}
            files: Any = entry.get("files") if isinstance(entry.get("files"), Mapping) else {}
            texts = [entry.get("class"), entry.get("file"), *files, *files.values()]
            fine = (
                all(isinstance(text, str) and re.fullmatch(r"[\w.]{1,200}", text) for text in texts)
                and len(files) <= 100
            )
            _check(
                fine and set(entry) == {"class", "file", "files"}, f"class {name!r} needs class, file and files", entry
            )
        found = tuple(NormGroup.from_dict(group) for group in groups)
        for group in found:
            _check(
                group.norm in {*NORM_CLASSES, *classes}, f"norm must be one of {[*NORM_CLASSES, *classes]}", group.norm
            )
        return cls(
            groups=found,
            biases=_names("biases", data.get("biases", [])),
            eps={name: check_number("eps", eps[name]) for name in _names("eps", list(eps))},
            classes={name: dict(entry) for name, entry in classes.items()},
        )


def check_settings(norm: str, cls: type, settings: Iterable[str]) -> None:
    """Raise ValueError for a setting that the constructor of `cls` does not have."""
    known = settings_of(cls)
    for name in settings:
        _check(name in known, f"norm {norm!r} has the settings {sorted(known) or 'none'}", name)


# ------------------------------------------------------------------------------------------------- the names


def base_prefix(model: nn.Module) -> str | None:
    """Return `"bert."` for a model with a head around its base model, None for a base model or a plain module."""
    prefix = getattr(model, "base_model_prefix", "")
    base = getattr(model, prefix, None) if prefix else None
    return f"{prefix}." if isinstance(base, nn.Module) and base is not model else None


def number_template(name: str) -> str:
    """ "encoder.layer.3.norm" -> "encoder.layer.*.norm" """
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def matches(pattern: str, name: str) -> bool:
    """Tell whether `pattern`, in which `*` stands for a number, means `name`, of as many parts."""
    pairs = zip(pattern.split("."), name.split("."), strict=True)
    return all(want == part or (want == "*" and part.isdigit()) for want, part in pairs)


def _renamings(model: nn.Module) -> list[Any]:
    """Return how transformers renames what `model` holds when it saves, in order. Prefixes are left out: a checkpoint
    may or may not have them."""
    owner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if owner is None or get_model_conversion_mapping is None:
        return []
    try:
        found = [
            c for c in get_model_conversion_mapping(owner, add_legacy=False) if type(c).__name__ == "WeightRenaming"
        ]
        return [c.reverse_transform() for c in reversed(found)]
    except (AttributeError, TypeError):  # another version: the names are then those of the modules
        return []


def plain_name(name: str, prefix: str | None) -> str:
    """Return a module's name relative to the base model, whose names start with `prefix`; "^..." outside it."""
    return name.removeprefix(prefix or "") if prefix is None or name.startswith(prefix) else f"^{name}"


def spec_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return the name in a spec of each of the named modules of `model`: as in the keys of its checkpoint, relative to
    the base model. The base model's own renamings count inside it, so heads make no difference."""
    prefix = base_prefix(model)
    inside = _renamings(model if prefix is None else getattr(model, prefix[:-1]))
    outside = [] if prefix is None else _renamings(model)
    plain = {name: plain_name(name, prefix) for name in names}
    found = {}
    for name in plain:
        mark = "^" if plain[name].startswith("^") else ""
        key = f"{plain[name].removeprefix('^')}.weight"
        for renaming in outside if mark else inside:
            key = renaming.rename_source_key(key)[0]
        lasting = mark + key.removesuffix(".weight")
        found[name] = lasting if key.endswith(".weight") and _is_name(lasting) else plain[name]
    count = Counter(found.values())
    return {name: lasting if count[lasting] == 1 else plain[name] for name, lasting in found.items()}


def find_modules(
    model: nn.Module, spec: AdaNormSpec, modules: Iterable[tuple[str, nn.Module]]
) -> dict[str, dict[str, nn.Module]]:
    """Return what each name of `spec` means among the named `modules` of `model`: {} for one that it does not have.

    A name is looked for as a key of the checkpoint, then as the module's own.
    """
    by_name, prefix = dict(modules), base_prefix(model)
    indices: list[dict[str, list[tuple[str, str]]]] = []
    for table in (spec_names(model, by_name), {name: plain_name(name, prefix) for name in by_name}):
        index: dict[str, list[tuple[str, str]]] = {}
        for name, spelled in table.items():
            index.setdefault(number_template(spelled), []).append((name, spelled))
        indices.append(index)

    def look(pattern: str) -> dict[str, nn.Module]:
        for index in indices:
            same = index.get(number_template(pattern), ())
            if hits := {name: by_name[name] for name, spelled in same if matches(pattern, spelled)}:
                return hits
        return {}

    return {pattern: look(pattern) for pattern in spec.names()}


# ------------------------------------------------------------------------------------------------ the loader


def source_settings(module: nn.Module) -> dict[str, Any]:
    """Return what can be read off a norm without running it: eps, normalized_shape, channels_first (missing: not
    known), and of a swapped one all of its layout."""
    if is_swapped(module):
        return {key: getattr(module, key) for key in _LAYOUT}
    found: dict[str, Any] = {"channels_first": getattr(module, "data_format", None) == "channels_first"}
    eps = [value for key in ("eps", "variance_epsilon") if isinstance(value := getattr(module, key, None), float)]
    shape = getattr(module, "normalized_shape", None)
    if shape is None and isinstance(weight := getattr(module, "weight", None), Tensor):
        shape = tuple(weight.shape)
    shape = (shape,) if isinstance(shape, int) else shape
    if isinstance(shape, (tuple, list)) and shape and all(isinstance(n, int) and n > 0 for n in shape):
        found["normalized_shape"] = tuple(shape)
    return {**found, "eps": eps[0]} if eps else found


def build_norm(
    cls: type[nn.Module], shape: tuple[int, ...], eps: float, settings: Mapping[str, Any], **where: Any
) -> nn.Module:
    """Build a norm of the author's class, on the device and in the dtype of `where` whether it takes them or not."""
    shape_or_width: Any = shape[0] if len(shape) == 1 else shape
    taken = inspect.signature(cls).parameters
    accepted = {key: value for key, value in where.items() if key in taken}
    norm = cls(shape_or_width, eps, **settings, **accepted)
    return norm.to(**where) if where and len(accepted) < len(where) else norm


def make_norm(source: nn.Module, group: NormGroup, classes: Mapping[str, type[nn.Module]]) -> SwappedNorm:
    """Return the norm that takes the place of `source`: settings from the group, the rest from `source`."""
    layout = {**source_settings(source), **{key: v for key in _LAYOUT if (v := getattr(group, key)) is not None}}
    for key in ("eps", "normalized_shape"):
        if key not in layout:
            raise ValueError(f"{key} of {type(source).__name__} is not known: the spec must say it")
    tensor = next((t for t in (*source.parameters(), *source.buffers()) if t.is_floating_point()), None)
    where: dict[str, Any] = {} if tensor is None else {"device": tensor.device, "dtype": tensor.dtype}
    layout["centered"] = group.centered is not False
    if group.norm in NORM_CLASSES:
        check_settings(group.norm, cls := NORM_CLASSES[group.norm], group.settings)
        new = cls(**layout, **group.settings, **where)
    else:
        check_settings(group.norm, own := classes[group.norm], group.settings)
        make = functools.partial(build_norm, own, layout["normalized_shape"], layout["eps"], group.settings, **where)
        new = Held(make, group.norm, group.settings, **layout, **where)
    new.train(source.training)
    names = [name for name, _ in source.named_parameters(recurse=False)]
    if names and "weight" not in names and not hasattr(new, names[0]) and not is_swapped(source):
        # Where the norm calls its gain "gamma" or "scale", the tripwire stands under that name.
        new.register_buffer(names[0], torch.ones_like(new.weight))
        new.register_buffer("weight", new.weight, persistent=False)
    return new


def replace_modules(model: nn.Module, replacements: Mapping[int, nn.Module]) -> None:
    """Put `replacements[id(old)]` wherever `old` is a submodule of `model`, under every name it has."""
    for name, child in list(model.named_modules(remove_duplicate=False)):
        if name and id(child) in replacements:
            parent, _, key = name.rpartition(".")
            model.get_submodule(parent).register_module(key, replacements[id(child)])
    # torch's TransformerEncoder has a fused inference path that reads the norms' weights and computes LayerNorm
    # itself: a layer with a swapped norm must not take it, one without may again.
    for module in model.modules():
        for cls, flag in (
            (nn.TransformerEncoderLayer, "activation_relu_or_gelu"),
            (nn.TransformerEncoder, "use_nested_tensor"),
        ):
            if isinstance(module, cls):
                if any(is_swapped(child) for child in module.modules()):
                    module.__dict__.setdefault("_adanorm_" + flag, getattr(module, flag, 0))
                    setattr(module, flag, 0)
                elif "_adanorm_" + flag in module.__dict__:
                    setattr(module, flag, module.__dict__.pop("_adanorm_" + flag))


def apply_spec(
    model: Any, spec: AdaNormSpec, classes: Mapping[str, type[nn.Module]] | None = None, replaced: Any = None
) -> None:
    """Swap exactly the modules that `spec` names; names that `model` does not have (another head) are skipped.

    Args:
        classes: the author's norms, by name.
        replaced: called with each new norm and the one that it replaces.

    Raises:
        ValueError: a name belongs to a module that cannot be a norm. Nothing was swapped then.
    """
    found = find_modules(model, spec, model.named_modules())
    swaps: dict[int, tuple[str, nn.Module, NormGroup]] = {}  # the last group that names a module decides, once
    for group in spec.groups:
        for pattern in dict.fromkeys(group.modules):
            swaps |= {id(module): (name, module, group) for name, module in found[pattern].items()}
    replacements: dict[int, nn.Module] = {}
    for key, (name, module, group) in swaps.items():
        if not is_as(module, group):
            _check_norm(name, module, group.eps is not None)
            replacements[key] = make_norm(module, group, classes or {})
            if replaced is not None:
                replaced(replacements[key], module)
    linear: list[tuple[str, Any]] = [
        (name, module) for pattern in spec.biases for name, module in found[pattern].items()
    ]
    for name, module in linear:
        if not isinstance(module, _LINEAR):
            raise ValueError(f"config.adanorm gives a bias to {name!r}, a {type(module).__name__} and no linear layer")
    adjusted = [(name, module, eps) for pattern, eps in spec.eps.items() for name, module in found[pattern].items()]
    for name, module, _ in adjusted:
        _check_norm(name, module, True)
    for _, module in linear:
        if module.bias is None:
            weight = cast(Tensor, module.weight)
            module.bias = nn.Parameter(torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device))
            module.__dict__[ADDED_BIAS] = True
    for _, module, eps in adjusted:
        setattr(module, "variance_epsilon" if hasattr(module, "variance_epsilon") else "eps", eps)
        module.__dict__[ADJUSTED_EPS] = True
    replace_modules(model, replacements)
    ignored: Any = getattr(model, "_keys_to_ignore_on_load_unexpected", None)  # a set, a list or None
    cast(Any, model)._keys_to_ignore_on_load_unexpected = (set if isinstance(ignored, set) else list)(
        [*(ignored or ()), NOTICE]
    )


def is_as(module: nn.Module, group: NormGroup) -> bool:
    """Tell whether `module` is already swapped with the settings of `group`, by the base model inside a model say."""
    if not is_swapped(module) or module.norm_name != group.norm or module.centered != (group.centered is not False):
        return False
    layout = all(
        value is None or getattr(module, key) == value for key in _LAYOUT[1:] for value in [getattr(group, key)]
    )
    return layout and module.settings() == {**settings_of(type(module.inner)), **group.settings}


_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _check_norm(name: str, module: nn.Module, knows_eps: bool) -> None:
    """Raise ValueError unless a spec, which a stranger may have written, may name this module: a norm with a gain and
    perhaps a bias, of one shape, or one without, if its class or its name says norm or it has an eps."""
    if is_swapped(module) or isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return
    cls, place = type(module).__name__, name.rpartition(".")[2].lower()
    torch_own = any(base.__module__.startswith("torch.") for base in type(module).__mro__ if base is not nn.Module)
    shapes = {tuple(getattr(p, "ds_shape", p.shape)) for p in module.parameters()}
    called_norm = "norm" in (cls + place).lower() or "LN" in cls or place.startswith("ln")
    like_norm = (knows_eps or "eps" in source_settings(module)) and {len(shape) for shape in shapes} == {1}
    small = len(shapes) <= 1 and len(list(module.parameters())) <= 2 and sum(1 for _ in module.modules()) <= 3
    if torch_own or not (called_norm or like_norm) or not small:
        raise ValueError(f"config.adanorm names {name!r}, which is a {cls} and no normalization layer")


def add_notice(model: nn.Module, state_dict: dict[str, Any]) -> None:
    """Give `state_dict` of `model` a further key, in the place of a swapped norm, that ends in NOTICE. A stock loader
    shows it in its report, above the error that the norms' sizes cause. It is no number of the model: one byte."""
    for name, module in model.named_modules():
        if is_swapped(module) and any(f"{name}.{buffer}" in state_dict for buffer, _ in module.named_buffers()):
            state_dict[f"{name}.{NOTICE}"] = torch.zeros(1, dtype=torch.uint8)
            return


def notice_hook(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    if not prefix:
        add_notice(module, state_dict)


def own_file(reference: Any) -> str:
    """Return the file of ours that an `auto_map` entry such as "modeling_adanorm.BertModel" points to, or ""."""
    module = reference.rpartition("--")[2].partition(".")[0] if isinstance(reference, str) else ""
    return module if module in ("modeling_adanorm", "modeling_adanorm_with_classes") else ""


def model_classes(module_name: str, classes: Mapping[str, type[nn.Module]]) -> Callable[[str], Any]:
    """Return the `__getattr__` of a module whose `BertModel` and the like apply the spec in their config.

    Args:
        module_name: the module's `__name__`; what transformers copies when such a model is saved.
        classes: the author's norms, by name.
    """
    made: dict[str, Any] = {}

    def get(name: str) -> Any:
        stock = None if name.startswith("_") else getattr(transformers, name, None)
        if not (isinstance(stock, type) and issubclass(stock, PreTrainedModel)):
            raise AttributeError(
                f"module {module_name!r} has no attribute {name!r}; it has the model classes of transformers"
            )
        if name not in made:
            package = getattr(sys.modules.get("hf_adanorm"), "serve", None)  # it is never imported from here
            methods = (package and package(FORMAT, stock, classes)) or _methods(stock, module_name, classes)
            made[name] = type(name, (stock,), {"__module__": module_name, "__qualname__": name, **methods})
        return made[name]

    return get


def _methods(stock: type[PreTrainedModel], module_name: str, classes: Mapping[str, type[nn.Module]]) -> dict[str, Any]:
    """Return the methods of a subclass of `stock` that applies the specs of its config and of those nested in it."""

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        stock.__init__(self, config, *args, **kwargs)
        for module in list(self.modules()):
            if isinstance(module, PreTrainedModel) and getattr(module.config, "adanorm", None) is not None:
                apply_spec(module, AdaNormSpec.from_dict(module.config.adanorm), classes)
        if isinstance(auto_map := getattr(self.config, "auto_map", None), dict):
            # "user/repo--modeling_adanorm.BertModel" after a pull: the file travels on with the next save.
            auto_map = {key: ref.rpartition("--")[2] if own_file(ref) else ref for key, ref in auto_map.items()}
            self.config.auto_map = auto_map
            # transformers < 5.13 copies the file of such a class for unknown architectures only
            own = f"{module_name.rpartition('.')[2]}.{stock.__name__}"
            if getattr(self, "_auto_class", None) is None and own in auto_map.values():
                self._auto_class = next(key for key, ref in auto_map.items() if ref == own)

    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> None:
        hook = self.register_state_dict_post_hook(notice_hook)
        try:
            stock.save_pretrained(self, *args, **kwargs)
        finally:
            hook.remove()

    # It is the stock architecture, and must keep transformers' checkpoint key conversions.
    return {"__init__": init, "is_custom_code": classmethod(lambda cls: False), "save_pretrained": save_pretrained}


__getattr__ = model_classes(__name__, {})
