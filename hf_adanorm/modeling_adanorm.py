"""AdaNorm and its relatives as drop-in replacements for LayerNorm, in one self-contained file.

Needs torch and transformers only, and looks at their versions on import, no more: this very file travels with every
saved model, so that `from_pretrained(..., trust_remote_code=True)` rebuilds it where hf_adanorm is not installed.

1. Norms. `AdaNorm`, `LayerNormSimple`, `DetachNorm` and `NoNorm` ("w/o Norm") of Xu et al., "Understanding and
   Improving Layer Normalization", NeurIPS 2019 (arXiv:1911.07013). Each is usable alone in any `nn.Module`.
2. Spec. What was swapped, in `config.adanorm`: groups of settings, each with the module names it holds for
   (`AdaNormSpec`). It is resolved: names, never patterns, so that loading decides nothing.
3. Names. What the spec's names mean in a model, whichever version of transformers wrote them (`find_modules`).
4. Swap. `apply_spec` replaces exactly the named modules of a model that was just built, before weights load.
5. Classes. `auto_map` in config.json names classes of this module, which are made on demand (`__getattr__`): a
   subclass of the transformers class of that name that applies the spec. With hf_adanorm installed they hand over
   to the stock class, whose hooks do the same, so there is one set of classes.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import importlib.util
import itertools
import math
import numbers
import warnings
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeGuard, cast

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.autograd import forward_ad
from transformers import PreTrainedModel

__version__ = "0.1.0"
FORMAT = 1  # of the spec; a reader refuses a higher one
# Marks in the __dict__ of stock modules that a fold changed beyond their tensors, for the spec.
ADDED_BIAS, ADJUSTED_EPS = "_adanorm_added_bias", "_adanorm_adjusted_eps"
# How a key in saved checkpoints ends that no model has: loaders that know nothing of us list it as what went wrong.
NOTICE = "`import hf_adanorm` or trust_remote_code=True is needed"

# ---------------------------------------------------------------------------------------------- the versions

# All that depends on a version of transformers is marked with "transformers < VERSION", the one that ends it.
OLDEST, NEWEST = (5, 0), (5, 24)  # of transformers: the first that works, the last that was tried


def check_version(found: str) -> None:
    """One sentence for a version of transformers that is too old (ImportError) or was never tried (a warning)."""
    version = tuple(int(part) if part.isdigit() else 0 for part in found.split(".")[:2])
    oldest, newest = (".".join(map(str, known)) for known in (OLDEST, NEWEST))
    if version < OLDEST:
        raise ImportError(
            f"hf_adanorm {__version__} needs transformers {oldest} or newer, and {found} is installed: "
            f'pip install "transformers>={oldest}"'
        )
    if version > NEWEST:
        warnings.warn(
            f"hf_adanorm {__version__} was tried with transformers {oldest} to {newest}, not with {found}, which is "
            "installed: should something fail, look for a newer hf_adanorm",
            stacklevel=2,
        )


check_version(transformers.__version__)

from transformers.conversion_mapping import get_model_conversion_mapping  # noqa: E402, older ones have no such module
from transformers.core_model_loading import WeightRenaming  # noqa: E402

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


def check_number(name: str, value: Any, *, minimum: float, inclusive: bool, maximum: float | None = None) -> float:
    """`value` as a float; TypeError for what is no real number, ValueError for one out of range or of float32."""
    if isinstance(value, int) and abs(value) > 2**1000:  # float() would overflow
        raise ValueError(f"{name} must be a finite number, got an integer of {value.bit_length()} bits")
    if isinstance(value, bool) or not isinstance(value, numbers.Real):  # NumPy's numbers are real ones, too
        raise TypeError(f"{name} must be a number, got {_typed(value)}")
    number = float(value)
    if maximum is not None and not minimum <= number <= maximum:
        raise ValueError(f"{name} must lie in {minimum:g}..{maximum:g}, got {short_repr(number)}")
    if not math.isfinite(number) or number < minimum or (number == minimum and not inclusive):
        raise ValueError(
            f"{name} must be a finite number {'>=' if inclusive else '>'} {minimum:g}, got {short_repr(number)}"
        )
    if number > torch.finfo(torch.float32).max:
        raise ValueError(f"{name} must be a finite number in float32, got {number:g}")
    return number


def _check_reference(value: Any) -> str:
    if not isinstance(value, str) or value not in ("paper", "lancopku"):
        raise ValueError(f'reference must be "paper" or "lancopku", got {short_repr(value)}')
    return value


def _check_bool(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {_typed(value)}")
    return value


def _check_shape(value: Any) -> tuple[int, ...]:
    shape = (value,) if isinstance(value, int) else value
    if isinstance(shape, (str, bytes)) or not isinstance(shape, Iterable):
        raise TypeError(f"normalized_shape must be an integer or integers, got {short_repr(value)}")
    shape = tuple(shape)
    if any(isinstance(n, bool) or not isinstance(n, int) for n in shape):
        raise TypeError(f"normalized_shape must be an integer or integers, got {short_repr(value)}")
    if not shape or min(shape) < 1:
        raise ValueError(f"normalized_shape must hold at least one dimension, each >= 1, got {short_repr(value)}")
    return shape


@dataclass(frozen=True)
class Setting:
    """An argument that is particular to one kind of norm: what `patch_model`, command lines and spec know of it."""

    default: float | bool
    help: str
    """What it is, in a line for command lines."""
    minimum: float = 0.0
    """The least number; flags have no range."""
    inclusive: bool = True
    """Whether it may be `minimum` itself."""

    def check(self, name: str, value: Any) -> float | bool:
        """`value`; TypeError or ValueError for one of the wrong type or out of range."""
        if isinstance(self.default, bool):
            return _check_bool(name, value)
        return check_number(name, value, minimum=self.minimum, inclusive=self.inclusive)


class SwappedNorm(nn.Module):
    """What the norms share: settings, layout, and a one-element buffer `weight`. What is particular to one of them
    stands in its class, where all others look for it: a new norm is a new class in `NORM_CLASSES`.

    `weight` takes no part in the computation. In a saved checkpoint it stands where a LayerNorm would look for its
    gain, so that a loader which does not know these norms stops with a size mismatch instead of inventing a
    LayerNorm; and it answers code that reads `norm.weight.dtype`. One element, as tensors without elements share a
    storage id and get lost in some savers.
    """

    is_adanorm_module: ClassVar[bool] = True  # how swapped norms are recognised, whichever copy of this file made them
    norm: ClassVar[str]
    """The name that `patch_model`, command lines and spec know it by."""
    title: ClassVar[str]
    """The name for people, in tables and plots."""
    summary: ClassVar[str] = ""
    """What is particular to it, in a few words for people."""
    SETTINGS: ClassVar[dict[str, Setting]] = {}
    """The arguments of its constructor that belong to this kind alone."""
    normalizes: ClassVar[bool] = True
    """Whether it computes y = N(x): if not, there is no plain N(x) into which gains and biases fold."""
    is_identity: ClassVar[bool] = False
    """Whether it hands its input on: nothing to time or to tag."""
    keeps_affine: ClassVar[bool] = False
    """Whether the gain and bias of the norm that it replaces live on in it (see `affine`), to be trained further."""
    color: ClassVar[int] = 5
    """Of its lines in all pictures: an index of `hf_adanorm.diagnostics.plots.COLORS`."""
    initial: ClassVar[dict[str, float]] = {}
    """What those of its tensors hold that do not begin at 1."""
    elementwise_affine: ClassVar[bool] = False
    weight: Tensor
    bias: None = None

    def __init__(
        self,
        normalized_shape: int | Iterable[int],
        eps: float = 1e-5,
        *,
        centered: bool = True,
        channels_first: bool = False,
        reference: str = "paper",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.normalized_shape = _check_shape(normalized_shape)
        self.eps = check_number("eps", eps, minimum=0.0, inclusive=True)
        self.centered = _check_bool("centered", centered)
        self.channels_first = _check_bool("channels_first", channels_first)
        if channels_first and len(self.normalized_shape) != 1:
            raise ValueError(f"channels_first normalises one dimension, got normalized_shape={self.normalized_shape}")
        self.reference = _check_reference(reference)
        if reference == "lancopku" and not centered:
            raise ValueError('reference="lancopku" subtracts the mean: centered=False does not go with it')
        if reference == "lancopku" and math.prod(self.normalized_shape) < 2:
            raise ValueError(
                'reference="lancopku" divides by H - 1: normalized_shape must hold at least 2 elements, '
                f"got {self.normalized_shape}"
            )
        self.register_buffer("weight", torch.ones(1, device=device, dtype=dtype))
        # Held outside parameters, buffers and submodules: the module that this one replaced, for unpatch_model,
        # and the settings that cannot be read off it, for the spec.
        self.__dict__["_source"] = None
        self.__dict__["_source_has_values"] = False  # whether its gain and bias are those of the model
        self.__dict__["_overrides"] = {}

    @property
    def variance_epsilon(self) -> float:
        """eps, under the name that some models read."""
        return self.eps

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            setattr(self, name, self.SETTINGS[name].check(name, value))

    def settings(self) -> dict[str, Any]:
        """The arguments that belong to this kind of norm, by name (C and k, detach flags, centered)."""
        own = {name: getattr(self, name) for name in self.SETTINGS}
        return own if self.centered else {**own, "centered": False}

    def backward_factor(self, y: Tensor) -> Tensor | None:
        """What the backward pass multiplies dl/d(output) by to give dl/dy, with y = N(x), float32 of (rows, H), whose
        memory it may take; None for 1."""
        return None

    def affine(self) -> dict[str, Tensor]:
        """The "gain" and the "bias" that it holds, if any."""
        return {}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """What a new norm holds: `weight` is 1, see `initial` for the rest. Called by
        who gives memory to a norm that was built on the meta device (FSDP does); a tensor that a checkpoint has filled
        keeps its values."""
        for name, tensor in (*self._buffers.items(), *self._parameters.items()):
            if tensor is not None and not getattr(tensor, "_is_hf_initialized", False):
                tensor.fill_(self.initial.get(name, 1.0))

    @property
    def _is_hf_initialized(self) -> bool:
        """transformers asks this of every module that may hold keys which the checkpoint lacks, before it calls the
        `_init_weights` of the model's class. That one knows no norms of ours, so they initialize themselves when they
        are asked: it works for every class, for models nested in it, and without hf_adanorm."""
        if not self.__dict__.get("_is_hf_initialized", False):
            self.reset_parameters()
            # Not asked again: a copy, or another dtype, has lost what its tensors say of where they come from.
            tensors = (*self.buffers(recurse=False), *self.parameters(recurse=False))
            self._is_hf_initialized = not any(tensor.is_meta for tensor in tensors)
        return True

    @_is_hf_initialized.setter
    def _is_hf_initialized(self, value: bool) -> None:
        self.__dict__["_is_hf_initialized"] = value

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        state_dict.pop(prefix + NOTICE, None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _kernel(self, x: Tensor, dtype: torch.dtype) -> Any:
        """The fused loops where they serve. Not in eval mode, so that a model computes the same bits there with and
        without the package."""
        kernel = cpu_kernel if x.is_cpu else gpu_kernel
        if kernel is None or not (self.training and self.centered and x.requires_grad):
            return None
        return kernel if kernel.supports(x, self.normalized_shape, dtype) else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` of shape (*, *normalized_shape), or (N, C, *) with channels_first; same shape, and the
        dtype that `nn.LayerNorm` would give."""
        given: Any = x
        if isinstance(given, torch.fx.Proxy):  # to fx this is one call, as torch's own modules are
            tracer: Any = given.tracer
            return cast(Tensor, tracer.create_proxy("call_module", tracer.path_of_module(self), (x,), {}))
        if self.channels_first:
            return self._forward(x.movedim(1, -1)).movedim(-1, 1)
        return self._forward(x)

    def __prepare_scriptable__(self) -> SwappedNorm:
        raise NotImplementedError(
            f"torch.jit.script cannot read the code of {type(self).__name__}: use torch.jit.trace(model, example), "
            "torch.export or torch.compile"
        )

    def extra_repr(self) -> str:
        shown: dict[str, Any] = {"eps": self.eps, **self.settings()}
        if self.channels_first:
            shown["channels_first"] = True
        if self.reference != "paper":
            shown["reference"] = self.reference
        return ", ".join([str(self.normalized_shape), *(f"{key}={value}" for key, value in shown.items())])

    def __getstate__(self) -> dict[str, Any]:
        # A pickle holds no tensors of the replaced module, only its class and attributes.
        state = self.__dict__.copy()
        state["_source_has_values"] = False
        if state["_source"] is not None:
            memo: dict[int, Any] = {
                id(p): nn.Parameter(p.to("meta"), requires_grad=False) for p in state["_source"].parameters()
            }
            state["_source"] = copy.deepcopy(state["_source"], memo)
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> SwappedNorm:
        # Unlike a pickle, a copy in memory keeps the replaced module's tensors: it can be unpatched as well.
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new


