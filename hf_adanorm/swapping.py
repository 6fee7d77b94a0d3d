"""One change of a model's norms: planned, checked, applied as a whole, and taken back as a whole.

1. `make_plan` chooses the norms, says what each becomes, and raises for whatever does not fit. It changes nothing.
2. `all_or_nothing(model)` opens the change that a patch, a fold and their way back are parts of.
   It notes how every module is put together; the few tensors whose values a fold overwrites are kept by `keep`.
3. `apply_plan` replaces the modules and writes the specs.
4. Warnings are said last, with everything in place. Whatever is raised before the end, a KeyboardInterrupt, a
   MemoryError and a warning that a filter turns into an error included, takes all of it back: a call that raises
   leaves the model as it was.
"""

from __future__ import annotations

import contextlib
import difflib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .detection import NormInfo, check_module, recognize
from .modeling_adanorm import (
    ADJUSTED_EPS,
    NORM_CLASSES,
    LayerNormSimple,
    NormGroup,
    SwappedNorm,
    is_as,
    is_swapped,
    make_norm,
    replace_modules,
    short_repr,
    source_settings,
)
from .options import CHOICES
from .report import NormRow
from .saving import write_specs
from .selection import Patterns, check_patterns, choose_norms

# --------------------------------------------------------------------------------------------------------- the change

# What nn.Module keeps in tables of its own: parameters, buffers, submodules, hooks.
_TABLES = tuple(key for key, value in vars(nn.Module()).items() if isinstance(value, (dict, set)))


class Change:
    """How a model was put together, and the tensors that were overwritten since: enough to take a change back.

    Args:
        model: with all its modules.
        others: modules outside of it that may change, too; where their tensors lie is noted as well.
    """

    def __init__(self, model: nn.Module, others: Sequence[nn.Module] = ()) -> None:
        self.model = model
        modules = {id(module): module for root in (model, *others) for module in root.modules()}
        self._modules = [
            (
                module,
                dict(module.__dict__),
                {
                    key: table.copy() if (table := module.__dict__[key]) else ()
                    for key in _TABLES
                    if key in module.__dict__
                },
            )
            for module in modules.values()
        ]
        self._data = [(tensor, tensor.data) for root in others for tensor in (*root.parameters(), *root.buffers())]
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._warnings: list[str] = []

    def warn(self, message: str) -> None:
        """To be said at the end of the call."""
        self._warnings.append(message)

    def keep(self, tensor: Tensor) -> None:
        """Remember the values of `tensor`. Call it before they are overwritten; more than once does no harm."""
        if not any(kept is tensor for kept, _ in self._kept):
            self._kept.append((tensor, tensor.detach().clone()))

    @torch.no_grad()
    def undo(self) -> None:
        """Take everything back. A KeyboardInterrupt on the way waits until it is done."""
        interrupt: KeyboardInterrupt | None = None
        while True:
            try:
                while self._kept:
                    tensor, old = self._kept[-1]
                    tensor.copy_(old)
                    self._kept.pop()
                for tensor, data in self._data:
                    tensor.data = data
                for module, attributes, tables in self._modules:
                    for key, entries in tables.items():
                        attributes[key].clear()
                        attributes[key].update(entries)
                    module.__dict__.clear()
                    module.__dict__.update(attributes)
            except KeyboardInterrupt as error:
                interrupt = error
            else:
                break
        if interrupt is not None:
            raise interrupt


@contextlib.contextmanager
def all_or_nothing(model: nn.Module, others: Sequence[nn.Module] = ()) -> Iterator[Change]:
    """The block's changes of `model` (and of `others`, see `Change`) stand when it ends, and its warnings are said; if
    it raises anything, they are taken back."""
    change = Change(model, others)
    try:
        yield change
        for message in change._warnings:
            warnings.warn(message, stacklevel=4)  # whoever called the function that holds the block
    except BaseException:
        change.undo()
        raise


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[Change]:
    """Whatever the block changes in `model` is taken back at its end."""
    change = Change(model)
    try:
        yield change
    finally:
        change.undo()


# ----------------------------------------------------------------------------------------------------------- the plan


