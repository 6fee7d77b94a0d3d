"""Change the norms of a model in one transaction: plan, check, apply, undo.

1. `make_plan` chooses the norms, decides what each becomes, and raises for whatever does not fit. It changes nothing.
2. `all_or_nothing(model)` opens the change that contains a patch, a fold, or their undoing. It notes how every module
   is put together. `keep` copies the few tensors that a fold overwrites.
3. `apply_plan` replaces the modules and writes the specs.
4. Warnings come last. Whatever is raised until then undoes everything, such as a KeyboardInterrupt, a MemoryError, or
   a warning that a filter turns into an error.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .detection import NormInfo, check_module, recognize
from .holder import held
from .modeling_adanorm import (
    ADJUSTED_EPS,
    LAYOUT,
    NORM_CLASSES,
    SwappedNorm,
    check,
    check_number,
    is_swapped,
    make_norm,
    replace_modules,
    source_settings,
)
from .norms import did_you_mean, name_of, settings_of
from .norms import remember as remember_class
from .replaced import GIVEN_EPS, learned_affine, remember, replaced_by
from .saving import write_specs
from .selection import Selection, choose_norms
from .spec import NormGroup
from .state import State

# --------------------------------------------------------------------------------------------------------- the change


class Change(State):
    """A change of `model`, and of `others` outside of it: the state before, and the warnings for the end."""

    def __init__(self, model: nn.Module, others: Sequence[nn.Module] = ()) -> None:
        super().__init__(model, *others)
        self.model = model
        self._warnings: list[str] = []

    def warn(self, message: str) -> None:
        """Warn at the end of the call."""
        self._warnings.append(message)


@contextlib.contextmanager
def all_or_nothing(model: nn.Module, others: Sequence[nn.Module] = (), stacklevel: int = 4) -> Iterator[Change]:
    """Keep the changes that the block makes if it ends normally, and give its warnings. Undo them if it raises."""
    change = Change(model, others)
    try:
        yield change
        for message in change._warnings:
            warnings.warn(message, stacklevel=stacklevel)  # 4: the caller of the function that contains the block
    except BaseException:
        change.restore()
        raise


# ----------------------------------------------------------------------------------------------------------- the plan


@dataclass(frozen=True, kw_only=True)
class Options(Selection):
    """The checked options of one call: which norms, and what they become."""

    cls: type[nn.Module] = NORM_CLASSES["adanorm"]
    settings: Mapping[str, Any] = field(default_factory=dict)
    eps: float | None = None
    centered: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eps is not None:
            check_number("eps", self.eps)
        check(type(self.centered) in (bool, type(None)), "centered must be True or False", self.centered)

    @property
    def norm(self) -> str:
        """The name of the norm."""
        return name_of(self.cls)

    def group(self, name: str, source: nn.Module, info: NormInfo) -> NormGroup:
        """Return what the norm `name` becomes. The group contains only what cannot be read off `source`."""
        readable = source_settings(source)
        facts = {"eps": info.eps, "normalized_shape": info.normalized_shape, "channels_first": info.channels_first}
        overrides: dict[str, Any] = {key: value for key, value in facts.items() if readable.get(key) != value}
        if self.eps is not None:
            overrides["eps"] = float(self.eps)
        centered = self.centered if self.centered is not None else info.kind == "layernorm"
        # A mapping has a value for each norm; those that it does not list take the default.
        own = {key: value for key, value in self.settings.items() if not isinstance(value, Mapping)}
        own |= {k: value[name] for k, value in self.settings.items() if isinstance(value, Mapping) and name in value}
        group = NormGroup(
            norm=self.norm,
            modules=(),
            centered=None if centered else False,
            settings={key: plain_value(value) for key, value in own.items()},
            output_dtype=None if is_swapped(source) else output_rule(source, info),
            **overrides,
        )
        make_norm(source, vars(group), held({self.norm: self.cls}))  # the constructor checks the values
        return group


def plain_value(value: Any) -> Any:
    """Return a setting as a JSON scalar: numbers of NumPy and tensors of one element become plain ones."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return value.item() if hasattr(value, "item") else float(value)


def output_rule(source: nn.Module, info: NormInfo) -> str | None:
    """Return how the dtype of the outputs depends on that of the weight, see `SwappedNorm.output_dtype`."""
    if isinstance(source, nn.LayerNorm) or not any(True for _ in source.parameters()) or hasattr(source, "_hf_hook"):
        return None
    shape = (1, *info.normalized_shape, 2) if info.channels_first else (2, *info.normalized_shape)

    def returned(given: torch.dtype, own: torch.dtype) -> torch.dtype:
        memo: dict[int, Any] = {id(p): nn.Parameter(p.to("meta", own), False) for p in source.parameters()}
        memo |= {id(b): b.to("meta") for b in source.buffers()}
        plain = copy.deepcopy(source, memo)
        with torch.no_grad():
            return plain.forward(torch.empty(shape, dtype=given, device="meta")).dtype  # type: ignore[no-any-return]

    try:
        narrow, wide = returned(torch.float32, torch.float16), returned(torch.float16, torch.float32)
    except Exception:  # the norm needs more than its input
        return None
    return None if wide != torch.float32 else "weight" if narrow == torch.float16 else "promote"


