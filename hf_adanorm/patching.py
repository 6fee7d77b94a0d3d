"""Swap the norms of a model, take the swap back, and say what is there.

`patch_model` makes a plan (which norm becomes what, and why another does not), checks all of it, and only then moves
modules: a call patches everything it planned or leaves the model as it was. Then it writes down what is swapped, for
stock saving and loading:

1. `iter_norms` lists the norms by what they compute; `targets`, `include`, `exclude` and `layers` choose among them.
2. Every chosen norm gets its `NormGroup`; what loading could not read off the stock module (a hard-coded eps, say) is
   put into the group, so that the saved spec decides nothing by itself.
3. The modules are replaced. Each keeps the one it replaced, for `unpatch_model`.
4. Every config in the model becomes the model's own copy (two models built from one config object share it), and gets
   the resolved spec of the part of the model that it describes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from torch import nn

from .affine import (
    fading_group,
    fill_fade,
    fold,
    refuse_other_functions,
    reset_affine,
    take_back_fading,
    warn_of_dropped,
)
from .detection import NormInfo, check_module, iter_norms, recognize
from .modeling_adanorm import (
    ADDED_BIAS,
    NORM_CLASSES,
    AdaNorm,
    DetachNorm,
    NoNorm,
    NormGroup,
    SwappedNorm,
    is_as,
    is_swapped,
    make_norm,
    replace_modules,
    short_repr,
    source_settings,
)
from .report import NormRow, Report
from .saving.spec import swapped_norms, write_specs
from .selection import Patterns, check_layers, check_patterns, match_layers, match_names

Targets = Literal["layernorm", "rmsnorm", "all"]
ModelT = TypeVar("ModelT", bound=nn.Module)


# ------------------------------------------------------------------------------------------- the public functions


def patch_model(
    model: ModelT,
    norm: str = "adanorm",
    *,
    C: float = 1.0,
    k: float | Mapping[str, float] = 0.1,
    detach_mean: bool = True,
    detach_variance: bool = True,
    eps: float | None = None,
    centered: bool | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    layers: Iterable[int] | int | None = None,
    targets: Targets = "layernorm",
    affine: str = "drop",
    on_unfoldable: str = "keep",
    fold_inputs: Mapping[str, Any] | None = None,
    ramp: bool = True,
) -> ModelT:
    """Swap the norms of `model` in place and return it.

    Save, load and push it with the stock calls afterwards. A second call changes only the norms it matches, and the
    same call twice changes nothing. Optimizers built before hold parameters that are gone: build them afterwards.

    Args:
        model: any transformers model or plain `nn.Module`, on any device, the meta device included. Not yet wrapped
            by DDP, FSDP, DeepSpeed or `torch.compile`.
        norm: `"adanorm"`, `"layernorm-simple"`, `"detachnorm"` or `"none"` (the paper's "w/o Norm").
        C: AdaNorm's C in phi(y) = C * (1 - k * y); > 0. The other norms take no notice of it.
        k: AdaNorm's k; >= 0. One number, or one for each norm by its name (`calibrate_k(model, batches).k`).
        detach_mean: DetachNorm: no gradient flows through the mean.
        detach_variance: DetachNorm: none flows through the standard deviation. Not both False.
        eps: None keeps that of each replaced norm.
        centered: None keeps what the replaced norm does (an RMSNorm does not subtract the mean). True is the paper's.
            A fold and a fade start from the function of the source, and so take neither another eps nor another
            centering.
        include: only these norms. A string is a regular expression that must match the whole module name, a list holds
            name endings; names are those of `model.named_modules()`.
        exclude: all but these, in the same way.
        layers: only norms inside these layers, counted from 0 within every stack of layers, negative from the end.
        targets: `"layernorm"`, `"rmsnorm"` or `"all"`.
        affine: what becomes of trained gains and biases: `"drop"`, `"fold"` (into the linear layers that read the
            norm, see `fold_affine`) or `"fade"` (kept as constants that `FadeCallback` or `set_fade` fade out).
        on_unfoldable: for `affine="fold"`, what to do with a norm that something else reads too: `"keep"` leaves it
            as it is, `"fade"` fades it, `"approximate"` folds a post-norm residual norm but for the deviation of its
            gain, `"calibrate"` folds every norm by a fit to `fold_inputs`, with C and k as they will be, `"raise"`.
        fold_inputs: for `affine="fold"`, a batch for the model to run on, if its own dummy inputs do not suit.
        ramp: for `affine="fold"`, start AdaNorm at k = 0, C = 1 and let `FadeCallback` or `set_fade` take them to
            their values; False sets them at once, with a warning. `"calibrate"` needs no ramp.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range, a pattern that matches no norm, nothing
            to swap, a model that is already wrapped. The model is as it was then.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> model = patch_model(BertModel(config), "adanorm", C=1.0, k=0.1)
        >>> model.encoder.layer[0].output.LayerNorm
        AdaNorm((32,), eps=1e-12, C=1.0, k=0.1)
    """
    options = Options(
        norm=norm,
        C=C,
        k=dict(k) if isinstance(k, Mapping) else k,
        detach_mean=detach_mean,
        detach_variance=detach_variance,
        eps=eps,
        centered=centered,
        include=include,
        exclude=exclude,
        layers=check_layers(layers),
        targets=targets,
    )
    _check_choice("affine", affine, ("drop", "fold", "fade"))
    _check_choice("on_unfoldable", on_unfoldable, ("keep", "fade", "approximate", "calibrate", "raise"))
    if affine != "drop" and norm == "none":
        raise ValueError(
            f'affine={affine!r} does not go with norm="none", which normalises nothing: use affine="drop"'
        )
    if affine != "fold" and (on_unfoldable != "keep" or fold_inputs is not None):
        name = "fold_inputs" if on_unfoldable == "keep" else f"on_unfoldable={on_unfoldable!r}"
        raise ValueError(f'{name} goes with affine="fold", got affine={affine!r}')
    plan = make_plan(model, options)
    if affine != "drop":
        refuse_other_functions(plan, affine)
    if affine == "drop":
        warn_of_dropped(plan)
    elif affine == "fade":
        plan.swaps = [(*swap[:3], fading_group(*swap[1:])) for swap in plan.swaps]
        if all(group.fade is None for *_, group in plan.swaps):
            raise ValueError(
                f"there is nothing to fade: the {len(plan.swaps)} norms chosen are swapped already, and hold no gain "
                "and bias. unpatch_model(model) first, or start from the model as it was before it was patched"
            )
    else:
        fold(plan, on_unfoldable, fold_inputs, ramp)
    apply_plan(plan)
    _warn_of_untouched_rmsnorms(plan)
    return model


def unpatch_model(model: ModelT) -> ModelT:
    """Put the replaced norms back, in place, and return the model.

    Gains and biases come back bit for bit. Those that are not there any more (after a reload) become 1 and 0, with
    one warning. `config.adanorm` goes, and so do our `auto_map` entries.

    Raises:
        ValueError: the model is not patched, or already wrapped (DDP, FSDP, DeepSpeed, `torch.compile`).

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
        >>> model = unpatch_model(patch_model(BertModel(config)))
        >>> is_patched(model)
        False
    """
    refuse_wrapped(model)
    swapped = swapped_norms(model)
    if not swapped:
        raise ValueError(f"{type(model).__name__} holds no swapped norm: there is nothing to take back")
    fresh = sum(not module.__dict__["_source_has_values"] and not module.fade for _, module in swapped)
    replace_modules(model, {id(module): _restored(module) for _, module in swapped})
    write_specs(model)  # biases that a fold added stay, and loading has to know of them
    if num_biases := sum(ADDED_BIAS in module.__dict__ for module in model.modules()):
        warnings.warn(
            f"{num_biases} linear layers keep the bias that a fold gave them: load what is saved from now on with "
            "hf_adanorm imported, as without it transformers leaves those biases out with no more than a warning",
            stacklevel=2,
        )
    if fresh:
        warnings.warn(
            f"the trained gains and biases of {fresh} of {len(swapped)} norms are not at hand (a saved model does not "
            "hold them): they come back as gain 1 and bias 0",
            stacklevel=2,
        )
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether any norm of `model` is swapped.

    >>> is_patched(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))
    False
    """
    check_module(model)
    return any(is_swapped(module) for module in model.modules())


def inspect_model(
    model: nn.Module,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    layers: Iterable[int] | int | None = None,
    targets: Targets = "layernorm",
) -> Report:
    """List every norm of `model`: what it computes, whether `patch_model` would swap it, and why not.

    Prints as a table and shows as HTML in a notebook. Changes nothing.

    Raises:
        TypeError, ValueError: as `patch_model`, for the options.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> report = inspect_model(BertModel(config))
        >>> report.num_swappable, report.num_affine_parameters
        (5, 320)
    """
    check_module(model)
    options = Options(include=include, exclude=exclude, layers=check_layers(layers), targets=targets)
    return Report(model_class=type(model).__name__, rows=tuple(_choose(model, options)))


# ------------------------------------------------------------------------------------------------------- the plan


def _check_choice(option: str, value: Any, choices: Sequence[str]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{option} must be one of {list(choices)}, got {short_repr(value)}")
    if value not in choices:
        raise ValueError(f"{option} must be one of {list(choices)}, got {short_repr(value)}")


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
    targets: str = "layernorm"

    def __post_init__(self) -> None:
        _check_choice("norm", self.norm, list(NORM_CLASSES))
        _check_choice("targets", self.targets, ("layernorm", "rmsnorm", "all"))
        # The constructors hold the ranges; every value is checked, whichever norm it belongs to.
        for k in self.k.values() if isinstance(self.k, dict) else (self.k,):
            AdaNorm(1, C=self.C, k=k)
        DetachNorm(1, detach_mean=self.detach_mean, detach_variance=self.detach_variance)
        if self.eps is not None:
            NoNorm(1, eps=self.eps)
        if self.centered is not None:
            NoNorm(1, centered=self.centered)
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
        if self.norm == "adanorm":
            if isinstance(self.k, dict) and name not in self.k:
                names = ", ".join(map(repr, sorted(self.k)[:3])) + (", ..." if len(self.k) > 3 else "")
                raise ValueError(f"k has no value for the norm {name!r}; it has {len(self.k)}: {names or 'none'}")
            settings = {"C": float(self.C), "k": float(self.k[name] if isinstance(self.k, dict) else self.k)}
        elif self.norm == "detachnorm":
            settings = {"detach_mean": self.detach_mean, "detach_variance": self.detach_variance}
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
    plan = Plan(model=model, options=options, rows=_choose(model, options))
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


def _choose(model: nn.Module, options: Options) -> list[NormRow]:
    """Every norm of the model with the reason why it is left alone, or none if it is chosen."""
    rows = [
        NormRow(name=name, module=module, info=info, kind=_kind(module, info))
        for name, module, info in iter_norms(model)
    ]
    kinds = ("layernorm", "rmsnorm") if options.targets == "all" else (options.targets,)
    in_reach = [row for row in rows if row.kind in kinds]
    names = [row.name for row in in_reach]
    try:
        included = match_names("include", options.include, names)
        excluded = match_names("exclude", options.exclude, names)
    except ValueError as error:
        raise ValueError(f"{error}{_out_of_reach(options, rows, kinds)}") from None
    layers = None if options.layers is None else match_layers(model, options.layers, names)
    for row in rows:
        if row.kind == "other":
            row.reason = row.info.reason
        elif row.kind not in kinds:
            row.reason = f"a {row.kind}, and targets={options.targets!r}"
        elif row.name in excluded:
            row.reason = "exclude"
        elif options.include is not None and row.name not in included:
            row.reason = "not in include"
        elif layers is not None and row.name not in layers:
            row.reason = "not in layers"
        elif not row.name:
            row.reason = "it is the norm itself, and a swap happens inside a model: make the new norm directly"
        elif (inside := getattr(row.info, "inside", "")) and row.name not in included:
            row.reason = f"part of the conditioned norm {inside}; name it in include to swap it"
        else:
            row.chosen = True
    return rows


def _out_of_reach(options: Options, rows: list[NormRow], kinds: Sequence[str]) -> str:
    """A hint for a pattern that only matches norms which `targets` leaves out, or which cannot be swapped."""
    for option, patterns in (("include", options.include), ("exclude", options.exclude)):
        for pattern in [patterns] if isinstance(patterns, str) else patterns or ():
            for row in rows:
                if row.kind in kinds:
                    continue
                try:
                    match_names(option, pattern if isinstance(patterns, str) else [pattern], [row.name])
                except ValueError:
                    continue
                why = row.info.reason if row.kind == "other" else f"a {row.kind}, and targets={options.targets!r}"
                return f" ({row.name} is {why})"
    return ""


def _kind(module: nn.Module, info: NormInfo) -> str:
    """The kind of the norm, for a swapped one that of the norm which it replaced."""
    source = module.__dict__.get("_source") if is_swapped(module) else None
    if source is not None and (found := recognize(source)) is not None and found.kind != "other":
        return found.kind
    return info.kind


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


# ------------------------------------------------------------------------------------------------ apply and undo


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
        fill_fade(new, module, info)
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
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    device = getattr(hook, "execution_device", None)
    same = getattr(hook, "io_same_device", False)
    if device is not None:
        new.to_empty(device=device) if new.weight.is_meta else new.to(device)
        new.weight.fill_(1.0)  # type: ignore[operator]
    add_hook_to_module(new, AlignDevicesHook(execution_device=device, io_same_device=same))


def _restored(module: SwappedNorm) -> nn.Module:
    """The module that `module` replaced, on its device and in its dtype."""
    source = module.__dict__["_source"]
    if source is None:  # a norm that the user put there by hand
        source = nn.LayerNorm(module.normalized_shape, eps=module.eps)
    weight = module.weight
    if not module.__dict__["_source_has_values"]:
        if any(p.is_meta for p in source.parameters()) and not weight.is_meta:
            source = source.to_empty(device=weight.device)
        reset_affine(source)
        take_back_fading(module, source)
    if not hasattr(source, "_hf_hook"):  # accelerate's hook brings offloaded tensors in by itself
        source.to(device=weight.device, dtype=weight.dtype)
    source.train(module.training)
    return source  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------------------- warnings


def _warn_of_untouched_rmsnorms(plan: Plan) -> None:
    """A language model of RMSNorms whose vision tower or indexer has a few LayerNorms stays as good as unpatched."""
    if plan.options.targets != "layernorm" or plan.options.include is not None:
        return
    left = [row for row in plan.rows if row.kind == "rmsnorm"]
    if len(left) > len(plan.swaps):
        parts = ", ".join(sorted({row.name.split(".")[0] for row in plan.rows if row.chosen})[:4])
        warnings.warn(
            f"{len(plan.swaps)} LayerNorms were swapped (in {parts}), while {len(left)} RMSNorms, most of this "
            'model\'s norms, were left as they are: targets="all" or "rmsnorm" swaps those as well',
            stacklevel=3,
        )