def is_swapped(module: Any) -> TypeGuard[SwappedNorm]:
    """Whether `module` is one of these norms, made by whichever copy of this file. The class is asked, as wrappers
    such as PEFT's hand attributes through."""
    return bool(getattr(type(module), "is_adanorm_module", False))


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

    norm = "layernorm-simple"
    title, summary, color = "LayerNorm-simple", "no gain, no bias", 0

    def _forward(self, x: Tensor) -> Tensor:
        if self.reference == "lancopku":
            return _normalize_lancopku(_upcast(x), self.normalized_shape, self.eps).to(_output_dtype(x))
        if gpu_kernel is not None and torch.is_grad_enabled() and not _is_recorded(x):
            dtype = _output_dtype(x)
            if self._kernel(x, dtype) is gpu_kernel:  # phi = 1
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

    norm, title, color = "adanorm", "AdaNorm", 1
    SETTINGS: ClassVar = {
        "C": Setting(1.0, "AdaNorm: the scale C > 0 in z = C (1 - k y) y", inclusive=False),
        "k": Setting(0.1, "AdaNorm: the slope k >= 0 in z = C (1 - k y) y"),
    }
    C: float
    k: float

    def __init__(
        self,
        normalized_shape: int | Iterable[int],
        eps: float = 1e-5,
        C: float = 1.0,
        k: float = 0.1,
        **layout: Any,
    ) -> None:
        super().__init__(normalized_shape, eps, **layout)
        self._set(C=C, k=k)

    def backward_factor(self, y: Tensor) -> Tensor | None:
        return y.mul_(-self.C * self.k).add_(self.C)  # phi(y)

    def _forward(self, x: Tensor) -> Tensor:
        dtype = _output_dtype(x)
        if self.reference == "lancopku":
            y = _normalize_lancopku(_upcast(x), self.normalized_shape, self.eps)
            return ((1.0 - self.k * y.detach()) * y * self.C).to(dtype)
        arguments = (self.normalized_shape, self.eps, self.C, self.k, self.centered, dtype)
        if _is_recorded(x):
            return _adanorm_written(x, *arguments)
        if not (x.requires_grad and torch.is_grad_enabled()):
            return _adanorm_forward(x, *arguments)
        return _AdaNormFunction.apply_eager(x, arguments, self._kernel(x, dtype))


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

    norm, title, color = "detachnorm", "DetachNorm", 3
    summary = "mean and variance are constants in the backward pass"
    SETTINGS: ClassVar = {
        "detach_mean": Setting(True, "DetachNorm: let no gradient flow through the mean"),
        "detach_variance": Setting(True, "DetachNorm: let no gradient flow through the standard deviation"),
    }
    detach_mean: bool
    detach_variance: bool

    def __init__(
        self,
        normalized_shape: int | Iterable[int],
        eps: float = 1e-5,
        detach_mean: bool = True,
        detach_variance: bool = True,
        **layout: Any,
    ) -> None:
        super().__init__(normalized_shape, eps, **layout)
        self._set(detach_mean=detach_mean, detach_variance=detach_variance)
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

    def _forward(self, x: Tensor) -> Tensor:
        dtype, flags = _output_dtype(x), (self.detach_mean, self.detach_variance)
        if self.reference == "lancopku":
            return _normalize_lancopku(_upcast(x), self.normalized_shape, self.eps, *flags).to(dtype)
        arguments = (self.normalized_shape, self.eps, self.centered, *flags, dtype)
        if _is_recorded(x):
            return _detachnorm_written(x, *arguments)
        return _DetachNormFunction.apply_eager(x, arguments, self._kernel(x, dtype))


