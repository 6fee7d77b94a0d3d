"""AdaNorm and its relatives in place of LayerNorm, and the loader of models that contain them.

This file travels with every saved model, so `from_pretrained(..., trust_remote_code=True)` rebuilds the model without
hf_adanorm. It needs torch and transformers only. It opens no file and starts no process. hf_adanorm adds faster
forward passes (KERNELS) and the methods in protocol.py; its holder.py holds the norms of other authors.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, TypeGuard, cast

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

__version__, FORMAT = "0.1.0", 1  # a reader refuses a spec of a higher format
ADDED_BIAS, ADJUSTED_EPS = "_adanorm_added_bias", "_adanorm_adjusted_eps"  # marks of stock modules that a fold changed
# The end of a key in saved checkpoints that no model has. Loaders that do not know this file report it.
NOTICE = "`import hf_adanorm` or trust_remote_code=True is needed"
LAYOUT = ("centered", "eps", "channels_first", "normalized_shape", "output_dtype")
HALF = (torch.float16, torch.bfloat16)  # computed in float32 and rounded once
# By the name of a norm: functions of (norm, x), channels last, that return the output, or None to decline.
KERNELS: dict[str, list[Callable[[Any, Tensor], Tensor | None]]] = {}


def short_repr(value: Any) -> str:
    """Return a value for an error message, in at most 80 characters. (The repr of deep nesting raises.)"""
    flat = value if isinstance(value, (list, tuple)) and len(value) <= 8 else [value]
    plain = all(isinstance(v, (str, float, type(None))) or (isinstance(v, int) and abs(v) < 2**99) for v in flat)
    text = repr(value) if plain else f"a value of type {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


def check(condition: Any, what: str, value: Any) -> None:
    """Raise ValueError with `what` and the value unless `condition` holds."""
    if not condition:
        raise ValueError(f"{what}, got {short_repr(value)}")


def check_number(name: str, value: Any, *, minimum: float = 0.0, inclusive: bool = True) -> float:
    """Return `value` as a float. Raise ValueError if it is not a number, or out of the range or of float32."""
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    inside = minimum <= number <= torch.finfo(torch.float32).max and (inclusive or number != minimum)
    check(inside, f"{name} must be a finite number {'>=' if inclusive else '>'} {minimum:g}", value)
    return float(number)


class SwappedNorm(nn.Module):
    """Base of the norms that replace a LayerNorm or RMSNorm.

    `centered=False` computes x / rms(x). More arguments: `channels_first=True` normalizes axis 1 of (N, C, *),
    `output_dtype` is None (that of nn.LayerNorm), "weight" (T5) or "promote"; `device` and `dtype`.
    The one-element buffer `weight` computes nothing: it makes loaders that expect the gain of a LayerNorm raise.
    """

    is_adanorm_module, norm_name, bias, elementwise_affine = True, "", None, False  # of any copy of this file
    plain_settings: dict[str, Any] | None = None  # those with which it is exactly N(x), without gain and bias
    start_values: Mapping[str, float] = {}  # of parameters and buffers that do not start at 1
    compute: Any  # the method that returns the output for an input in float32 or float64, channels last
    weight: Tensor
    inner: Any = property(lambda self: self)  # the module that computes: this one, or the author's
    variance_epsilon = property(lambda self: self.eps)  # the name that some models read

    def __init__(self, normalized_shape: Any, eps: float = 1e-5, *, centered: bool = True, **more: Any):
        super().__init__()
        first, rule = more.pop("channels_first", False), more.pop("output_dtype", None)
        check(more.keys() <= {"device", "dtype"}, f"unknown argument of {type(self).__name__}", list(more))
        shape = tuple(normalized_shape) if isinstance(normalized_shape, (list, tuple)) else (normalized_shape,)
        fine = shape and all(type(n) is int and 1 <= n < 2**31 for n in shape)
        check(fine, "normalized_shape must be one or more integers >= 1", normalized_shape)
        check(type(centered) is bool, "centered must be True or False", centered)
        one = first is False or (first is True and len(shape) == 1)
        check(one, "channels_first must be True or False, True for one dimension", (first, *shape))
        check(rule in (None, "weight", "promote"), 'output_dtype must be "weight" or "promote"', rule)
        self.normalized_shape, self.eps = shape, check_number("eps", eps)
        self.centered, self.channels_first, self.output_dtype = centered, first, rule
        self.register_buffer("weight", torch.ones(1, **more))

    def reset_parameters(self) -> None:
        """Fill the tensors that no checkpoint has filled, such as those of a norm built on the meta device."""
        for name, tensor in (*self.named_buffers(recurse=False), *self.named_parameters(recurse=False)):
            if not getattr(tensor, "_is_hf_initialized", False):
                tensor.detach().fill_(self.start_values.get(name, 1.0))

    def _get_initialized(self) -> bool:
        if not self.__dict__.get("is_filled", False):
            self.reset_parameters()
            self.is_filled = not any(tensor.is_meta for tensor in (*self.buffers(), *self.parameters()))
        return True

    # transformers reads this before it calls the `_init_weights` of a model, which does not know these norms.
    _is_hf_initialized = property(_get_initialized, lambda self, value: self.__dict__.update(is_filled=value))

    def run(self, x: Tensor) -> Tensor:
        """Return the output for `x`, channels last, of the first kernel that does not decline, or of `compute`."""
        for kernel in KERNELS.get(self.norm_name, ()):
            if (z := kernel(self, x)) is not None:
                return z
        return cast(Tensor, self.compute(x.float()).to(output_dtype(x)) if x.dtype in HALF else self.compute(x))

    def forward(self, x: Any) -> Tensor:
        """Normalize `x` of (*, *normalized_shape), or (N, C, *) with channels_first; the shape stays the same."""
        if not isinstance(x, Tensor) and hasattr(x, "tracer"):  # one call to torch.fx, as torch's own modules
            return cast(Tensor, x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x,), {}))
        z = self.run(x.movedim(1, -1)).movedim(-1, 1) if self.channels_first else self.run(x)
        if self.output_dtype is None:
            return z
        return z.to(self.weight.dtype if self.output_dtype == "weight" else torch.result_type(x, self.weight))

    def __prepare_scriptable__(self) -> Any:
        raise NotImplementedError("torch.jit.script cannot read this norm; use torch.jit.trace or torch.export")


def is_swapped(module: Any) -> TypeGuard[Any]:
    """Tell whether `module` is a swapped norm, by its class: wrappers such as PEFT's pass attributes on."""
    return bool(getattr(type(module), "is_adanorm_module", False))