@dataclass
class Plan:
    """What a call will do: `swaps` in the order of the model."""

    model: nn.Module
    options: Options
    swaps: list[tuple[str, nn.Module, NormInfo, NormGroup]] = field(default_factory=list)


def make_plan(model: nn.Module, options: Options) -> Plan:
    """Choose the norms and check that each can be swapped. Changes nothing; raises what `patch_model` raises."""
    refuse_wrapped(model)
    plan, rows = Plan(model, options), choose_norms(model, options)
    for row in (row for row in rows if row.chosen):
        if getattr(row.info, "parametrized", False):
            raise ValueError(
                f"{row.name} is under torch.nn.utils.parametrize, which a swap would lose: call "
                f"torch.nn.utils.parametrize.remove_parametrizations first, or exclude={[row.name]!r}"
            )
        plan.swaps.append((row.name, row.module, row.info, options.group(row.name, row.module, row.info)))
    known = {row.name for row in rows}
    named = {name: key for key, value in options.settings.items() if isinstance(value, Mapping) for name in value}
    for name in named.keys() - known:
        hint = did_you_mean(name, known)
        raise ValueError(f"{named[name]} has a value for {name!r}, which is no norm of the model{hint}")
    if not plan.swaps:
        skipped = next((f" ({row.name}: {row.reason})" for row in rows if row.reason), "")
        raise ValueError(f"no norm to swap with targets={options.targets!r}{skipped}; see inspect_model(model)")
    return plan


_WRAPPERS = {"DataParallel", "DistributedDataParallel", "FSDPModule", "FullyShardedDataParallel"}
_WRAPPERS |= {"DeepSpeedEngine", "OptimizedModule"}


def refuse_wrapped(model: nn.Module) -> None:
    """Raise TypeError unless `model` is a module, ValueError if DDP, FSDP or the like already wraps it."""
    check_module(model)
    for module in model.modules():
        wrappers = [cls.__name__ for cls in type(module).__mro__ if cls.__name__ in _WRAPPERS]
        wrappers += ["torch.compile"] if getattr(module, "_compiled_call_impl", None) is not None else []
        if wrappers:
            raise ValueError(
                f"{type(module).__name__} is already wrapped ({wrappers[0]}): change the norms before "
                "accelerator.prepare, DDP, FSDP, DeepSpeed or torch.compile"
            )


# ----------------------------------------------------------------------------------------------------- carrying it out


def is_as(module: nn.Module, group: NormGroup) -> bool:
    """Check whether `module` is already swapped with the settings of `group`."""
    if not is_swapped(module) or module.norm_name != group.norm or module.centered != (group.centered is not False):
        return False
    layout = {key: value for key in LAYOUT if key != "centered" and (value := getattr(group, key)) is not None}
    same = all(getattr(module, key) == value for key, value in layout.items())
    return same and module.settings() == {**settings_of(type(module.inner)), **group.settings}


def apply_plan(plan: Plan) -> None:
    """Replace the modules and write the specs. Nothing before the first replacement changes the model."""
    fallback = next((t for t in plan.model.parameters() if t.is_floating_point()), None)
    replacements: dict[int, nn.Module] = {}
    for _, module, info, group in plan.swaps:
        if is_as(module, group) and type(module.inner) is plan.options.cls:
            continue
        new = make_norm(module, vars(group), held({group.norm: plan.options.cls}))
        if fallback is not None and not any(True for _ in (*module.parameters(), *module.buffers())):
            new.to(device=fallback.device, dtype=fallback.dtype)  # a norm without tensors does not say where it lives
        _inherit(new, module, info, plan.options.cls, group)
        _carry_hooks(module, new)
        remember(new, module, has_values=True)
        if ADJUSTED_EPS in module.__dict__ and is_swapped(module) and new.eps == module.eps:
            new.__dict__[ADJUSTED_EPS] = True
        if plan.options.eps is not None:
            new.__dict__[GIVEN_EPS] = True
        replacements[id(module)] = new
    if not replacements:
        return
    if plan.options.norm not in NORM_CLASSES:
        remember_class(plan.options.cls)
    replace_modules(plan.model, replacements)
    write_specs(plan.model)