class NoNorm(SwappedNorm):
    """The paper's "w/o Norm": returns a copy of its input. A copy, as models write in place into what a norm returns
    (Mixtral's jitter), which must not reach the residual stream."""

    norm = "none"
    title, summary, color = "w/o Norm", "no normalisation", 2
    normalizes, is_identity = False, True

    def _forward(self, x: Tensor) -> Tensor:
        return x.clone()


class DyT(SwappedNorm):
    """Dynamic Tanh: z = gain * tanh(alpha * x) + bias with learned gain, bias and alpha, in place of a norm.

    Zhu et al., "Transformers without Normalization", CVPR 2025, arXiv:2503.10622.

    `patch_model` copies gain and bias of the norm that it replaces; alpha, one number, starts from 0.5. There is no
    mean and no variance: eps, centered and reference have no effect. The parameters are called `dyt_gain`, `dyt_bias`
    (each of normalized_shape) and `dyt_alpha`, which no loader takes for those of a LayerNorm.

    Args:
        normalized_shape: the trailing dimensions of gain and bias, an integer or several.
        eps: kept for the norm that it replaced; >= 0.
        channels_first: gain and bias belong to axis 1 of (N, C, ...) instead of the last axis.

    Raises:
        TypeError, ValueError: for an argument of the wrong type or out of range.

    Example:
        >>> DyT(2)(torch.tensor([[0.0, 1e9]])).tolist()
        [[0.0, 1.0]]
    """

    norm, title, color = "dyt", "DyT", 4
    summary = "gain * tanh(alpha * x) + bias"
    normalizes, keeps_affine = False, True
    initial: ClassVar = {"dyt_bias": 0.0, "dyt_alpha": 0.5}

    def __init__(self, normalized_shape: int | Iterable[int], eps: float = 1e-5, **layout: Any) -> None:
        super().__init__(normalized_shape, eps, **layout)
        for name, shape in (("gain", self.normalized_shape), ("bias", self.normalized_shape), ("alpha", (1,))):
            self.register_parameter(f"dyt_{name}", nn.Parameter(self.weight.new_empty(shape)))
        self.reset_parameters()

    def affine(self) -> dict[str, Tensor]:
        return {key: self.get_parameter(f"dyt_{key}") for key in ("gain", "bias")}

    def _forward(self, x: Tensor) -> Tensor:
        gain, bias, alpha = (_upcast(self.get_parameter(f"dyt_{name}")) for name in ("gain", "bias", "alpha"))
        return (gain * torch.tanh(alpha * _upcast(x)) + bias).to(_output_dtype(x))


