"""AdaNorm and its relatives in place of LayerNorm, and the loader of models that contain them.

This file travels with every saved model, so `from_pretrained(..., trust_remote_code=True)` rebuilds the model where
hf_adanorm is missing. It needs torch and transformers only, opens no file and starts no process. Its parts: the
holder, the norms of Xu et al. (NeurIPS 2019, arXiv:1911.07013) and DyT, the spec in `config.adanorm`, and the loader.
hf_adanorm adds faster forward passes (KERNELS) and methods that only it needs (protocol.py).
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeGuard, cast

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

__version__, FORMAT = "0.1.0", 1  # a reader refuses a spec of a higher format
# Marks in the __dict__ of stock modules that a fold changed beyond their tensors, for the spec.
ADDED_BIAS, ADJUSTED_EPS = "_adanorm_added_bias", "_adanorm_adjusted_eps"
# How a key in saved checkpoints ends that no model has: loaders that do not know this file list it in their report.
NOTICE = "`import hf_adanorm` or trust_remote_code=True is needed"
LAYOUT = ("centered", "eps", "channels_first", "normalized_shape", "reference", "output_dtype")
HALF = (torch.float16, torch.bfloat16)  # computed in float32 and rounded once
# By the name of a norm, functions of (norm, x), channels last, that return the output, or None to decline.
KERNELS: dict[str, list[Callable[[Any, Tensor], Tensor | None]]] = {}


# ------------------------------------------------------------------------------------------------ the holder
def short_repr(value: Any) -> str:
    """Return a value for an error message, never long (deep nesting would even raise in repr)."""
    flat = value if isinstance(value, (list, tuple)) and len(value) <= 8 else [value]
    plain = all(isinstance(v, (str, float, type(None))) or (isinstance(v, int) and abs(v) < 2**99) for v in flat)
    text = repr(value) if plain else f"a value of type {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


def check(condition: Any, what: str, value: Any) -> None:
    """Raise ValueError with `what` and the value unless the condition holds."""
    if not condition:
        raise ValueError(f"{what}, got {short_repr(value)}")


def check_number(name: str, value: Any, *, minimum: float = 0.0, inclusive: bool = True) -> float:
    """Return `value` as a float. Raise ValueError if it is no number, out of range or of float32."""
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    inside = minimum <= number <= torch.finfo(torch.float32).max and (inclusive or number != minimum)
    check(inside, f"{name} must be a finite number {'>=' if inclusive else '>'} {minimum:g}", value)
    return float(number)


class SwappedNorm(nn.Module):
    """Base of the norms that take the place of a LayerNorm or RMSNorm.

    The one-element buffer `weight` computes nothing: in a checkpoint it stops loaders that expect a LayerNorm's gain.
    `centered=False` computes x / rms(x); `channels_first` normalizes axis 1 of (N, C, *); `reference="lancopku"` is
    the authors' (x - mean) / (std + eps); `output_dtype` is None (nn.LayerNorm's), "weight" (T5) or "promote".
    """

    is_adanorm_module, norm_name = True, ""  # recognized whichever copy of this file made the class
    plain_settings: dict[str, Any] | None = None  # with which it is exactly N(x), without gain and bias
    weight: Tensor
    bias, elementwise_affine = None, False
    inner: Any = property(lambda self: self)  # the module that computes: this one, or the author's
    variance_epsilon = property(lambda self: self.eps)  # the name that some models read

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
        shape = tuple(normalized_shape) if isinstance(normalized_shape, (list, tuple)) else (normalized_shape,)
        fine = shape and all(type(n) is int and 1 <= n < 2**31 for n in shape)
        check(fine, "normalized_shape must be one or more integers >= 1", normalized_shape)
        check(type(centered) is bool, "centered must be True or False", centered)
        one = channels_first is False or (channels_first is True and len(shape) == 1)
        check(one, "channels_first must be True or False, True for one dimension", (channels_first, *shape))
        check(reference in ("paper", "lancopku"), 'reference must be "paper" or "lancopku"', reference)
        wide = reference == "paper" or (centered and math.prod(shape) > 1)
        check(wide, 'reference="lancopku" needs centered=True and H >= 2 (it divides by H - 1)', (centered, *shape))
        check(output_dtype in (None, "weight", "promote"), 'output_dtype must be "weight" or "promote"', output_dtype)
        self.normalized_shape, self.eps, self.centered = shape, check_number("eps", eps), centered
        self.channels_first, self.reference, self.output_dtype = channels_first, reference, output_dtype
        self.register_buffer("weight", torch.ones(1, device=device, dtype=dtype))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fill tensors that no checkpoint has filled, as those of a norm that was built on the meta device."""
        for tensor in self.buffers(recurse=False):
            if not getattr(tensor, "_is_hf_initialized", False):
                tensor.fill_(1.0)

    def _get_initialized(self) -> bool:
        if not self.__dict__.get("is_filled", False):
            self.reset_parameters()
            self.is_filled = not any(tensor.is_meta for tensor in (*self.buffers(), *self.parameters()))
        return True

    # transformers asks before it calls the `_init_weights` of a model, which knows no norms of ours.
    _is_hf_initialized = property(_get_initialized, lambda self, value: self.__dict__.update(is_filled=value))

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
        own = self.weight.dtype
        return z.to(own if self.output_dtype == "weight" else torch.promote_types(x.dtype, own))

    def extra_repr(self) -> str:
        usual = {"training": self.training, "norm_name": self.norm_name, "is_filled": None, "centered": True}
        usual |= {"channels_first": False, "reference": "paper", "given": None}
        shown = {k: v for k, v in vars(self).items() if k not in usual or (k in LAYOUT and v != usual[k])}
        plain = [f"{k}={v}" for k, v in shown.items() if k[0] != "_" and isinstance(v, (str, int, float))]
        return ", ".join(
            [str(self.normalized_shape), *plain, *(f"{k}={v}" for k, v in vars(self).get("given", {}).items())]
        )


