"""AdaNorm and its relatives in place of LayerNorm, and the loader of models that contain them.

This file travels with every saved model, so `from_pretrained(..., trust_remote_code=True)` rebuilds it where
hf_adanorm is not installed. It needs torch and transformers only, opens no file and starts no process.
Holder: `SwappedNorm` is the base of the built-in norms, `Held` puts a class of the author's in its place.
Norms: those of Xu et al., NeurIPS 2019 (arXiv:1911.07013), and DyT. Spec: `config.adanorm` lists what was swapped.
Names: its names are keys of the checkpoint. Loader: `apply_spec` swaps exactly the named modules of a model that was
just built, before its weights load; `model_classes` makes the classes that `auto_map` in config.json names.
"""

from __future__ import annotations

import inspect
import math
import numbers
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

__version__, FORMAT = "0.1.0", 1  # of the spec; a reader refuses a higher format
# Marks in the __dict__ of stock modules that a fold changed beyond their tensors, for the spec.
ADDED_BIAS, ADJUSTED_EPS = "_adanorm_added_bias", "_adanorm_adjusted_eps"
# How a key in saved checkpoints ends that no model has: loaders that do not know this file list it in their report.
NOTICE = "`import hf_adanorm` or trust_remote_code=True is needed"

# ------------------------------------------------------------------------------------------------ the holder

LAYOUT = ("centered", "eps", "channels_first", "normalized_shape", "reference", "output_dtype")


def settings_of(cls: type) -> dict[str, Any]:
    """Return the settings of a norm class, the keyword-only parameters of its constructor, with their defaults."""
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        if base is not nn.Module and "__init__" in vars(base):
            parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
            own = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
            found = {k: v for k, v in {**own, **found}.items() if k not in (*LAYOUT, "device", "dtype")}
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):  # which hands on to the base class
                break
    return found


def short_repr(value: Any) -> str:
    """Return a value for an error message, never long (deep nesting would even raise in repr)."""
    plain = (str, int, float, bool, type(None))
    if isinstance(value, int) and abs(value) > 2**1000:
        return f"an integer of {value.bit_length()} bits"
    short_list = isinstance(value, (list, tuple)) and len(value) <= 8 and all(isinstance(v, plain) for v in value)
    text = repr(value) if isinstance(value, plain) or short_list else f"a value of type {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


def check(condition: bool, what: str, value: Any, error: type[Exception] = ValueError) -> None:
    """Raise `error` with `what` and the value unless the condition holds."""
    if not condition:
        raise error(f"{what}, got {short_repr(value)}")


def check_number(name: str, value: Any, *, minimum: float = 0.0, inclusive: bool = True) -> float:
    """Return `value` as a float. Raise TypeError or ValueError if it is no number or out of range."""
    check(
        isinstance(value, numbers.Real) and not isinstance(value, bool), f"{name} must be a number", value, TypeError
    )
    inside = minimum <= value <= torch.finfo(torch.float32).max and (inclusive or value != minimum)
    check(inside, f"{name} must be a finite number {'>=' if inclusive else '>'} {minimum:g}", value)
    return float(value)


def check_bool(name: str, value: Any) -> bool:
    """Return `value`. Raise TypeError if it is not True or False."""
    check(isinstance(value, bool), f"{name} must be True or False", value, TypeError)
    return cast(bool, value)


def _check_shape(value: Any) -> tuple[int, ...]:
    shape = (value,) if isinstance(value, int) else tuple(value) if isinstance(value, (list, tuple)) else ()
    fine = shape and all(isinstance(n, int) and not isinstance(n, bool) and 1 <= n < 2**31 for n in shape)
    check(bool(fine), "normalized_shape must be one or more integers >= 1", value)
    return shape