NORM_CLASSES: dict[str, type[SwappedNorm]] = {
    cls.norm: cls for cls in (LayerNormSimple, AdaNorm, NoNorm, DetachNorm, DyT)
}

# -------------------------------------------------------------------------------------------------- the spec

# Far beyond any model: what is larger is no spec of ours.
_MAX_GROUPS, _MAX_MODULES, _MAX_NAME = 10_000, 100_000, 512
_OVERRIDE_KEYS = ("centered", "eps", "channels_first", "normalized_shape", "reference")


@dataclass(frozen=True, kw_only=True)
class NormGroup:
    """Modules that share their settings, one entry of the spec's `groups`.

    Settings that do not belong to `norm` stay at None, and so does what is read off the replaced module.
    """

    norm: str
    """One of NORM_CLASSES, such as "adanorm"."""
    modules: tuple[str, ...]
    """Names relative to the base model, such as "encoder.layer.*.output.LayerNorm"; `*` stands for one number,
    a leading `^` marks a module outside the base model, such as "^cls.predictions.transform.LayerNorm".
    They are those of the checkpoint's keys, see `spec_names`."""
    C: float | None = None
    k: float | None = None
    detach_mean: bool | None = None
    detach_variance: bool | None = None
    centered: bool | None = None
    """False for y = x / rms(x); None is True."""
    eps: float | None = None
    channels_first: bool | None = None
    normalized_shape: tuple[int, ...] | None = None
    reference: str | None = None
    """Of a norm put in by hand, "lancopku"; None is "paper"."""

    @property
    def kind(self) -> type[SwappedNorm]:
        """The class of the norm."""
        return NORM_CLASSES[self.norm]

    def settings(self) -> dict[str, Any]:
        """Those that belong to `norm`, by name."""
        return {key: getattr(self, key) for key in self.kind.SETTINGS}

    def to_dict(self) -> dict[str, Any]:
        out = {key: value for key, value in dataclasses.asdict(self).items() if value is not None}
        if "normalized_shape" in out:
            out["normalized_shape"] = list(out["normalized_shape"])
        out["modules"] = list(out.pop("modules"))
        return out

    @classmethod
    def from_dict(cls, data: Any) -> NormGroup:
        """Inverse of `to_dict`; every value is checked (TypeError, ValueError)."""
        if not isinstance(data, Mapping):
            raise TypeError(f"a group of the adanorm spec must be an object, got {short_repr(data)}")
        norm = data.get("norm")
        if not isinstance(norm, str) or norm not in NORM_CLASSES:
            raise ValueError(f"norm must be one of {sorted(NORM_CLASSES)}, got {short_repr(norm)}")
        allowed = {"norm", "modules", *(own := NORM_CLASSES[norm].SETTINGS), *_OVERRIDE_KEYS}
        if unknown := [key for key in data if key not in allowed]:
            raise ValueError(f"{short_repr(unknown[0])} is no setting of norm {norm!r}; known are {sorted(allowed)}")
        modules = data.get("modules")
        if not isinstance(modules, (list, tuple)) or not all(isinstance(name, str) for name in modules):
            raise TypeError(f"modules must be a list of names, got {short_repr(modules)}")
        if len(modules) > _MAX_MODULES:
            raise ValueError(f"modules holds {len(modules)} names, at most {_MAX_MODULES} are read")
        for name in modules:
            _check_name(name)
        settings = {key: data[key] for key in allowed - {"norm", "modules"} if data.get(key) is not None}
        settings |= {key: own[key].check(key, settings[key]) for key in own if key in settings}
        settings |= {key: _check_bool(key, settings[key]) for key in ("centered", "channels_first") if key in settings}
        if "eps" in settings:
            settings["eps"] = check_number("eps", settings["eps"], minimum=0.0, inclusive=True)
        if "normalized_shape" in settings:
            settings["normalized_shape"] = _check_shape(settings["normalized_shape"])
        if "reference" in settings and _check_reference(settings["reference"]) == "paper":
            del settings["reference"]
        if "reference" in settings and settings.get("centered") is False:
            raise ValueError(f'reference="{settings["reference"]}" subtracts the mean: centered must not be False')
        if settings.get("detach_mean") is False and settings.get("detach_variance") is False:
            raise ValueError("detach_mean and detach_variance are both False: set at least one to True")
        return cls(norm=norm, modules=tuple(modules), **settings)