def restore_fused_path(model: nn.Module) -> None:
    """Let torch's TransformerEncoder use its fused inference path again where no norm is swapped."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and not any(map(is_swapped, module.modules())):
            act: Any = module.activation
            is_relu = act is F.relu or isinstance(act, nn.ReLU)
            is_gelu = act is F.gelu or isinstance(act, nn.GELU)
            module.activation_relu_or_gelu = 1 if is_relu else 2 if is_gelu else 0
        elif isinstance(module, nn.TransformerEncoder) and not any(map(is_swapped, module.modules())):
            module.use_nested_tensor = module.enable_nested_tensor


def _carry_hooks(source: nn.Module, new: nn.Module) -> None:
    """Give `new` the hooks of calls, and the devices of accelerate's `device_map`, whose hook moves inputs.
    The new norm has no weight to load. The old one keeps its hook, which knows where its values are."""
    for key in vars(nn.Module()):
        if "hook" in key and "state_dict" not in key:
            new.__dict__[key] = source.__dict__[key]
    if (hook := getattr(source, "_hf_hook", None)) is None:
        return
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module  # noqa: PLC0415, need not be there

    device, same = getattr(hook, "execution_device", None), getattr(hook, "io_same_device", False)
    if device is not None:
        new.to_empty(device=device) if new.weight.is_meta else new.to(device)
        new.weight.fill_(1.0)  # type: ignore[operator]
    add_hook_to_module(new, AlignDevicesHook(execution_device=device, io_same_device=same))


@torch.no_grad()
def _inherit(new: SwappedNorm, source: nn.Module, info: NormInfo, cls: type[nn.Module], group: NormGroup) -> None:
    """Give `new` the parameters of a replaced norm of the same class, or what `from_norm` makes of gain and bias. A
    frozen norm stays frozen."""
    if is_swapped(source) and type(source.inner) is type(new.inner):
        for name, parameter in source.inner.named_parameters():
            owner, _, key = name.rpartition(".")
            setattr(new.inner.get_submodule(owner), key, parameter)
    elif hasattr(cls, "from_norm"):
        made = cls.from_norm(_stand_in(source, info), **group.settings)
        if not new.weight.is_meta:
            new.inner.load_state_dict(made.state_dict(), strict=False)
    if {parameter.requires_grad for parameter in source.parameters()} == {False}:
        new.requires_grad_(False)
    new._is_hf_initialized = not new.weight.is_meta


def _stand_in(source: nn.Module, info: NormInfo) -> nn.Module:
    """Return torch's own norm with the gain, bias and eps of `source`, in whatever form that stores them."""
    eps = source.eps if is_swapped(source) else info.eps
    norm: nn.Module = (nn.RMSNorm if info.kind == "rmsnorm" else nn.LayerNorm)(info.normalized_shape, eps=eps)
    if is_swapped(source):
        held = learned_affine(source)
    else:
        held = {key: getattr(source, name).detach().add(offset) for key, name, offset in _affine_of(info)}
    for key, name in (("gain", "weight"), ("bias", "bias")):
        if key in held and getattr(norm, name, None) is not None:
            setattr(norm, name, nn.Parameter(held[key].detach().clone()))
    return norm


def _affine_of(info: NormInfo | None) -> list[tuple[str, str, float]]:
    """Return ("gain" or "bias", its parameter, the offset from the parameter to the value) for those that exist."""
    if info is None:
        return []
    both = (("gain", info.gain_name, info.gain_offset), ("bias", info.bias_name, 0.0))
    return [(key, name, offset) for key, name, offset in both if name is not None]


# ------------------------------------------------------------------------------------------------------ unpatching


def restored(module: SwappedNorm) -> nn.Module:
    """Return the norm that `module` replaced, with the gain and bias learned since, on the device and in the dtype of
    `module`. A norm that was put in by hand becomes a new LayerNorm."""
    kept = replaced_by(module)
    if kept is None:  # a norm that the user put there by hand
        source: nn.Module = nn.LayerNorm(module.normalized_shape, eps=module.eps)
    else:
        source = kept.module
        if ADJUSTED_EPS in module.__dict__:  # by a fold, after the swap
            source.__dict__.update(dict.fromkeys({"eps", "variance_epsilon"} & source.__dict__.keys(), module.eps))
            source.__dict__[ADJUSTED_EPS] = True
    weight, no_values = module.weight, kept is None or not kept.has_values
    if no_values and any(p.is_meta for p in source.parameters()) and not weight.is_meta:
        source = source.to_empty(device=weight.device)
    _fill_affine(source, learned_affine(module), no_values)
    if not hasattr(source, "_hf_hook"):  # accelerate's hook brings offloaded tensors in by itself
        source.to(device=weight.device, dtype=weight.dtype)
    source.train(module.training)
    return source


@torch.no_grad()
def _fill_affine(norm: nn.Module, affine: dict[str, Tensor], empty: bool) -> None:
    """Write gain and bias in whatever form the norm stores them; 1 and 0 where an empty norm has no others."""
    if empty:
        for parameter in norm.parameters():
            parameter.fill_(1.0)
    for key, name, offset in _affine_of(recognize(norm)):
        target = getattr(norm, name)
        if key in affine:
            target.copy_(affine[key].float().sub(offset).view_as(target))
        elif empty:
            target.fill_((key == "gain") - offset)