def _drop_notice(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    state_dict.pop(prefix + NOTICE, None)


class SwappedNorm(nn.Module):
    """Base of the norms that take the place of a LayerNorm or RMSNorm.

    The one-element buffer `weight` takes no part in the computation. In a checkpoint it stands where a LayerNorm looks
    for its gain, so a loader that does not know these norms stops with a size mismatch.

    Args:
        normalized_shape: trailing dimensions to normalize.
        eps: added to the variance; >= 0.
        centered: False computes x / rms(x), as RMSNorm does.
        channels_first: normalize axis 1 of (N, C, *).
        reference: "paper", or "lancopku" for the formula in the authors' code, (x - mean) / (std + eps).
        output_dtype: None returns what nn.LayerNorm returns, "weight" the dtype of `weight` (T5), "promote" the wider.
    """

    is_adanorm_module: ClassVar[bool] = True  # recognized whichever copy of this file made the class
    norm_name: str = ""
    plain_settings: ClassVar[dict[str, Any] | None] = None  # with which it is exactly N(x), without gain and bias
    elementwise_affine, bias = False, None
    weight: Tensor

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
        self.normalized_shape, self.eps = _check_shape(normalized_shape), check_number("eps", eps)
        self.centered, self.channels_first = (
            check_bool("centered", centered),
            check_bool("channels_first", channels_first),
        )
        check(reference in ("paper", "lancopku"), 'reference must be "paper" or "lancopku"', reference)
        check(output_dtype in (None, "weight", "promote"), 'output_dtype must be "weight" or "promote"', output_dtype)
        one = not channels_first or len(self.normalized_shape) == 1
        check(one, "channels_first normalizes one dimension: wrong normalized_shape", normalized_shape)
        if reference == "lancopku" and not (centered and math.prod(self.normalized_shape) > 1):
            raise ValueError('reference="lancopku" needs centered=True and at least 2 elements in normalized_shape')
        self.reference, self.output_dtype = reference, output_dtype
        self.register_buffer("weight", torch.ones(1, device=device, dtype=dtype))
        self.register_load_state_dict_pre_hook(_drop_notice)  # type: ignore[no-untyped-call]

    variance_epsilon = property(lambda self: self.eps)  # the name that some models read
    inner = property(lambda self: self)  # the module that computes: this one, or the author's

    def settings(self) -> dict[str, Any]:
        """Return the settings of this kind of norm, by name."""
        return {name: getattr(self, name) for name in settings_of(type(self))}

    def fresh(self, **changes: Any) -> SwappedNorm:
        """Return a new norm with the same arguments, except for `changes`, on the CPU; the constructor checks them."""
        layout = {key: getattr(self, key) for key in LAYOUT}
        return type(self)(**layout, **{**self.settings(), **changes}, device="cpu")

    def get_extra_state(self) -> Tensor:
        """Return the numbers among the settings. The state dict holds them, so every checkpoint restores them."""
        values = [float(value) for value in self.settings().values() if isinstance(value, (int, float))]
        # The leading 1 is the format; it also keeps the tensor from being empty, which some savers drop.
        return torch.tensor([1.0, *values], dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what `get_extra_state` returned; the constructor checks it. That of another norm has no effect."""
        now = {name: value for name, value in self.settings().items() if isinstance(value, (int, float))}
        if state.shape != (1 + len(now),):
            return
        new: dict[str, Any] = dict(zip(now, state.tolist()[1:], strict=True))
        whole = [name for name, old in now.items() if isinstance(old, int) and new[name].is_integer()]
        new |= {name: type(now[name])(new[name]) for name in whole}
        if new != now:
            self.adopt(self.fresh(**new), new)

    def adopt(self, checked: SwappedNorm, names: Iterable[str]) -> None:
        """Take over the attributes that depend on these settings; those that only start a parameter have none."""
        each = zip(self.inner.modules(), self.fresh().inner.modules(), checked.inner.modules(), strict=True)
        for own, old, new in each:
            for key, value in vars(new).items():
                if isinstance(value, (bool, int, float, str)) and vars(old).get(key) != value:
                    setattr(own, key, value)

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
        # transformers asks before it calls the `_init_weights` of a model, which knows no norms of ours.
        if not self.__dict__.get("_is_hf_initialized", False):
            self.reset_parameters()
            self._is_hf_initialized = not any(tensor.is_meta for tensor in (*self.buffers(), *self.parameters()))
        return True

    @_is_hf_initialized.setter
    def _is_hf_initialized(self, value: bool) -> None:
        self.__dict__["_is_hf_initialized"] = value

    def run(self, x: Tensor) -> Tensor:
        """Return the output for `x`, channels last: of the first kernel that serves, or of the plain norm."""
        for kernel in KERNELS.get(self.norm_name, ()):
            if (z := kernel(self, x)) is not None:
                return z
        return self.compute(x.float()).to(output_dtype(x)) if x.dtype in HALF else self.compute(x)

    def compute(self, x: Tensor) -> Tensor:
        """Return the output for `x`, float32 or float64, of shape (*, *normalized_shape)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `x` of (*, *normalized_shape), or (N, C, *) with channels_first; the shape stays the same."""
        given: Any = x
        if not isinstance(given, Tensor) and hasattr(given, "tracer"):  # one call to torch.fx, as torch's own modules
            return cast(Tensor, given.tracer.create_proxy("call_module", given.tracer.path_of_module(self), (x,), {}))
        z = self.run(x.movedim(1, -1)).movedim(-1, 1) if self.channels_first else self.run(x)
        if self.output_dtype is None:
            return z
        wide = torch.promote_types(x.dtype, self.weight.dtype)
        return z.to(self.weight.dtype if self.output_dtype == "weight" else wide)

    def extra_repr(self) -> str:
        usual = {"centered": True, "channels_first": False, "reference": "paper", "output_dtype": None}
        shown = {key: getattr(self, key) for key, value in usual.items() if getattr(self, key) != value}
        parts = [f"{key}={value}" for key, value in {"eps": self.eps, **self.settings(), **shown}.items()]
        return ", ".join([str(self.normalized_shape), *parts])


def is_swapped(module: Any) -> TypeGuard[SwappedNorm]:
    """Tell whether `module` is a swapped norm. The class is asked, as wrappers such as PEFT's pass attributes on."""
    return bool(getattr(type(module), "is_adanorm_module", False))


class Held(SwappedNorm):
    """Hold a norm of the author's class, a plain module, in the place of the norm that it replaces."""

    def __init__(self, cls: type[nn.Module], norm_name: str, settings: Mapping[str, Any], **layout: Any) -> None:
        super().__init__(**layout)
        self.norm_name, self.given = norm_name, dict(settings)
        where = {key: layout[key] for key in ("device", "dtype") if layout.get(key) is not None}
        shape: Any = self.normalized_shape
        shape = shape[0] if len(shape) == 1 else shape
        taken = {key: value for key, value in where.items() if key in inspect.signature(cls).parameters}
        norm = cls(shape, self.eps, **settings, **taken)
        self.norm = norm if taken == where else norm.to(**where)
        for module in self.norm.modules():
            cast(Any, module)._is_hf_initialized = True  # the model's `_init_weights` must not touch it

    inner = property(lambda self: self.norm)

    def settings(self) -> dict[str, Any]:
        return {**settings_of(type(self.norm)), **self.given}

    def fresh(self, **changes: Any) -> SwappedNorm:
        layout = {key: getattr(self, key) for key in LAYOUT}
        with torch.random.fork_rng(devices=[]):  # each draws the same numbers, and the caller's stay
            return Held(type(self.norm), self.norm_name, {**self.given, **changes}, **layout, device="cpu")

    def adopt(self, checked: SwappedNorm, names: Iterable[str]) -> None:
        super().adopt(checked, names)
        self.given = {**self.given, **{name: checked.settings()[name] for name in names}}

    def backward_factor(self, y: Tensor) -> Tensor | float | None:
        own = getattr(self.norm, "backward_factor", None)
        return math.nan if own is None else own(y)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        with torch.device("cpu"):
            fresh = self.fresh().inner
        for old, new in zip(self.norm.modules(), fresh.modules(), strict=True):
            filled = old.state_dict(keep_vars=True)
            for key, value in (*new.named_parameters(recurse=False), *new.named_buffers(recurse=False)):
                if not getattr(filled.get(key), "_is_hf_initialized", False):
                    getattr(old, key).copy_(value)
            for key, value in vars(new).items():  # a plain tensor stays on the meta device
                if isinstance(value, Tensor) and not self.weight.is_meta:
                    setattr(old, key, value.to(self.weight.device))

    def run(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.norm(x)).to(output_dtype(x))


# ------------------------------------------------------------------------------------------------- the norms

# The plain norms: they run everywhere, under every transform of torch, and define what a kernel must compute.

HALF = (torch.float16, torch.bfloat16)  # computed in float32 and rounded once
# Faster forward passes by the name of the norm. Each takes (norm, x), channels last, and returns the output, or None
# to decline. The package registers them; without it the plain norms run.
KERNELS: dict[str, list[Callable[[Any, Tensor], Tensor | None]]] = {}


def output_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of nn.LayerNorm's output for `x`. Autocast decides it for half types: float32 on CUDA."""
    return F.layer_norm(x.new_empty((0, 1)), (1,)).dtype if x.dtype in HALF else x.dtype


def has_tangent(x: Tensor) -> bool:
    """Tell whether `x` carries a forward-mode tangent, which torch differentiates wrongly in F.layer_norm."""
    unpack: Any = forward_ad.unpack_dual
    return unpack(x).tangent is not None


class PlainNorm(SwappedNorm):
    """What the norms of the paper share: N(x)."""

    def normalize(self, x: Tensor, gain: Tensor | None = None) -> Tensor:
        """Return N(x), times `gain`, by torch's fused operators where their derivatives are right."""
        if not self.centered:
            return F.rms_norm(x, self.normalized_shape, gain, self.eps)
        if self.reference == "paper" and not has_tangent(x):
            return F.layer_norm(x, self.normalized_shape, gain, None, self.eps)
        deviation, rstd = self.standardize(x)
        return deviation * rstd if gain is None else deviation * rstd * gain

    def standardize(self, x: Tensor, detach_mean: bool = False) -> tuple[Tensor, Tensor]:
        """Return x - mean(x), or x if not centered, and the factor that normalizes it."""
        dims = tuple(range(-len(self.normalized_shape), 0))
        is_tracing: Any = torch.jit.is_tracing  # type: ignore[attr-defined]
        if not is_tracing() and x.shape[dims[0] :] != self.normalized_shape:
            raise RuntimeError(f"expected an input of normalized_shape {self.normalized_shape}, got {tuple(x.shape)}")
        mean = x.mean(dims, keepdim=True) if self.centered else None
        deviation = x if mean is None else x - mean
        if self.reference == "lancopku":
            rstd = 1.0 / (x.std(dims, correction=1, keepdim=True) + self.eps)
        else:
            rstd = torch.rsqrt(deviation.square().mean(dims, keepdim=True) + self.eps)
        return (deviation if mean is None or not detach_mean else x - mean.detach()), rstd


class LayerNormSimple(PlainNorm):
    """LayerNorm-simple: y = N(x) = (x - mean(x)) / sqrt(var(x) + eps), no gain, no bias (Xu et al. 2019, sec. 3).

    Takes the arguments of `SwappedNorm`.
    """

    norm_name, plain_settings = "layernorm-simple", {}

    def compute(self, x: Tensor) -> Tensor:
        return self.normalize(x)


class AdaNorm(PlainNorm):
    """AdaNorm: z = phi(y) * y with y = N(x) and phi(y) = C * (1 - k * y), a constant in the backward pass.

    With dl/dz given, dl/dy = phi(y) * dl/dz, which then flows through N as usual (Xu et al. 2019, eq. 5).

    Args:
        normalized_shape: trailing dimensions to normalize.
        eps: added to the variance; >= 0.
        C: the mean of phi over a row; > 0.
        k: how much phi falls with y; >= 0. The paper fixes k = 1/10.
        **layout: further arguments of `SwappedNorm`.

    Example:
        >>> AdaNorm(4, eps=0.0)(torch.tensor([[-1.0, 1.0, -1.0, 1.0]]))
        tensor([[-1.1000,  0.9000, -1.1000,  0.9000]])
    """

    norm_name, plain_settings = "adanorm", {"C": 1.0, "k": 0.0}

    def __init__(
        self, normalized_shape: Any, eps: float = 1e-5, *, C: float = 1.0, k: float = 0.1, **layout: Any
    ) -> None:
        super().__init__(normalized_shape, eps, **layout)
        self.C, self.k = check_number("C", C, inclusive=False), check_number("k", k)

    def backward_factor(self, y: Tensor) -> Tensor:
        return y.mul_(-self.C * self.k).add_(self.C)  # phi(y)

    def compute(self, x: Tensor) -> Tensor:
        # With u = C y, z is u - (k / C) u^2.
        if torch.compiler.is_compiling() or x.is_nested or has_tangent(x):  # C and k may vary without a new graph
            u = self.normalize(x) * self.C
            return u * (1.0 - (self.k / self.C) * u.detach())
        u = self.normalize(x, torch.full(self.normalized_shape, self.C, dtype=x.dtype, device=x.device))
        return torch.addcmul(u, u, u.detach(), value=-self.k / self.C)


class DetachNorm(PlainNorm):
    """DetachNorm: the forward pass of LayerNorm-simple; mean and / or variance are constants in the backward pass.

    The paper's probe of what the derivatives of mean and variance are worth (Xu et al. 2019, sec. 4).

    Args:
        normalized_shape: trailing dimensions to normalize.
        eps: added to the variance; >= 0.
        detach_mean: no gradient flows through the mean.
        detach_variance: no gradient flows through the standard deviation. Not both False.
        **layout: further arguments of `SwappedNorm`.
    """

    norm_name, plain_settings = "detachnorm", {}

    def __init__(
        self,
        normalized_shape: Any,
        eps: float = 1e-5,
        *,
        detach_mean: bool = True,
        detach_variance: bool = True,
        **layout: Any,
    ) -> None:
        super().__init__(normalized_shape, eps, **layout)
        self.detach_mean, self.detach_variance = (
            check_bool("detach_mean", detach_mean),
            check_bool("detach_variance", detach_variance),
        )
        if not (detach_variance or (detach_mean and self.centered)):
            raise ValueError(
                "detach_mean and detach_variance detach nothing here (an uncentered norm has no mean): set "
                'detach_variance=True, or use "layernorm-simple"'
            )

    def compute(self, x: Tensor) -> Tensor:
        deviation, rstd = self.standardize(x, self.detach_mean)
        return deviation * (rstd.detach() if self.detach_variance else rstd)


class NoNorm(SwappedNorm):
    """The paper's "w/o Norm": returns a copy of its input, as models write in place into what a norm returns."""

    norm_name = "none"

    def compute(self, x: Tensor) -> Tensor:
        return x.clone()


class DyT(SwappedNorm):
    """Dynamic Tanh: z = gain * tanh(alpha * x) + bias with learned gain, bias and scalar alpha (arXiv:2503.10622).

    The parameters are called `dyt_gain`, `dyt_bias` and `dyt_alpha`, which no loader takes for those of a LayerNorm.

    Args:
        normalized_shape: trailing dimensions of gain and bias.
        eps: of the norm that it replaced; no effect.
        alpha: where the parameter starts; > 0.
        **layout: further arguments of `SwappedNorm`.

    Example:
        >>> DyT(2)(torch.tensor([[0.0, 1e9]])).tolist()
        [[0.0, 1.0]]
    """

    norm_name = "dyt"

    def __init__(self, normalized_shape: Any, eps: float = 1e-5, *, alpha: float = 0.5, **layout: Any) -> None:
        super().__init__(normalized_shape, eps, **layout)
        self.alpha = check_number("alpha", alpha, inclusive=False)
        for name, shape in (("gain", self.normalized_shape), ("bias", self.normalized_shape), ("alpha", (1,))):
            self.register_parameter(f"dyt_{name}", nn.Parameter(self.weight.new_empty(shape)))
        self.reset_parameters()

    @classmethod
    def from_norm(cls, norm: Any, **settings: Any) -> DyT:
        """Return one with the gain and the bias of `norm`, a LayerNorm or RMSNorm of torch."""
        new = cls(norm.normalized_shape, norm.eps, **settings).to(norm.weight)
        state = {"dyt_gain": norm.weight, "dyt_bias": getattr(norm, "bias", None)}
        new.load_state_dict({key: value for key, value in state.items() if value is not None}, strict=False)
        return new

    def backward_factor(self, y: Tensor) -> float:
        return math.nan

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        for name, value in (("dyt_gain", 1.0), ("dyt_bias", 0.0), ("dyt_alpha", self.alpha)):
            if not getattr(tensor := self.get_parameter(name), "_is_hf_initialized", False):
                tensor.fill_(value)

    def compute(self, x: Tensor) -> Tensor:
        gain, bias, alpha = (self.get_parameter(f"dyt_{name}").to(x.dtype) for name in ("gain", "bias", "alpha"))
        return gain * torch.tanh(alpha * x) + bias


_BUILT_IN: tuple[type[SwappedNorm], ...] = (LayerNormSimple, AdaNorm, NoNorm, DetachNorm, DyT)
NORM_CLASSES = {cls.norm_name: cls for cls in _BUILT_IN}

# -------------------------------------------------------------------------------------------------- the spec

_MAX_GROUPS, _MAX_MODULES, _MAX_NAME = 10_000, 100_000, 512  # far beyond any model: what is larger is no spec of ours


def _names(what: str, value: Any) -> tuple[str, ...]:
    check(isinstance(value, (list, tuple)) and len(value) <= _MAX_MODULES, f"{what} must be a list of names", value)
    for name in value:
        check(isinstance(name, str) and _is_name(name), f"{what} must hold names of modules", name)
    return tuple(value)


def _is_name(name: str) -> bool:
    parts = name.removeprefix("^").split(".") if len(name) <= _MAX_NAME else [""]
    return all(part == "*" or part.replace("-", "_").isidentifier() or part.isdigit() for part in parts)


def _is_word(value: Any) -> bool:
    text = value.translate({ord(mark): "_" for mark in ".-:"}) if isinstance(value, str) else "?"
    return len(text) <= 200 and f"_{text}".isidentifier()


@dataclass(frozen=True, kw_only=True)
class NormGroup:
    """Modules that share their settings, one entry of the spec's `groups`. What is None is read off each module."""

    norm: str
    """A key of NORM_CLASSES, such as "adanorm", or of the spec's `classes`."""
    modules: tuple[str, ...]
    """Names in the base model, such as "encoder.layer.*.output.LayerNorm"; `*` is a number, `^` means outside of it."""  # noqa: E501
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Arguments of the norm's constructor, such as {"C": 1.0, "k": 0.1}."""
    centered: bool | None = None
    eps: float | None = None
    channels_first: bool | None = None
    normalized_shape: tuple[int, ...] | None = None
    reference: str | None = None
    output_dtype: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the group as JSON types."""
        given = {key: value for key, value in vars(self).items() if value not in (None, {})}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in given.items()}

    @classmethod
    def from_dict(cls, data: Any) -> NormGroup:
        """Return the inverse of `to_dict`. Raise TypeError or ValueError for any other value."""
        check(isinstance(data, Mapping), "a group of config.adanorm must be an object", data, TypeError)
        for key in data:
            check(key in ("norm", "modules", "settings", *LAYOUT), "unknown key in a group of config.adanorm", key)
        norm, settings = data.get("norm"), data.get("settings", {})
        check(_is_word(norm), "the norm of a group must be a name", norm)
        check(isinstance(settings, Mapping) and len(settings) <= 100, "settings must be an object", settings)
        for key, value in settings.items():
            plain = isinstance(value, (str, int, float, type(None))) and len(short_repr(value)) < 80
            check(plain and _is_word(key), f"setting {short_repr(key)} must be a number, a text or null", value)
        layout = {key: data[key] for key in LAYOUT if data.get(key) is not None}
        kind, own = (NORM_CLASSES[norm], settings) if norm in NORM_CLASSES else (SwappedNorm, {})
        for key in own:
            check(key in settings_of(kind), f"norm {norm!r} has the settings {sorted(settings_of(kind))}", key)
        made = kind(**{"normalized_shape": 2, **layout, **own}, device="meta")  # the constructor checks the ranges
        layout |= {"normalized_shape": made.normalized_shape} if "normalized_shape" in layout else {}
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
        """Return the inverse of `to_dict`. Raise TypeError or ValueError for any other value or a higher format."""
        if isinstance(data, AdaNormSpec):
            return data
        check(isinstance(data, Mapping), "config.adanorm must be an object", data, TypeError)
        for key in data:
            known = ("format", "version", "groups", "biases", "eps", "classes")
            check(key in known, "unknown entry in config.adanorm", key)
        fmt, version, eps, classes = (data.get(key, {}) for key in ("format", "version", "eps", "classes"))
        check(type(fmt) is int and fmt >= 1, "the format of config.adanorm must be a whole number >= 1", fmt)
        check(isinstance(version, str), "the version of config.adanorm must be a string", version, TypeError)
        newer = (
            f"config.adanorm was written by hf_adanorm {version[:40]}, and {__version__} reads up to format {FORMAT}"
        )
        check(fmt <= FORMAT, f"{newer}: install a newer one", fmt)
        groups = data.get("groups")
        check(isinstance(groups, (list, tuple)) and len(groups) <= _MAX_GROUPS, "groups must be a list", groups)
        check(isinstance(eps, Mapping), "eps of config.adanorm must be an object", eps, TypeError)
        check(isinstance(classes, Mapping) and len(classes) <= 100, "classes must be an object", classes, TypeError)
        for name, entry in classes.items():
            check(
                _is_word(name) and name not in NORM_CLASSES, "classes of config.adanorm need names of their own", name
            )
            fine = isinstance(entry, Mapping) and entry.keys() == {"class", "file", "files"}
            fine = fine and isinstance(files := entry["files"], Mapping) and len(files) <= 100
            fine = fine and all(map(_is_word, [entry["class"], entry["file"], *files, *files.values()]))
            check(fine, f"the entry of class {name!r} must have a class, a file and files", entry)
        found = tuple(map(NormGroup.from_dict, groups))
        for group in found:
            names = [*NORM_CLASSES, *classes]
            check(group.norm in names, f"norm must be one of {names}", group.norm)
        return cls(
            groups=found,
            biases=_names("biases", data.get("biases", [])),
            eps={name: check_number("eps", eps[name]) for name in _names("eps", list(eps))},
            classes={name: dict(entry) for name, entry in classes.items()},
        )


# ------------------------------------------------------------------------------------------------- the names


def base_prefix(model: nn.Module) -> str | None:
    """Return `"bert."` for a model with a head around its base model, None for a base model or a plain module."""
    prefix = getattr(model, "base_model_prefix", "")
    base = getattr(model, prefix, None) if prefix else None
    return f"{prefix}." if isinstance(base, nn.Module) and base is not model else None


def number_template(name: str) -> str:
    """ "encoder.layer.3.norm" -> "encoder.layer.*.norm" """
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _renamings(model: nn.Module) -> list[Any]:
    """Return how transformers renames keys when it saves `model`, in order, without prefixes that may be missing."""
    owner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    try:
        found = [] if owner is None else get_model_conversion_mapping(owner, add_legacy=False)
        return [c.reverse_transform() for c in reversed(found) if type(c).__name__ == "WeightRenaming"]
    except (AttributeError, TypeError):  # in another version: the names are then those of the modules
        return []


def plain_name(name: str, prefix: str | None) -> str:
    """Return a module's name relative to the base model, whose names start with `prefix`; "^..." outside it."""
    return name.removeprefix(prefix or "") if prefix is None or name.startswith(prefix) else f"^{name}"


def spec_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return the names in a spec of the named modules: those of the checkpoint's keys, relative to the base model.
    The base model's own renamings count inside it, so heads make no difference."""
    prefix = base_prefix(model)
    inside = _renamings(model if prefix is None else getattr(model, prefix[:-1]))
    outside = [] if prefix is None else _renamings(model)
    plain = {name: plain_name(name, prefix) for name in names}
    found = {}
    for name, old in plain.items():
        mark = "^" if old.startswith("^") else ""
        key = f"{old.removeprefix('^')}.weight"
        for renaming in outside if mark else inside:
            key = renaming.rename_source_key(key)[0]
        new = mark + key.removesuffix(".weight")
        found[name] = new if key.endswith(".weight") and _is_name(new) else old
    count = Counter(found.values())
    return {name: new if count[new] == 1 else plain[name] for name, new in found.items()}


def find_modules(model: Any, spec: AdaNormSpec, modules: Iterable[tuple[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return what each name of `spec` means among the named `modules` of `model`, {} for one that it does not have.
    A name is looked for as a key of the checkpoint, then as the module's own."""
    by_name, prefix = dict(modules), base_prefix(model)
    indices: list[dict[str, list[tuple[str, str]]]] = []
    for table in (spec_names(model, by_name), {name: plain_name(name, prefix) for name in by_name}):
        indices.append({})
        for name, spelled in table.items():
            indices[-1].setdefault(number_template(spelled), []).append((name, spelled))

    def means(pattern: str, spelled: str) -> bool:
        return all(want in (part, "*") for want, part in zip(pattern.split("."), spelled.split("."), strict=True))

    def look(pattern: str) -> dict[str, Any]:
        all_hits = ([n for n, s in index.get(number_template(pattern), ()) if means(pattern, s)] for index in indices)
        return {name: by_name[name] for name in next(filter(None, all_hits), [])}

    return {pattern: look(pattern) for pattern in spec.names()}


# ------------------------------------------------------------------------------------------------ the loader


def source_settings(module: nn.Module) -> dict[str, Any]:
    """Return what can be read off a norm without running it: eps, normalized_shape, channels_first."""
    if is_swapped(module):
        return {key: getattr(module, key) for key in LAYOUT}
    eps = [value for key in ("eps", "variance_epsilon") if isinstance(value := getattr(module, key, None), float)]
    shape = getattr(module, "normalized_shape", None)
    shape = getattr(getattr(module, "weight", None), "shape", None) if shape is None else shape
    found = {
        "channels_first": getattr(module, "data_format", None) == "channels_first",
        **({"eps": eps[0]} if eps else {}),
    }
    return found if shape is None else {**found, "normalized_shape": _check_shape(shape)}


def make_norm(source: nn.Module, group: NormGroup, classes: Mapping[str, type[nn.Module]]) -> SwappedNorm:
    """Return the norm that takes the place of `source`: settings from the group, the rest from `source`."""
    layout = {**source_settings(source), **{key: v for key in LAYOUT if (v := getattr(group, key)) is not None}}
    for key in ("eps", "normalized_shape"):
        check(key in layout, f"{key} is not known, the spec must give it", type(source).__name__)
    tensor = next((t for t in (*source.parameters(), *source.buffers()) if t.is_floating_point()), None)
    layout |= {} if tensor is None else {"device": tensor.device, "dtype": tensor.dtype}
    layout["centered"] = group.centered is not False
    own = NORM_CLASSES.get(group.norm)
    new = own(**layout, **group.settings) if own else Held(classes[group.norm], group.norm, group.settings, **layout)
    new.train(source.training)
    names = [n for n, _ in (source.named_buffers if is_swapped(source) else source.named_parameters)(recurse=False)]
    name = names[-1] if is_swapped(source) else "weight" if "weight" in names or not names else names[0]
    if name != "weight" and not hasattr(new, name):  # where the norm calls its gain "gamma", so is the tripwire
        new.register_buffer(name, torch.ones_like(new.weight))
        new.register_buffer("weight", new.weight, persistent=False)
    return new


def replace_modules(model: nn.Module, replacements: Mapping[int, nn.Module]) -> None:
    """Put `replacements[id(old)]` wherever `old` is a submodule of `model`, under every name it has."""
    for name, child in list(model.named_modules(remove_duplicate=False)):
        if name and id(child) in replacements:
            parent, _, key = name.rpartition(".")
            model.get_submodule(parent).register_module(key, replacements[id(child)])
    for module in model.modules():  # torch's fused path reads the norms' weights and computes LayerNorm itself
        if isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer)) and any(
            map(is_swapped, module.modules())
        ):
            module.activation_relu_or_gelu, module.use_nested_tensor = 0, False


def apply_spec(
    model: Any, spec: AdaNormSpec, classes: Mapping[str, type[nn.Module]] | None = None, replaced: Any = None
) -> None:
    """Swap exactly the modules that `spec` names; names that `model` does not have (another head) are skipped.

    Args:
        classes: the author's norms, by name.
        replaced: called with each new norm and the one that it replaces.

    Raises:
        TypeError, ValueError: a name belongs to a module that cannot be a norm, or a setting is wrong.
    """
    found = find_modules(model, spec, model.named_modules())
    swaps: dict[int, tuple[str, Any, NormGroup]] = {}  # the last group that names a module decides, once
    for group in spec.groups:
        for pattern in dict.fromkeys(group.modules):
            swaps |= {id(module): (name, module, group) for name, module in found[pattern].items()}
    replacements: dict[int, nn.Module] = {}
    for key, (name, module, group) in swaps.items():
        said = {**vars(group), "modules": ()}
        if module.__dict__.get("_adanorm_group") != said:  # else the base model in this model has done it
            _check_norm(name, module, group.eps is not None)
            replacements[key] = new = make_norm(module, group, classes or {})
            new.__dict__["_adanorm_group"] = said
            if replaced is not None:
                replaced(new, module)
    linear = [(name, module) for pattern in spec.biases for name, module in found[pattern].items()]
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    for name, module in linear:
        check(
            isinstance(module, kinds),
            f"config.adanorm gives a bias to {name!r}, no linear layer",
            type(module).__name__,
        )
    adjusted = [(name, module, eps) for pattern, eps in spec.eps.items() for name, module in found[pattern].items()]
    for name, module, _ in adjusted:
        _check_norm(name, module, True)
    for _, module in linear:
        if module.bias is None:
            module.bias = nn.Parameter(module.weight.new_zeros(module.weight.shape[0]))
            module.__dict__[ADDED_BIAS] = True
    for _, module, eps in adjusted:
        setattr(module, "variance_epsilon" if hasattr(module, "variance_epsilon") else "eps", eps)
        module.__dict__[ADJUSTED_EPS] = True
    replace_modules(model, replacements)
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()  # a set, a list or None
    model._keys_to_ignore_on_load_unexpected = (list if isinstance(ignored, list) else set)([*ignored, NOTICE])


def _check_norm(name: str, module: nn.Module, knows_eps: bool) -> None:
    """Raise ValueError unless a spec, which a stranger may have written, may name this module: a norm with a gain and
    perhaps a bias, of one shape, or one without, if its class or its name says norm or it has an eps."""
    if is_swapped(module) or isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return
    cls, place = type(module).__name__, name.rpartition(".")[2].lower()
    torch_own = any(base.__module__.startswith("torch.nn") for base in type(module).__mro__ if base is not nn.Module)
    shapes = {tuple(getattr(p, "ds_shape", p.shape)) for p in module.parameters()}
    called_norm = "norm" in (cls + place).lower() or "LN" in cls or place.startswith("ln")
    like_norm = (knows_eps or "eps" in source_settings(module)) and {len(shape) for shape in shapes} == {1}
    small = len(shapes) <= 1 and len(list(module.parameters())) <= 2 and sum(1 for _ in module.modules()) <= 3
    fine = not torch_own and (called_norm or like_norm) and small
    check(fine, f"config.adanorm names {name!r}, which is no normalization layer", cls)


def notice_hook(module: nn.Module, state_dict: dict[str, Any], prefix: str = "", metadata: Any = None) -> None:
    """Add a key that ends in NOTICE, of one byte, beside the first swapped norm: a stock loader reports it, above the
    error that the norms' sizes cause."""
    for name, norm in module.named_modules():
        if not prefix and is_swapped(norm) and any(f"{name}.{key}" in state_dict for key, _ in norm.named_buffers()):
            state_dict[f"{name}.{NOTICE}"] = torch.zeros(1, dtype=torch.uint8)
            return


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
            raise AttributeError(f"module {module_name!r} has no attribute {name!r}, only transformers' model classes")
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
            self.config.auto_map, own = auto_map, f"{module_name.rpartition('.')[2]}.{stock.__name__}"
            # transformers < 5.13 copies the file of such a class for unknown architectures only
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