@dataclass(frozen=True, kw_only=True)
class AdaNormSpec:
    """What was swapped in a model: the value of `config.adanorm`, as a dictionary there.

    >>> spec = AdaNormSpec(groups=(NormGroup(norm="adanorm", C=1.0, k=0.1, modules=("encoder.layer.*.norm",)),))
    >>> AdaNormSpec.from_dict(spec.to_dict()) == spec
    True
    """

    groups: tuple[NormGroup, ...]
    biases: tuple[str, ...] = ()
    """Linear layers that were given a bias by a fold, named as in `NormGroup.modules`."""
    eps: tuple[tuple[str, float], ...] = ()
    """(name, eps) of norms that were not swapped but whose eps a fold adjusted."""
    version: str = __version__
    """Of hf_adanorm, when the spec was written."""

    def to_dict(self) -> dict[str, Any]:
        """The spec as JSON types: {"format": 1, "version": "0.1.0", "groups": [{"norm": ..., "modules": [...]}]}, and
        "biases": [...] and "eps": {name: value} where there are any."""
        out: dict[str, Any] = {
            "format": FORMAT,
            "version": self.version,
            "groups": [group.to_dict() for group in self.groups],
        }
        if self.biases:
            out["biases"] = list(self.biases)
        if self.eps:
            out["eps"] = dict(self.eps)
        return out

    def names(self) -> list[str]:
        """Every name in it."""
        return [*(name for group in self.groups for name in group.modules), *self.biases, *(n for n, _ in self.eps)]

    def renamed(self, names: Mapping[str, str]) -> AdaNormSpec:
        """The same with other names, those of today in place of those that are gone."""
        if not names:
            return self
        return dataclasses.replace(
            self,
            groups=tuple(
                dataclasses.replace(group, modules=tuple(names.get(name, name) for name in group.modules))
                for group in self.groups
            ),
            biases=tuple(names.get(name, name) for name in self.biases),
            eps=tuple((names.get(name, name), value) for name, value in self.eps),
        )

    @classmethod
    def from_dict(cls, data: Any) -> AdaNormSpec:
        """Inverse of `to_dict`.

        Raises:
            TypeError, ValueError: for anything that `to_dict` does not write, and for a higher format.
        """
        if isinstance(data, AdaNormSpec):
            return data
        if not isinstance(data, Mapping):
            raise TypeError(f"config.adanorm must be an object, got {short_repr(data)}")
        fmt, version = data.get("format"), data.get("version")
        if isinstance(fmt, bool) or not isinstance(fmt, int) or fmt < 1:
            raise ValueError(f"the format of config.adanorm must be a whole number >= 1, got {short_repr(fmt)}")
        if not isinstance(version, str):
            raise TypeError(f"the version of config.adanorm must be a string, got {short_repr(version)}")
        if fmt > FORMAT:
            raise ValueError(
                f"config.adanorm has format {fmt}, written by hf_adanorm {version[:40]}; hf_adanorm {__version__} "
                f"reads up to format {FORMAT}: install a newer one"
            )
        if unknown := set(data) - {"format", "version", "groups", "biases", "eps"}:
            raise ValueError(f"unknown entry {short_repr(sorted(map(str, unknown))[0])} in config.adanorm")
        groups = data.get("groups")
        if not isinstance(groups, (list, tuple)):
            raise TypeError(f"groups of config.adanorm must be a list, got {short_repr(groups)}")
        if len(groups) > _MAX_GROUPS:
            raise ValueError(f"config.adanorm holds {len(groups)} groups, at most {_MAX_GROUPS} are read")
        biases, eps = data.get("biases", []), data.get("eps", {})
        if not isinstance(biases, (list, tuple)) or not all(isinstance(name, str) for name in biases):
            raise TypeError(f"biases of config.adanorm must be a list of names, got {short_repr(biases)}")
        if not isinstance(eps, Mapping) or not all(isinstance(name, str) for name in eps):
            raise TypeError(f"eps of config.adanorm must map names to numbers, got {short_repr(eps)}")
        if max(len(biases), len(eps)) > _MAX_MODULES:
            raise ValueError(f"biases or eps of config.adanorm hold more than {_MAX_MODULES} names")
        for name in (*biases, *eps):
            _check_name(name)
        return cls(
            groups=tuple(NormGroup.from_dict(group) for group in groups),
            biases=tuple(biases),
            eps=tuple((n, check_number("eps", value, minimum=0.0, inclusive=True)) for n, value in eps.items()),
            version=version,
        )


def short_repr(value: Any) -> str:
    """A value for an error message, never long (deep nesting would even raise in repr)."""
    plain = (str, int, float, bool, type(None))
    short_list = isinstance(value, (list, tuple)) and len(value) <= 8 and all(isinstance(v, plain) for v in value)
    if isinstance(value, plain) or short_list:
        text = repr(value)
        return text if len(text) <= 80 else text[:77] + "..."
    return f"a value of type {type(value).__name__}"


def _typed(value: Any) -> str:
    text = short_repr(value)
    return text if text.endswith(f"of type {type(value).__name__}") else f"{text} of type {type(value).__name__}"


def _is_name(name: str) -> bool:
    parts = name.removeprefix("^").split(".")
    return len(name) <= _MAX_NAME and all(
        part == "*" or part.replace("-", "_").isidentifier() or part.isdigit() for part in parts
    )


def _check_name(name: str) -> None:
    if not _is_name(name):
        raise ValueError(f"{short_repr(name)} is not the name of a module")


# ------------------------------------------------------------------------------------------------- the names

# transformers renames modules from one version to the next, and converts the keys of older checkpoints as it loads
# them; saving converts back. The names in a spec are such keys, too, so they last as long as the weights load.


def base_prefix(model: nn.Module) -> str | None:
    """`"bert."` for a model with a head around its base model, None for a base model or a plain module."""
    prefix = getattr(model, "base_model_prefix", "")
    base = getattr(model, prefix, None) if prefix else None
    return f"{prefix}." if isinstance(base, nn.Module) and base is not model else None


def number_template(name: str) -> str:
    """ "encoder.layer.3.norm" -> "encoder.layer.*.norm" """
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _numbers(name: str) -> tuple[str, ...]:
    return tuple(part for part in name.split(".") if part == "*" or part.isdigit())


def matches(pattern: str, name: str) -> bool:
    """Whether `pattern`, in which `*` stands for a number, means `name`, of as many parts."""
    pairs = zip(pattern.split("."), name.split("."), strict=True)
    return all(want == part or (want == "*" and part.isdigit()) for want, part in pairs)


def _renamings(model: nn.Module) -> list[Any]:
    """How transformers renames what `model` holds when it saves, in order. Left out, as transformers does for a model
    that was not loaded: prefixes, which a checkpoint may or may not have."""
    owner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if owner is None:
        return []
    found = [c for c in get_model_conversion_mapping(owner, add_legacy=False) if isinstance(c, WeightRenaming)]
    return [c.reverse_transform() for c in reversed(found) if type(c).__name__ != "PrefixChange"]


def plain_name(name: str, prefix: str | None) -> str:
    """The name of a module relative to the base model, whose own names start with `prefix`; "^..." outside it."""
    return name.removeprefix(prefix or "") if prefix is None or name.startswith(prefix) else f"^{name}"


def spec_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """The name in a spec of each of the modules of `model` that `names` names: as in the keys of its checkpoint,
    relative to the base model. The base model's own renamings count inside it, so that heads make no difference."""
    prefix = base_prefix(model)
    inside = _renamings(model if prefix is None else getattr(model, prefix[:-1]))
    outside = [] if prefix is None else _renamings(model)
    found = {}
    for name in names:
        plain = plain_name(name, prefix)
        key = f"{plain.removeprefix('^')}.weight"
        for renaming in outside if plain.startswith("^") else inside:
            key = renaming.rename_source_key(key)[0]
        lasting = ("^" if plain.startswith("^") else "") + key.removesuffix(".weight")
        found[name] = lasting if key.endswith(".weight") and _is_name(lasting) else plain
    ambiguous = {lasting for lasting, count in Counter(found.values()).items() if count > 1}
    return {name: plain_name(name, prefix) if lasting in ambiguous else lasting for name, lasting in found.items()}