def output_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of nn.LayerNorm's output for `x`. Autocast decides it for half types: float32 on CUDA."""
    return F.layer_norm(x.new_empty((0, 1)), (1,)).dtype if x.dtype in HALF else x.dtype


def has_tangent(x: Tensor) -> bool:
    """Tell whether `x` carries a forward-mode tangent, which torch differentiates wrongly in F.layer_norm."""
    try:
        return cast(Any, torch.autograd).forward_ad.unpack_dual(x).tangent is not None
    except NameError:  # where forward mode itself is broken
        return False


class LayerNormSimple(SwappedNorm):
    """LayerNorm-simple: y = N(x) = (x - mean(x)) / sqrt(var(x) + eps), no gain, no bias (Xu et al. 2019, sec. 3)."""

    def normalize(self, x: Tensor, gain: Tensor | None = None) -> Tensor:
        """Return N(x), times `gain`, by torch's fused operators where their derivatives are right."""
        if not self.centered:
            return F.rms_norm(x, self.normalized_shape, gain, self.eps)
        if not has_tangent(x):
            return F.layer_norm(x, self.normalized_shape, gain, None, self.eps)
        deviation, rstd = self.standardize(x)
        return deviation * rstd if gain is None else deviation * rstd * gain

    norm_name, plain_settings, compute = "layernorm-simple", {}, cast(Any, normalize)

    def standardize(self, x: Tensor, detach_mean: bool = False) -> tuple[Tensor, Tensor]:
        """Return x - mean(x), or x if not centered, and the factor that normalizes it."""
        dims = tuple(range(-len(self.normalized_shape), 0))
        if not cast(Any, torch.jit).is_tracing() and x.shape[dims[0] :] != self.normalized_shape:
            raise RuntimeError(f"expected an input of normalized_shape {self.normalized_shape}, got {tuple(x.shape)}")
        mean = x.mean(dims, keepdim=True) if self.centered else x.new_zeros(())
        rstd = torch.rsqrt((x - mean).square().mean(dims, keepdim=True) + self.eps)
        return x - (mean.detach() if detach_mean else mean), rstd