def is_swapped(module: Any) -> TypeGuard[Any]:
    """Tell whether `module` is a swapped norm. The class is asked, as wrappers such as PEFT's pass attributes on."""
    return bool(getattr(type(module), "is_adanorm_module", False))


class Held(SwappedNorm):
    """Hold a norm of the author's class, a plain module, in the place of the norm that it replaces."""

    inner = property(lambda self: self.norm)

    def __init__(self, cls: type[nn.Module], norm_name: str, settings: Mapping[str, Any], **layout: Any) -> None:
        super().__init__(**layout)
        self.norm_name, self.given = norm_name, dict(settings)
        shape: Any = self.normalized_shape[0] if len(self.normalized_shape) == 1 else self.normalized_shape
        with self.weight.device:
            self.norm = cls(shape, self.eps, **settings).to(self.weight.dtype)
        for module in self.norm.modules():
            cast(Any, module)._is_hf_initialized = True  # the model's `_init_weights` must not touch it

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        layout = {key: getattr(self, key) for key in LAYOUT}
        fresh = Held(type(self.norm), self.norm_name, self.given, **layout, device="cpu").norm
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
def output_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of nn.LayerNorm's output for `x`. Autocast decides it for half types: float32 on CUDA."""
    return F.layer_norm(x.new_empty((0, 1)), (1,)).dtype if x.dtype in HALF else x.dtype


def has_tangent(x: Tensor) -> bool:
    """Tell whether `x` carries a forward-mode tangent, which torch differentiates wrongly in F.layer_norm."""
    try:
        return cast(Any, forward_ad.unpack_dual)(x).tangent is not None
    except NameError:  # where forward mode itself is broken
        return False


class LayerNormSimple(SwappedNorm):
    """LayerNorm-simple: y = N(x) = (x - mean(x)) / sqrt(var(x) + eps), no gain, no bias (Xu et al. 2019, sec. 3)."""

    norm_name, plain_settings = "layernorm-simple", {}

    def compute(self, x: Tensor) -> Tensor:
        return self.normalize(x)

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
        if not cast(Any, torch.jit).is_tracing() and x.shape[dims[0] :] != self.normalized_shape:
            raise RuntimeError(f"expected an input of normalized_shape {self.normalized_shape}, got {tuple(x.shape)}")
        mean = x.mean(dims, keepdim=True) if self.centered else None
        deviation = x if mean is None else x - mean
        if self.reference == "lancopku":
            rstd = 1.0 / (x.std(dims, correction=1, keepdim=True) + self.eps)
        else:
            rstd = torch.rsqrt(deviation.square().mean(dims, keepdim=True) + self.eps)
        return (deviation if mean is None or not detach_mean else x - mean.detach()), rstd