def find_modules(
    model: nn.Module, spec: AdaNormSpec, modules: Iterable[tuple[str, nn.Module]]
) -> tuple[AdaNormSpec, dict[str, dict[str, nn.Module]]]:
    """What each name of `spec` means among the named `modules` of `model`, {} for one that it does not have.

    A name is looked for as the checkpoint's key and as the module's own. Where another version of transformers wrote
    it and it is neither, it is recognised by its place (`_renamed_by_place`): the spec that comes back has the name
    of today for it.
    """
    by_name = dict(modules)
    prefix = base_prefix(model)
    tables = [spec_names(model, by_name), {name: plain_name(name, prefix) for name in by_name}]
    indices: list[dict[str, list[tuple[str, str]]]] = []
    for table in tables:
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

    found = {pattern: look(pattern) for pattern in spec.names()}
    config = getattr(model, "config", None)
    written = getattr(config, "transformers_version", None)
    if all(found.values()) or written in (None, transformers.__version__):
        return spec, found
    claimed = {name for hits in found.values() for name in hits}
    free = [tables[0][name] for name, module in by_name.items() if name not in claimed and _has_gain(name, module)]
    part = type(model).__name__ not in (getattr(config, "architectures", None) or ())
    settings: dict[str, Any] = {n: dataclasses.replace(g, modules=()) for g in spec.groups for n in g.modules}
    settings |= {**dict.fromkeys(spec.biases), **dict(spec.eps)}
    renamed = _renamed_by_place([pattern for pattern, hits in found.items() if not hits], free, settings, part)
    spec = spec.renamed(renamed)
    found = {
        renamed.get(pattern, pattern): hits or look(renamed.get(pattern, pattern)) for pattern, hits in found.items()
    }
    # A part, such as T5's decoder, is built by itself before the whole, which has the names of all its parts.
    inside = tuple(f".{number_template(name)}" for name in free) if part else ()
    if not any(found.values()) and not any(number_template(name).endswith(inside) for name in found):
        warnings.warn(
            f"config.adanorm, written with transformers {short_repr(written)}, names {len(found)} modules, such as "
            f"{next(iter(found))!r}, of which this model has none under transformers {transformers.__version__}. If "
            "loading stops with a size mismatch, they were renamed: load with the version that wrote them",
            stacklevel=2,
        )
    return spec, found


def _renamed_by_place(
    lost: Iterable[str], free: Iterable[str], settings: Mapping[str, Any] | None = None, part: bool = False
) -> dict[str, str]:
    """Names of today for names of `spec` that are gone: the part from the first number on is the same, or without
    numbers the last part, and as many norms with that ending are `free` as are `lost`; they keep their order.
    A wrong guess would stop the load: the checkpoint holds one element for a swapped norm, and a gain for another.
    Among swapped norms nothing would, so those with that ending must have the same `settings` at the same numbers."""

    def by_ending(names: Iterable[str]) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for template in dict.fromkeys(map(number_template, names)):
            before, star, after = template.partition("*")
            found.setdefault(star + after or before.rpartition(".")[2], []).append(template)
        return found

    # A part of a model can become its base model, and the other way round.
    lost, free = list(lost), list(free)
    swapped = {name: name[1:] if name.startswith("^") else f"^{name}" for name in lost}
    templates = set(map(number_template, free))
    renamed = {name: other for name, other in swapped.items() if number_template(other) in templates}
    candidates = by_ending(name for name in free if not name.startswith("^"))
    today: dict[str, str] = {}
    said: dict[str, set[Any]] = {}

    def differ(one: str, other: str) -> bool:
        pairs = ((n, x, m, y) for n, x in said[one] for m, y in said[other])
        return any(x != y and all(a == b or "*" in (a, b) for a, b in zip(n, m, strict=False)) for n, x, m, y in pairs)

    for name in lost:
        said.setdefault(number_template(name), set()).add((_numbers(name), (settings or {}).get(name)))
    for ending, gone in by_ending(n for n in lost if n not in renamed and not n.startswith("^")).items():
        if len(there := candidates.get(ending, [])) != len(gone):
            continue
        if (found := next(((a, b) for a, b in itertools.combinations(gone, 2) if differ(a, b)), None)) is not None:
            if not part:
                warnings.warn(
                    f"config.adanorm names modules that were renamed, and {found[0]!r} and {found[1]!r} have other "
                    f"settings: which of {', '.join(there)} is which cannot be told. Load with the version of "
                    "transformers that wrote them",
                    stacklevel=2,
                )
            continue
        pairs = dict(zip(gone, there, strict=True))
        # A part of what was saved, such as T5's decoder, has the names of another part, seen from inside.
        if not (part and any(old.endswith(f".{new}") for old, new in pairs.items())):
            today.update(pairs)
    for name in lost:
        if (template := today.get(number_template(name))) is not None:
            numbers = iter(_numbers(name))
            renamed[name] = ".".join(next(numbers) if part == "*" else part for part in template.split("."))
    return renamed


def _has_gain(name: str, module: nn.Module) -> bool:
    return _may_be_norm(name, module, False) and isinstance(getattr(module, "weight", None), Tensor)


# --------------------------------------------------------------------------------------------------- the loader


def source_settings(module: nn.Module) -> dict[str, Any]:
    """What can be read off a norm without running it: eps, normalized_shape, channels_first (missing: not known), and
    of a swapped one its reference."""
    if is_swapped(module):
        return {key: getattr(module, key) for key in _OVERRIDE_KEYS[1:]}
    found: dict[str, Any] = {"channels_first": getattr(module, "data_format", None) == "channels_first"}
    for key in ("eps", "variance_epsilon"):
        if isinstance(value := getattr(module, key, None), float):
            found["eps"] = value
            break
    shape = getattr(module, "normalized_shape", None)
    if shape is None:
        weight = getattr(module, "weight", None)
        shape = tuple(weight.shape) if isinstance(weight, Tensor) else None
    if isinstance(shape, int):
        shape = (shape,)
    if isinstance(shape, (tuple, list)) and shape and all(isinstance(n, int) and n > 0 for n in shape):
        found["normalized_shape"] = tuple(shape)
    return found