def check_choice(option: str, value: Any, choices: Sequence[str]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{option} must be one of {list(choices)}, got {short_repr(value)}")
    if value not in choices:
        close = difflib.get_close_matches(value, choices, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{option} must be one of {list(choices)}, got {short_repr(value)}{hint}")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The checked options of one call that choose norms and say what they become."""

    norm: str = "adanorm"
    C: float = 1.0
    k: float | dict[str, float] = 0.1
    detach_mean: bool = True
    detach_variance: bool = True
    eps: float | None = None
    centered: bool | None = None
    include: Patterns = None
    exclude: Patterns = None
    layers: tuple[int, ...] | None = None
    targets: str = "auto"

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, list(NORM_CLASSES))
        check_choice("targets", self.targets, CHOICES["targets"])
        # The constructors hold the ranges; every value is checked, whichever norm it belongs to.
        for kind in NORM_CLASSES.values():
            values = {key: getattr(self, key) for key in kind.SETTINGS}
            by_norm = {key: value for key, value in values.items() if isinstance(value, dict)}
            for key, value in ((key, value) for key, found in by_norm.items() for value in found.values()):
                kind.SETTINGS[key].check(key, value)
            kind(1, **{key: value for key, value in values.items() if key not in by_norm})
        if self.eps is not None:
            LayerNormSimple(1, eps=self.eps)
        if self.centered is not None:
            LayerNormSimple(1, centered=self.centered)
        check_patterns("include", self.include)
        check_patterns("exclude", self.exclude)

    def group(self, name: str, source: nn.Module, info: NormInfo) -> NormGroup:
        """What `source`, called `name`, becomes. Only what cannot be read off `source` without running it is
        spelled out."""
        readable = source_settings(source)
        facts = {
            "eps": info.eps,
            "normalized_shape": info.normalized_shape,
            "channels_first": info.channels_first,
        }
        overrides: dict[str, Any] = {key: value for key, value in facts.items() if readable.get(key) != value}
        if self.eps is not None:
            overrides["eps"] = float(self.eps)
        centered = self.centered if self.centered is not None else info.kind == "layernorm"
        settings: dict[str, Any] = {}
        for key, setting in NORM_CLASSES[self.norm].SETTINGS.items():
            value = getattr(self, key)
            if isinstance(value, dict):  # one for each norm
                if name not in value:
                    names = ", ".join(map(repr, sorted(value)[:3])) + (", ..." if len(value) > 3 else "")
                    raise ValueError(
                        f"{key} has no value for the norm {name!r}; it has {len(value)}: {names or 'none'}"
                    )
                value = value[name]
            settings[key] = setting.check(key, value)
        return NormGroup(norm=self.norm, modules=(), centered=None if centered else False, **settings, **overrides)


@dataclass
class Plan:
    """What a call will do: `swaps` in the order of the model, and every norm of the model in `rows`."""

    model: nn.Module
    options: Options
    rows: list[NormRow]
    swaps: list[tuple[str, nn.Module, NormInfo, NormGroup]] = field(default_factory=list)


def make_plan(model: nn.Module, options: Options) -> Plan:
    """Choose the norms and check that each can be swapped. Changes nothing; raises what `patch_model` raises."""
    refuse_wrapped(model)
    plan = Plan(model=model, options=options, rows=choose(model, options))
    for row in plan.rows:
        if not row.chosen:
            continue
        if getattr(row.info, "parametrized", False):
            raise ValueError(
                f"{row.name} is under torch.nn.utils.parametrize: replacing it would lose the parametrization. Call "
                f"torch.nn.utils.parametrize.remove_parametrizations first, or exclude={[row.name]!r}"
            )
        plan.swaps.append((row.name, row.module, row.info, options.group(row.name, row.module, row.info)))
    if not plan.swaps:
        skipped = next((f" ({row.name}: {row.reason})" for row in plan.rows if row.reason), "")
        raise ValueError(
            f"{type(model).__name__} has no norm to swap with targets={options.targets!r}{skipped}. "
            "inspect_model(model) lists every norm"
        )
    return plan


def choose(model: nn.Module, options: Options) -> list[NormRow]:
    """Return every norm of the model. Those that the options do not choose carry the reason."""
    return choose_norms(
        model, include=options.include, exclude=options.exclude, layers=options.layers, targets=options.targets
    )


_WRAPPERS = {
    "DataParallel",
    "DeepSpeedEngine",
    "DistributedDataParallel",
    "FSDPModule",
    "FullyShardedDataParallel",
    "OptimizedModule",
}


def refuse_wrapped(model: nn.Module) -> None:
    """Raise TypeError for what is no module, ValueError for a model that DDP, FSDP or the like already holds."""
    check_module(model)
    for module in model.modules():
        wrapper = next((cls.__name__ for cls in type(module).__mro__ if cls.__name__ in _WRAPPERS), "")
        if not wrapper and getattr(module, "_compiled_call_impl", None) is not None:
            wrapper = "torch.compile"
        if wrapper:
            raise ValueError(
                f"{type(module).__name__} is already wrapped ({wrapper}): change the norms before "
                "accelerator.prepare, DDP, FSDP, DeepSpeed or torch.compile"
            )


# ----------------------------------------------------------------------------------------------------- carrying it out


def apply_plan(plan: Plan) -> None:
    """Replace the modules and write the specs. Nothing before the first replacement changes the model."""
    fallback = next((t for t in plan.model.parameters() if t.is_floating_point()), None)
    replacements: dict[int, nn.Module] = {}
    for _, module, info, group in plan.swaps:
        if is_as(module, group):
            continue
        new = make_norm(module, group)
        if fallback is not None and not any(True for _ in (*module.parameters(), *module.buffers())):
            new.to(device=fallback.device, dtype=fallback.dtype)  # a norm without tensors does not say where it lives
        if not is_swapped(module):
            new.__dict__["_source_has_values"] = True
        _take_over(new, module, info)
        _carry_dispatch_hook(module, new)
        replacements[id(module)] = new
    if not replacements:
        return
    replace_modules(plan.model, replacements)
    write_specs(plan.model)


def _carry_dispatch_hook(source: nn.Module, new: nn.Module) -> None:
    """accelerate's `device_map` replaces `forward` and moves inputs and offloaded weights in a hook. The new norm has
    no weight to bring in: it needs the devices only. The old one keeps its hook, which knows where its values are."""
    hook = getattr(source, "_hf_hook", None)
    if hook is None:
        return
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module  # noqa: PLC0415, need not be there

    device = getattr(hook, "execution_device", None)
    same = getattr(hook, "io_same_device", False)
    if device is not None:
        new.to_empty(device=device) if new.weight.is_meta else new.to(device)
        new.weight.fill_(1.0)  # type: ignore[operator]
    add_hook_to_module(new, AlignDevicesHook(execution_device=device, io_same_device=same))


@torch.no_grad()
def _take_over(new: SwappedNorm, source: nn.Module, info: NormInfo) -> None:
    """Copy gain and bias of the norm that is replaced to where the new one holds its own, if it does; what was frozen
    stays so."""
    held = source.affine() if is_swapped(source) else {}
    for key, tensor in new.affine().items():
        name, offset = (info.gain_name, info.gain_offset) if key == "gain" else (info.bias_name, 0.0)
        if key in held:
            tensor.copy_(held[key])
        elif name is not None:
            tensor.copy_(getattr(source, name).detach().add(offset))
    own = list(source.parameters(recurse=False))
    if own and not any(parameter.requires_grad for parameter in own):
        new.requires_grad_(False)
    new._is_hf_initialized = not new.weight.is_meta


# --------------------------------------------------------------------------------------------------------- and back


def restored(module: SwappedNorm) -> nn.Module:
    """The module that `module` replaced, on its device and in its dtype."""
    source = module.__dict__["_source"]
    if source is None:  # a norm that the user put there by hand
        source = nn.LayerNorm(module.normalized_shape, eps=module.eps)
    elif ADJUSTED_EPS in module.__dict__:  # by a fold, after the swap
        source.__dict__.update(dict.fromkeys({"eps", "variance_epsilon"} & source.__dict__.keys(), module.eps))
        source.__dict__[ADJUSTED_EPS] = True
    weight = module.weight
    if not module.__dict__["_source_has_values"]:
        if any(p.is_meta for p in source.parameters()) and not weight.is_meta:
            source = source.to_empty(device=weight.device)
        _reset_affine(source)
        _put_back(module.affine(), source)
    if not hasattr(source, "_hf_hook"):  # accelerate's hook brings offloaded tensors in by itself
        source.to(device=weight.device, dtype=weight.dtype)
    source.train(module.training)
    return source  # type: ignore[no-any-return]


@torch.no_grad()
def _reset_affine(norm: nn.Module) -> None:
    """Gain 1 and bias 0, in whatever form the norm keeps them (a gain stored as an offset from 1 becomes 0)."""
    info = recognize(norm)
    offset = 0.0 if info is None else info.gain_offset
    bias_name = None if info is None else info.bias_name
    for name, parameter in norm.named_parameters():
        parameter.fill_(0.0 if name == bias_name else 1.0 - offset)


@torch.no_grad()
def _put_back(affine: dict[str, Tensor], source: nn.Module) -> None:
    """The gain and bias that a norm holds, back into the one that they came from."""
    info = recognize(source)
    if info is None:
        return
    for key, name, offset in (("gain", info.gain_name, info.gain_offset), ("bias", info.bias_name, 0.0)):
        if key in affine and name is not None:
            getattr(source, name).copy_(affine[key].float().sub(offset))