class AdaNorm(LayerNormSimple):
    """AdaNorm: z = phi(y) * y with y = N(x) and phi(y) = C * (1 - k * y), a constant in the backward pass.

    dl/dy = phi(y) * dl/dz, which then flows through N as usual (Xu et al. 2019, eq. 5). C > 0 is the mean of phi over
    a row; k >= 0 says how much phi falls with y, and the paper fixes k = 1/10.

    >>> AdaNorm(2, eps=0.0)(torch.tensor([-1.0, 1.0])).tolist()
    [-1.100000023841858, 0.8999999761581421]
    """

    norm_name, plain_settings = "adanorm", {"C": 1.0, "k": 0.0}

    def __init__(self, normalized_shape: Any, eps: float = 1e-5, *, C: float = 1.0, k: float = 0.1, **layout: Any):
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
    """DetachNorm: LayerNorm-simple with the mean and / or variance as constants in the backward pass (sec. 4)."""

    norm_name = "detachnorm"

    def __init__(self, *args: Any, detach_mean: bool = True, detach_variance: bool = True, **layout: Any) -> None:
        super().__init__(*args, **layout)
        self.detach_mean, self.detach_variance = flags = detach_mean, detach_variance
        check(set(map(type, flags)) == {bool}, "detach_mean and detach_variance must be True or False", flags)
        some = detach_variance or (detach_mean and self.centered)  # without a mean there is none to detach
        check(some, 'nothing is detached: set detach_variance=True, or use norm "layernorm-simple"', flags)

    def compute(self, x: Tensor) -> Tensor:
        deviation, rstd = self.standardize(x, self.detach_mean)
        return deviation * (rstd.detach() if self.detach_variance else rstd)


class NoNorm(SwappedNorm):
    """The paper's "w/o Norm": returns a copy of its input, as models write in place into what a norm returns."""

    norm_name, compute = "none", staticmethod(torch.clone)


class DyT(SwappedNorm):
    """Dynamic Tanh: z = gain * tanh(alpha * x) + bias with learned gain, bias and scalar alpha (arXiv:2503.10622). The
    scalar starts at the setting alpha > 0. No loader takes `dyt_gain` and the like for parameters of a LayerNorm."""

    norm_name = "dyt"

    def __init__(self, normalized_shape: Any, eps: float = 1e-5, *, alpha: float = 0.5, **layout: Any) -> None:
        super().__init__(normalized_shape, eps, **layout)
        self.alpha = check_number("alpha", alpha, inclusive=False)
        for name, shape in (("gain", self.normalized_shape), ("bias", self.normalized_shape), ("alpha", (1,))):
            self.register_parameter(f"dyt_{name}", nn.Parameter(self.weight.new_empty(shape)))
        self.start_values = {"dyt_bias": 0.0, "dyt_alpha": self.alpha}
        self.reset_parameters()

    def compute(self, x: Tensor) -> Tensor:
        gain, bias, alpha = (self.get_parameter(f"dyt_{name}").to(x.dtype) for name in ("gain", "bias", "alpha"))
        return gain * torch.tanh(alpha * x) + bias