def make_norm(source: nn.Module, group: NormGroup) -> SwappedNorm:
    """The norm that takes the place of `source`: settings from the group, and from `source` what the group leaves
    open. dtype, device, training flag and hooks carry over; `source` itself is kept, untouched, for unpatching."""
    found = source_settings(source)
    overrides = {key: getattr(group, key) for key in _OVERRIDE_KEYS[1:] if getattr(group, key) is not None}
    missing = [key for key in ("eps", "normalized_shape") if key not in found and key not in overrides]
    if missing:
        raise ValueError(f"{missing[0]} of {type(source).__name__} is not known: the spec must say it")
    settings = {key: value for key, value in group.settings().items() if value is not None}
    tensor = next((t for t in (*source.parameters(), *source.buffers()) if t.is_floating_point()), None)
    where: dict[str, Any] = {} if tensor is None else {"device": tensor.device, "dtype": tensor.dtype}
    centered = group.centered is not False
    new = NORM_CLASSES[group.norm](**{**found, **overrides}, **settings, centered=centered, **where)
    if type(new) is type(source):  # what one of its kind has learned
        new._parameters.update(source._parameters)
    new.train(source.training)
    if is_swapped(source):
        overrides = {**source.__dict__["_overrides"], **overrides}
        new.__dict__["_source"] = source.__dict__["_source"]
        new.__dict__["_source_has_values"] = source.__dict__["_source_has_values"]
        if ADJUSTED_EPS in source.__dict__ and new.eps == source.eps:
            new.__dict__[ADJUSTED_EPS] = True
    else:
        new.__dict__["_source"] = source
        if source.__dict__.get(ADJUSTED_EPS):  # the config's eps is another
            overrides.setdefault("eps", new.eps)
    new.__dict__["_overrides"] = overrides
    names = [] if (stock := new.__dict__["_source"]) is None else list(stock._parameters)
    if names and "weight" not in names and not hasattr(new, names[0]):
        # Where the norm calls its gain "gamma" or "scale", the tripwire stands under that name.
        new.register_buffer(names[0], torch.ones_like(new.weight))
        new._non_persistent_buffers_set.add("weight")
    for key in (
        *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks"),
        *("_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
    ):
        new.__dict__[key] = source.__dict__[key]
    return new


def replace_modules(model: nn.Module, replacements: Mapping[int, nn.Module]) -> None:
    """Put `replacements[id(old)]` wherever `old` is a submodule of `model`, under every name it has."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in replacements:
                parent._modules[name] = replacements[id(child)]
    _ignore_in_ddp(model)
    _choose_encoder_path(model)


def _choose_encoder_path(model: nn.Module) -> None:
    """torch's own TransformerEncoderLayer has a fused inference path that reads the norms' weights and computes
    LayerNorm itself: a layer with a swapped norm must not take it, one without may again."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            flag = "activation_relu_or_gelu"  # 0: neither, which rules the fused path out
        elif isinstance(module, nn.TransformerEncoder):
            flag = "use_nested_tensor"
        else:
            continue
        if any(is_swapped(child) for child in module.modules()):
            module.__dict__.setdefault("_adanorm_" + flag, getattr(module, flag))
            setattr(module, flag, 0)
        elif "_adanorm_" + flag in module.__dict__:
            setattr(module, flag, module.__dict__.pop("_adanorm_" + flag))


def apply_spec(model: nn.Module, spec: AdaNormSpec) -> None:
    """Swap exactly the modules that `spec` names; names that `model` does not have (another head) are passed over.

    Raises:
        ValueError: a name belongs to a module that cannot be a norm. Nothing was swapped then.
    """
    today, found = find_modules(model, spec, model.named_modules())

    def check_norm(name: str, module: nn.Module, knows_eps: bool = True) -> None:
        if not _may_be_norm(name, module, knows_eps):
            raise ValueError(
                f"config.adanorm names {name!r}, which is a {type(module).__name__} and no normalisation layer"
            )

    swaps: dict[int, tuple[str, nn.Module, NormGroup]] = {}  # the last group that names a module decides, once
    for group in today.groups:
        for pattern in dict.fromkeys(group.modules):
            swaps |= {id(module): (name, module, group) for name, module in found[pattern].items()}
    replacements: dict[int, nn.Module] = {}
    for key, (name, module, group) in swaps.items():
        if not is_as(module, group):
            check_norm(name, module, group.eps is not None)
            replacements[key] = make_norm(module, group)
    without_bias: list[nn.Module] = []
    for name, module in (pair for pattern in today.biases for pair in found[pattern].items()):
        if not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            raise ValueError(f"config.adanorm gives a bias to {name!r}, a {type(module).__name__} and no linear layer")
        if module.bias is None:
            without_bias.append(module)
    for name, module in (pair for pattern, _ in today.eps for pair in found[pattern].items()):
        check_norm(name, module)
    for module in without_bias:
        weight = cast(Tensor, module.weight)
        module.bias = nn.Parameter(torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device))
        module.__dict__[ADDED_BIAS] = True
    for pattern, value in today.eps:
        for module in found[pattern].values():
            setattr(module, "variance_epsilon" if hasattr(module, "variance_epsilon") else "eps", value)
            module.__dict__[ADJUSTED_EPS] = True
    replace_modules(model, replacements)
    if isinstance(model, PreTrainedModel):
        ignored: Any = model._keys_to_ignore_on_load_unexpected  # a set, a list or None
        model._keys_to_ignore_on_load_unexpected = (set if isinstance(ignored, set) else list)(
            [*(ignored or ()), NOTICE]
        )
    if today != spec:
        cast(PreTrainedModel, model).config.adanorm = today.to_dict()


def add_notice(model: nn.Module, state_dict: dict[str, Any]) -> None:
    """Give `state_dict` of `model` a further key, in the place of a swapped norm, that ends in NOTICE. A stock loader
    shows it in its report, above the error that the norms' sizes cause. It is no number of the model: one byte."""
    for name, module in model.named_modules():
        if is_swapped(module) and any(f"{name}.{buffer}" in state_dict for buffer in module._buffers):
            state_dict[f"{name}.{NOTICE}"] = torch.zeros(1, dtype=torch.uint8)
            return


@contextlib.contextmanager
def noticed(model: nn.Module) -> Iterator[None]:
    """While `model` is being saved, what `state_dict` gives has the notice."""
    register: Any = model._register_state_dict_hook
    handle = register(lambda module, state_dict, prefix, metadata: add_notice(module, state_dict))
    try:
        yield
    finally:
        handle.remove()