class AdaNorm(LayerNormSimple):
    """AdaNorm: z = phi(y) * y with y = N(x) and phi(y) = C * (1 - k * y), a constant in the backward pass.

    With dl/dz given, dl/dy = phi(y) * dl/dz, which then flows through N as usual (Xu et al. 2019, eq. 5). C > 0 is the
    mean of phi over a row; k >= 0 says how much phi falls with y, and the paper fixes k = 1/10.

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

    def compute(self, x: Tensor) -> Tensor:
        # With u = C y, z is u - (k / C) u^2.
        if torch.compiler.is_compiling() or x.is_nested or has_tangent(x):  # C and k may vary without a new graph
            u = self.normalize(x) * self.C
            return u * (1.0 - (self.k / self.C) * u.detach())
        u = self.normalize(x, torch.full(self.normalized_shape, self.C, dtype=x.dtype, device=x.device))
        return torch.addcmul(u, u, u.detach(), value=-self.k / self.C)


class DetachNorm(LayerNormSimple):
    """DetachNorm: the forward pass of LayerNorm-simple; mean and / or variance are constants in the backward pass.

    The paper's probe of what the derivatives of mean and variance are worth (Xu et al. 2019, sec. 4).
    """

    norm_name = "detachnorm"

    def __init__(self, *args: Any, detach_mean: bool = True, detach_variance: bool = True, **layout: Any) -> None:
        super().__init__(*args, **layout)
        flags = (detach_mean, detach_variance)
        check(
            all(type(flag) is bool for flag in flags), "detach_mean and detach_variance must be True or False", flags
        )
        some = detach_variance or (detach_mean and self.centered)  # without a mean there is none to detach
        check(some, 'nothing is detached: set detach_variance=True, or use norm "layernorm-simple"', flags)
        self.detach_mean, self.detach_variance = flags

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

    The parameters are called `dyt_gain`, `dyt_bias` and `dyt_alpha`, which no loader takes for those of a LayerNorm;
    alpha > 0 is where `dyt_alpha` starts.

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
_SPEC = {"format": int, "version": str, "groups": list, "biases": list, "eps": dict, "classes": dict}
_GROUP = {"norm": str, "modules": list, "settings": dict, **dict.fromkeys(LAYOUT, object)}


def _is_name(value: Any) -> bool:
    parts = value.removeprefix("^").split(".") if isinstance(value, str) and len(value) <= 512 else [""]
    return all(part == "*" or (part and f"_{part}".replace("-", "_").isidentifier()) for part in parts)


def _checked(data: Any, types: Mapping[str, type], what: str) -> dict[str, Any]:
    check(isinstance(data, dict), f"{what} must be an object", data)
    for key, value in data.items():
        fine = isinstance(value, types.get(key, Held)) and (key in LAYOUT or type(value) is not bool)
        fine = fine and (not isinstance(value, (list, dict)) or len(value) <= 100_000)
        check(fine, f"{what} has a wrong entry {short_repr(key)}", value)
    named = [key for key in ("modules", "biases", "eps", "classes") if types.get(key) is not object]  # a group's eps
    for name in [name for key in named for name in data.get(key, ())]:
        check(_is_name(name), f"{what} must hold names", name)
    return {**{key: kind() for key, kind in types.items() if kind is not object}, **data}


def read_spec(data: Any) -> dict[str, Any]:
    """Return `config.adanorm`, which a stranger may have written, with every value checked (ValueError, TypeError)."""
    spec = _checked(data, _SPEC, "config.adanorm")
    who = f"config.adanorm of hf_adanorm {spec['version'][:40]}: {__version__} reads format {FORMAT}, install a newer"
    check(1 <= spec["format"] <= FORMAT, who, spec["format"])
    for name, entry in spec["classes"].items():
        files = entry.get("files") if isinstance(entry, dict) and entry.keys() == {"class", "file", "files"} else None
        fine = isinstance(files, dict) and all(map(_is_name, [entry["class"], entry["file"], *files, *files.values()]))
        check(
            fine and name not in NORM_CLASSES, f"class {name!r} of config.adanorm needs a class, file and files", entry
        )
    check(len(spec["groups"]) <= 10_000, "config.adanorm must hold at most 10,000 groups", len(spec["groups"]))
    spec["groups"] = [_checked(group, _GROUP, "a group of config.adanorm") for group in spec["groups"]]
    for group in spec["groups"]:
        norm, settings = group["norm"], group["settings"]
        names = [*NORM_CLASSES, *spec["classes"]]
        check(norm in names, f"norm must be one of {names}", norm)
        for key, value in settings.items():
            plain = isinstance(value, (str, int, float, type(None))) and len(short_repr(value)) < 80
            check(plain and _is_name(key), f"setting {short_repr(key)} must be a number, a text or null", value)
        layout = {key: group[key] for key in LAYOUT if group.get(key) is not None}
        kind, own = (NORM_CLASSES[norm], settings) if norm in NORM_CLASSES else (SwappedNorm, {})
        kind(**{"normalized_shape": 2, **layout}, **own, device="meta")  # the constructor checks the values
    spec["eps"] = {name: check_number("eps", value) for name, value in spec["eps"].items()}
    return spec


def _renamings(model: Any) -> list[Any]:
    """Return how transformers renames keys when it saves `model`, in order, without prefixes that may be missing."""
    try:
        owner = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
        found = get_model_conversion_mapping(owner, add_legacy=False)
        return [c.reverse_transform() for c in reversed(found) if type(c).__name__ == "WeightRenaming"]
    except (AttributeError, StopIteration, TypeError):  # in another version: the names are then those of the modules
        return []


def spec_names(model: nn.Module, names: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the names in a spec of the named modules: those of the checkpoint's keys, then the modules' own. Both are
    relative to the base model, whose own renamings count inside it; "^" marks a module outside of it."""
    prefix = getattr(model, "base_model_prefix", "")
    base = getattr(model, prefix, None) if prefix else None
    has_base = isinstance(base, nn.Module) and base is not model
    inside, outside = (_renamings(base), _renamings(model)) if has_base else (_renamings(model), [])
    plain, keys = {}, {}
    for name in names:
        mark = "^" if has_base and not name.startswith(f"{prefix}.") else ""
        key = inner = name.removeprefix(f"{prefix}.") if has_base else name
        for renaming in outside if mark else inside:
            key = renaming.rename_source_key(f"{key}.weight")[0].removesuffix(".weight")
        plain[name], keys[name] = mark + inner, mark + (key if _is_name(key) else inner)
    count = Counter(keys.values())
    return {name: key if count[key] == 1 else plain[name] for name, key in keys.items()}, plain