NORM_CLASSES = {cls.norm_name: cls for cls in (LayerNormSimple, AdaNorm, NoNorm, DetachNorm, DyT)}
Classes = Mapping[str, Callable[..., SwappedNorm]]  # norms of other authors: what builds the holder of each, by name
_SPEC = {"format": 0, "version": "", "groups": [], "biases": [], "eps": {}, "classes": {}}
_GROUP: dict[str, Any] = {"norm": "", "modules": [], "settings": {}, **dict.fromkeys(LAYOUT)}
_STAR = "999999999"  # stands for "*" where a key is renamed


def is_name(value: Any) -> bool:
    """Tell whether `value` is a name of modules: identifiers, numbers or "*" between dots, "^" in front at most."""
    parts = value.removeprefix("^").split(".") if isinstance(value, str) and len(value) <= 512 else [""]
    return all(part == "*" or (part and f"_{part}".replace("-", "_").isidentifier()) for part in parts)


def _checked(data: Any, default: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Return the object with what it lacks from `default`; its values have the types of those there."""
    check(isinstance(data, dict), f"{what} must be an object", data)
    for key, value in data.items():
        kind = type(default.get(key, ...))
        small = not isinstance(value, (list, dict)) or len(value) <= 100_000
        check(small and kind in (type(value), type(None)), f"{what} has a wrong entry {short_repr(key)}", value)
        for name in value if key in ("modules", "biases") or kind is dict else ():
            check(is_name(name), f"{what} must hold names", name)
    return {**default, **data}


def read_spec(data: Any, others: Iterable[str]) -> dict[str, Any]:
    """Return `config.adanorm`, which a stranger may have written, with every value checked (ValueError, TypeError),
    except for the settings of the norms of other authors, whose names are `others`."""
    spec = _checked(data, _SPEC, "config.adanorm")
    who = f"config.adanorm of hf_adanorm {spec['version'][:40]}: {__version__} reads format {FORMAT}, install a newer"
    check(1 <= spec["format"] <= FORMAT, who, spec["format"])
    check(len(spec["groups"]) <= 10_000, "config.adanorm must hold at most 10,000 groups", len(spec["groups"]))
    names = [*NORM_CLASSES, *others]
    spec["groups"] = [_checked(group, _GROUP, "a group of config.adanorm") for group in spec["groups"]]
    for group in spec["groups"]:
        norm, settings = group["norm"], group["settings"]
        check(norm in names, f"norm must be one of {names}", norm)
        for key, value in settings.items():
            plain = isinstance(value, (str, int, float, type(None))) and len(short_repr(value)) < 80
            check(plain, f"setting {key} must be a number, a text or null", value)
        layout = {key: group[key] for key in LAYOUT if group.get(key) is not None}
        kind, own = (NORM_CLASSES[norm], settings) if norm in NORM_CLASSES else (SwappedNorm, {})
        kind(**{"normalized_shape": 2, **layout}, **own, device="meta")  # the constructor checks the values
    return {**spec, "eps": {name: check_number("eps", value) for name, value in spec["eps"].items()}}


def renamings(model: Any) -> tuple[str, list[Any], list[Any]]:
    """Return the prefix of the base model, if it has one, and how transformers renames keys inside and outside it."""
    prefix, found = getattr(model, "base_model_prefix", ""), []
    base = getattr(model, prefix, model) if prefix else model
    conversions: Any = sys.modules.get("transformers.conversion_mapping")  # as the attribute it may be missing
    for part in (base, model) if base is not model else (model,):
        try:
            owner = next(module for module in part.modules() if isinstance(module, PreTrainedModel))
            mapping = conversions.get_model_conversion_mapping(owner, add_legacy=False)
            found.append([renaming for renaming in mapping if type(renaming).__name__ == "WeightRenaming"])
        except (AttributeError, StopIteration, TypeError):  # another version: the names are then those of the modules
            found.append([])
    return f"{prefix}." if base is not model else "", found[0], found[-1]


def find_modules(model: nn.Module, patterns: Iterable[str], modules: Iterable[Any]) -> dict[str, dict[str, Any]]:
    """Return which of the named `modules` of `model` each name of a spec means, {} for none. A name is the one in a
    key, which transformers may rename, or else a module's own. Names with "^" are outside the base model."""
    by_name, table, found = dict(modules), cast(dict[Any, list[list[str]]], {}), cast(dict[str, dict[str, Any]], {})
    for parts in (name.split(".") for name in by_name):
        table.setdefault(tuple("*" if part.isdigit() else part for part in parts), []).append(parts)
    prefix, inside, outside = renamings(model)
    for pattern in dict.fromkeys(patterns):
        own = key = pattern.removeprefix("^")
        for renaming in inside if own == pattern else outside:
            key = renaming.rename_source_key(f"{key.replace('*', _STAR)}.weight")[0].removesuffix(".weight")
        for name in (key.replace(_STAR, "*"), own):
            want = (prefix * (own == pattern) + name).split(".")
            near = table.get(tuple("*" if part.isdigit() else part for part in want), [])
            hits = [parts for parts in near if all(w in (p, "*") for w, p in zip(want, parts, strict=True))]
            found[pattern] = found.get(pattern) or {n: by_name[n] for n in map(".".join, hits)}
    return found


def source_settings(module: nn.Module) -> dict[str, Any]:
    """Return what can be read off a norm without running it: eps, normalized_shape, channels_first."""
    if is_swapped(module):
        return {key: getattr(module, key) for key in LAYOUT}
    eps = [value for key in ("eps", "variance_epsilon") if isinstance(value := getattr(module, key, None), float)]
    shape = getattr(module, "normalized_shape", None) or getattr(getattr(module, "weight", None), "shape", None)
    found = {"channels_first": getattr(module, "data_format", None) == "channels_first", "eps": eps and eps[0]}
    found["normalized_shape"] = (shape,) if isinstance(shape, int) else shape and tuple(shape)
    return {key: value for key, value in found.items() if value not in (None, [], ())}


def make_norm(source: nn.Module, group: Mapping[str, Any], others: Classes) -> SwappedNorm:
    """Return the norm that replaces `source`: its settings from the group, the rest from `source`."""
    layout = {**source_settings(source), **{key: group[key] for key in LAYOUT if group.get(key) is not None}}
    for key in ("eps", "normalized_shape"):
        check(key in layout, f"{key} is not known, the spec must give it", type(source).__name__)
    tensor = next((t for t in (*source.parameters(), *source.buffers()) if t.is_floating_point()), None)
    layout |= {} if tensor is None else {"device": tensor.device, "dtype": tensor.dtype}
    layout["centered"], norm = group.get("centered") is not False, group["norm"]
    new = (NORM_CLASSES.get(norm) or others[norm])(**layout, **group["settings"]).train(source.training)
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
            owner, _, key = name.rpartition(".")
            model.get_submodule(owner).register_module(key, replacements[id(child)])
    fused = (nn.TransformerEncoder, nn.TransformerEncoderLayer)  # a fast path reads the norms' weights
    for module in (m for m in model.modules() if isinstance(m, fused) and any(map(is_swapped, m.modules()))):
        module.activation_relu_or_gelu, module.use_nested_tensor = 0, False


def apply_spec(model: Any, data: Any, others: Classes, replaced: Any = lambda new, old: None) -> None:
    """Swap exactly the modules that a spec names; names that `model` does not have (another head) are skipped.

    Raise TypeError or ValueError, before any change, if the spec is wrong or names a module that cannot be a norm.
    `others` builds the norms of other authors; `replaced` is called with each new norm and the one that it replaces.
    """
    spec, swaps, new = read_spec(data, others), cast(dict[int, tuple[str, Any, Any]], {}), cast(dict[int, Any], {})
    names = [name for group in spec["groups"] for name in group["modules"]]
    found = find_modules(model, [*names, *spec["biases"], *spec["eps"]], model.named_modules())
    for group in spec["groups"]:  # the last group that names a module decides, once
        for pattern in dict.fromkeys(group["modules"]):
            swaps |= {id(module): (name, module, group) for name, module in found[pattern].items()}
    for key, (name, module, group) in swaps.items():
        said = {**group, "modules": ()}
        if module.__dict__.get("adanorm_group") != said:  # else the base model in this model has done it
            _check_norm(name, module, group["eps"] is not None)
            new[key] = make_norm(module, group, others)
            new[key].__dict__["adanorm_group"] = said
            replaced(new[key], module)
    linear = [(name, module) for pattern in spec["biases"] for name, module in found[pattern].items()]
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    for name, module in linear:
        check(isinstance(module, kinds), f"config.adanorm gives a bias to {name}, no linear layer", str(type(module)))
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
    kind = set if isinstance(ignored, set) else list
    model._keys_to_ignore_on_load_unexpected = kind([*(ignored or ()), NOTICE, r"\._extra_state$"])


def _check_norm(name: str, module: nn.Module, knows_eps: bool) -> None:
    """Raise ValueError unless a spec, which a stranger may have written, may name this module. It must be a norm with
    at most a gain and a bias, of one shape, and have an eps, or a class or name that says norm."""
    known = is_swapped(module) or isinstance(module, (nn.LayerNorm, nn.RMSNorm))
    cls, place = type(module).__name__, name.rpartition(".")[2].lower()
    torch_own = any(base.__module__.startswith("torch.nn") for base in type(module).__mro__ if base is not nn.Module)
    shapes = {tuple(getattr(p, "ds_shape", p.shape)) for p in module.parameters()}
    called_norm = "norm" in (cls + place).lower() or "LN" in cls or place.startswith("ln")
    like_norm = (knows_eps or "eps" in source_settings(module)) and {len(shape) for shape in shapes} == {1}
    small = len(shapes) <= 1 and len(list(module.parameters())) <= 2 and sum(1 for _ in module.modules()) <= 3
    fine = known or (not torch_own and (called_norm or like_norm) and small)
    check(fine, f"config.adanorm names {name!r}, which is no normalization layer", cls)


def notice_hook(module: nn.Module, state_dict: dict[str, Any], prefix: str = "", metadata: Any = None) -> None:
    """Add a key that ends in NOTICE, of one byte, beside the first swapped norm, for the report of a stock loader."""
    for name, norm in module.named_modules():
        if not prefix and is_swapped(norm) and any(f"{name}.{key}" in state_dict for key, _ in norm.named_buffers()):
            state_dict[f"{name}.{NOTICE}"] = torch.zeros(1, dtype=torch.uint8)
            return


def model_classes(module_name: str, others: Classes) -> Callable[[str], Any]:
    """Return the `__getattr__` of a module whose `BertModel` and the like apply the spec in their config. transformers
    copies the file of the module called `module_name` when such a model is saved."""

    @cache
    def get(name: str) -> Any:
        stock = None if name.startswith("_") else getattr(transformers, name, None)
        if not (isinstance(stock, type) and issubclass(stock, PreTrainedModel)):
            raise AttributeError(f"module {module_name!r} has no attribute {name!r}, only transformers' model classes")
        package = getattr(sys.modules.get("hf_adanorm"), "serve", None)  # it is never imported from here
        methods = (package and package(FORMAT, stock, others)) or _methods(stock, module_name, others)
        return type(name, (stock,), {"__module__": module_name, "__qualname__": name, **methods})

    return get


def _methods(stock: type[PreTrainedModel], module_name: str, others: Classes) -> dict[str, Any]:
    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        stock.__init__(self, config, *args, **kwargs)
        for module in [m for m in self.modules() if isinstance(m, PreTrainedModel)]:
            if getattr(module.config, "adanorm", None) is not None:
                apply_spec(module, module.config.adanorm, others)
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