def is_as(module: nn.Module, group: NormGroup) -> bool:
    """Whether `module` is already swapped with the settings of `group`, by the base model inside a model say."""
    if not is_swapped(module) or module.norm != group.norm:
        return False
    wanted = {key: getattr(group, key) for key in (*group.kind.SETTINGS, *_OVERRIDE_KEYS[1:])}
    same = all(value is None or getattr(module, key) == value for key, value in wanted.items())
    return same and bool(module.centered == (group.centered is not False))


def _may_be_norm(name: str, module: nn.Module, knows_eps: bool) -> bool:
    """Whether a spec, which a stranger may have written, may name this module: a norm with a gain and perhaps a bias,
    of one shape, or one without, if its class or its place in the model is called after a norm or it has an eps."""
    if is_swapped(module) or isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return True
    cls, place = type(module).__name__, name.rpartition(".")[2].lower()
    if type(module).__module__.startswith("torch.") or isinstance(module, _NO_NORMS):
        return False  # an activation, dropout, a linear layer
    shapes = {tuple(getattr(p, "ds_shape", p.shape)) for p in module.parameters()}
    called_norm = "norm" in (cls + place).lower() or "LN" in cls or place.startswith("ln")
    if not called_norm and (not (knows_eps or "eps" in source_settings(module)) or {len(s) for s in shapes} != {1}):
        return False
    return len(shapes) <= 1 and len(list(module.parameters())) <= 2 and sum(1 for _ in module.modules()) <= 3


_NO_NORMS = (
    *(nn.Linear, nn.Embedding, nn.modules.conv._ConvNd, nn.MultiheadAttention),
    *(nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LocalResponseNorm, nn.CrossMapLRN2d),
)


class _IgnoredInDDP(list[str]):
    """The names that DistributedDataParallel does not broadcast at every forward pass: the user's, which are the
    list's own, and the buffers of the norms that are swapped in `model` when it is asked, as those never change."""

    def __init__(self, theirs: Iterable[str], model: nn.Module) -> None:
        super().__init__(theirs)
        self._model = weakref.ref(model)

    def _ours(self) -> list[str]:
        model = self._model()
        named = model.named_modules() if model is not None else ()
        return [f"{name}.{buffer}" for name, m in named if is_swapped(m) for buffer in m._buffers]

    def __iter__(self) -> Iterator[str]:
        return iter([*super().__iter__(), *self._ours()])

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in self._ours()

    def __reduce__(self) -> tuple[Any, ...]:  # a copy of the model has one that means the copy
        return type(self), (list(super().__iter__()), self._model())


def _ignore_in_ddp(model: nn.Module) -> None:
    key = "_ddp_params_and_buffers_to_ignore"
    before = getattr(model, key, ())
    if not isinstance(before, _IgnoredInDDP):
        model.__dict__[key] = _IgnoredInDDP(before, model)


# ----------------------------------------------------------------------------------------------- the classes

_CLASSES: dict[str, type[PreTrainedModel]] = {}


def _installed_package_serves() -> bool:
    """Whether hf_adanorm is installed and reads what this copy of the file writes (its import sets up its hooks)."""
    if __name__ == "hf_adanorm.modeling_adanorm":
        return True
    if importlib.util.find_spec("hf_adanorm") is None:
        return False
    installed = importlib.import_module("hf_adanorm.modeling_adanorm")
    return bool(installed.FORMAT >= FORMAT)


def __getattr__(name: str) -> Any:
    """`BertModel` and the like: the class of transformers of that name, made to apply the spec in its config."""
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in _CLASSES:
        stock = getattr(transformers, name, None)
        if not (isinstance(stock, type) and issubclass(stock, PreTrainedModel)):
            raise AttributeError(
                f"module {__name__!r} has no attribute {name!r}, and it is no model class of transformers"
            )
        make = _handover_class if _installed_package_serves() else _applying_class
        _CLASSES[name] = make(stock)
    return _CLASSES[name]


def _handover_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """With the package present its hooks apply the spec: models come out as instances of the stock class."""

    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        return stock.from_pretrained(*args, **kwargs)

    def _from_config(cls: type, *args: Any, **kwargs: Any) -> Any:
        return stock._from_config(*args, **kwargs)  # type: ignore[no-untyped-call]

    def register_for_auto_class(cls: type, auto_class: Any = "AutoModel") -> None:
        """Nothing: it would make transformers take the class for foreign code."""

    methods: dict[str, Any] = {
        f.__name__: classmethod(f) for f in (from_pretrained, _from_config, register_for_auto_class)
    }
    return type(stock.__name__, (stock,), {"__module__": __name__, "__qualname__": stock.__name__, **methods})


def _applying_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Without the package: a subclass that applies the specs of its config and of the configs nested in it."""

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        stock.__init__(self, config, *args, **kwargs)
        for module in list(self.modules()):
            if isinstance(module, PreTrainedModel) and getattr(module.config, "adanorm", None) is not None:
                apply_spec(module, AdaNormSpec.from_dict(module.config.adanorm))
        if isinstance(auto_map := getattr(self.config, "auto_map", None), dict):
            # "user/repo--modeling_adanorm.BertModel" after a pull: the file travels on with the next save.
            self.config.auto_map = {
                key: ref.rpartition("--")[2] if isinstance(ref, str) and is_own_reference(ref) else ref
                for key, ref in auto_map.items()
            }
            # transformers < 5.13 copies the file of such a class for unknown architectures only
            own = f"{__name__.rpartition('.')[2]}.{stock.__name__}"
            if self._auto_class is None and own in self.config.auto_map.values():
                self._auto_class = next(key for key, ref in self.config.auto_map.items() if ref == own)

    def is_custom_code(cls: type) -> bool:
        """False: it is the stock architecture, and must keep transformers' checkpoint key conversions."""
        return False

    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> None:
        with noticed(self):
            stock.save_pretrained(self, *args, **kwargs)

    methods: dict[str, Any] = {
        "__init__": init,
        "is_custom_code": classmethod(is_custom_code),
        "save_pretrained": save_pretrained,
    }
    return type(stock.__name__, (stock,), {"__module__": __name__, "__qualname__": stock.__name__, **methods})


def is_own_reference(reference: str) -> bool:
    """Whether an `auto_map` entry such as "modeling_adanorm.BertModel" points to this file."""
    return reference.rpartition("--")[2].startswith("modeling_adanorm.")