def find_modules(
    model: nn.Module, names: Iterable[str], modules: Iterable[tuple[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return what each name of a spec means among the named `modules` of `model`, {} for one that it does not have. A
    name is looked for as a key of the checkpoint, then as the module's own."""
    by_name, tables = dict(modules), cast(list[dict[tuple[str, ...], list[tuple[list[str], str]]]], [{}, {}])

    def shape(parts: list[str]) -> tuple[str, ...]:
        return tuple("*" if p.isdigit() else p for p in parts)

    for table, spelled in zip(tables, spec_names(model, by_name), strict=True):
        for name, parts in ((name, text.split(".")) for name, text in spelled.items()):
            table.setdefault(shape(parts), []).append((parts, name))
    found: dict[str, dict[str, Any]] = {}
    for pattern in names:
        want = pattern.split(".")
        near = [table.get(shape(want), []) for table in tables]
        hits = [[n for parts, n in t if all(w in (p, "*") for w, p in zip(want, parts, strict=True))] for t in near]
        found[pattern] = {name: by_name[name] for name in hits[0] or hits[1]}
    return found


# ------------------------------------------------------------------------------------------------ the loader
def source_settings(module: nn.Module) -> dict[str, Any]:
    """Return what can be read off a norm without running it: eps, normalized_shape, channels_first."""
    if is_swapped(module):
        return {key: getattr(module, key) for key in LAYOUT}
    eps = [value for key in ("eps", "variance_epsilon") if isinstance(value := getattr(module, key, None), float)]
    shape = getattr(module, "normalized_shape", None) or getattr(getattr(module, "weight", None), "shape", None)
    found = {"channels_first": getattr(module, "data_format", None) == "channels_first", "eps": eps and eps[0]}
    found["normalized_shape"] = (shape,) if isinstance(shape, int) else shape and tuple(shape)
    return {key: value for key, value in found.items() if value not in (None, [], ())}


def make_norm(source: nn.Module, group: Mapping[str, Any], classes: Mapping[str, type[nn.Module]]) -> SwappedNorm:
    """Return the norm that takes the place of `source`: settings from the group, the rest from `source`."""
    layout = {**source_settings(source), **{key: group[key] for key in LAYOUT if group.get(key) is not None}}
    for key in ("eps", "normalized_shape"):
        check(key in layout, f"{key} is not known, the spec must give it", type(source).__name__)
    tensor = next((t for t in (*source.parameters(), *source.buffers()) if t.is_floating_point()), None)
    layout |= {} if tensor is None else {"device": tensor.device, "dtype": tensor.dtype}
    norm, settings, layout["centered"] = group["norm"], group["settings"], group.get("centered") is not False
    own = NORM_CLASSES.get(norm)
    new = own(**layout, **settings) if own else Held(classes[norm], norm, settings, **layout)
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
            model.get_submodule(name.rpartition(".")[0]).register_module(
                name.rpartition(".")[2], replacements[id(child)]
            )
    fused = (nn.TransformerEncoder, nn.TransformerEncoderLayer)  # a fast path reads the norms' weights
    for module in (m for m in model.modules() if isinstance(m, fused) and any(map(is_swapped, m.modules()))):
        module.activation_relu_or_gelu, module.use_nested_tensor = 0, False


def apply_spec(model: Any, data: Any, classes: Mapping[str, type[nn.Module]], replaced: Any = None) -> None:
    """Swap exactly the modules that a spec names; names that `model` does not have (another head) are skipped.

    Raises TypeError or ValueError if the spec is wrong, or names a module that cannot be a norm; nothing was swapped.
    `classes` holds the author's norms by name; `replaced` is called with each new norm and the one that it replaces.
    """
    spec, swaps, new = read_spec(data), cast(dict[int, tuple[str, Any, dict[str, Any]]], {}), cast(dict[int, Any], {})
    names = [name for group in spec["groups"] for name in group["modules"]]
    found = find_modules(model, [*names, *spec["biases"], *spec["eps"]], model.named_modules())
    for group in spec["groups"]:  # the last group that names a module decides, once
        for pattern in dict.fromkeys(group["modules"]):
            swaps |= {id(module): (name, module, group) for name, module in found[pattern].items()}
    for key, (name, module, group) in swaps.items():
        said = {**group, "modules": ()}
        if module.__dict__.get("adanorm_group") != said:  # else the base model in this model has done it
            _check_norm(name, module, "eps" in group)
            new[key] = make_norm(module, group, classes)
            new[key].__dict__["adanorm_group"] = said
            if replaced is not None:
                replaced(new[key], module)
    linear = [(name, module) for pattern in spec["biases"] for name, module in found[pattern].items()]
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    for name, module in linear:
        check(
            isinstance(module, kinds), f"config.adanorm gives a bias to {name!r}, no linear layer", repr(type(module))
        )
    adjusted = [(name, module, eps) for pattern, eps in spec["eps"].items() for name, module in found[pattern].items()]
    for name, module, _ in adjusted:
        _check_norm(name, module, True)
    for _, module in linear:
        if module.bias is None:
            module.bias = nn.Parameter(module.weight.new_zeros(module.weight.shape[0]))
            module.__dict__[ADDED_BIAS] = True
    for _, module, eps in adjusted:
        setattr(module, "variance_epsilon" if hasattr(module, "variance_epsilon") else "eps", eps)
        module.__dict__[ADJUSTED_EPS] = True
    replace_modules(model, new)
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None)  # None or a list; a set once it is complete
    more = (NOTICE, r"\._extra_state$") if new else (NOTICE,)
    kind = set if isinstance(ignored, set) else list
    model._keys_to_ignore_on_load_unexpected = kind([*(ignored or ()), *more])


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
    """Add a key that ends in NOTICE, of one byte, beside the first swapped norm, for the report of a stock loader."""
    for name, norm in module.named_modules():
        if not prefix and is_swapped(norm) and any(f"{name}.{key}" in state_dict for key, _ in norm.named_buffers()):
            state_dict[f"{name}.{NOTICE}"] = torch.zeros(1, dtype=torch.uint8)
            return


def model_classes(module_name: str, classes: Mapping[str, type[nn.Module]]) -> Callable[[str], Any]:
    """Return the `__getattr__` of a module whose `BertModel` and the like apply the spec in their config. transformers
    copies the file of the module called `module_name` when such a model is saved."""
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
    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        stock.__init__(self, config, *args, **kwargs)
        for module in [m for m in self.modules() if isinstance(m, PreTrainedModel)]:
            if getattr(module.config, "adanorm", None) is not None:
                apply_spec(module, module.config.adanorm, classes)
        if isinstance(auto_map := getattr(self.config, "auto_map", None), dict):
            # "user/repo--modeling_adanorm.BertModel" after a pull: the file travels on with the next save.
            auto_map = {k: v.rpartition("--")[2] if "--modeling_adanorm" in v else v for k, v in auto_map.items()}
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
