"""Drop the trained gains and biases of a patch with a warning, or fold them.

These functions run between making the plan of a patch and applying it (`swapping.py`). A fold removes the norms that
it keeps from the plan, and lets the others start as plain N(x).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from ._tables import counted
from .folding import Fold, FoldReport, fold_norms, is_plain
from .holder import held
from .modeling_adanorm import NORM_CLASSES, is_swapped, make_norm, source_settings
from .norms import computes_n
from .replaced import learned_affine
from .spec import NormGroup
from .swapping import Change, Options, Plan, is_as


def fold(plan: Plan, change: Change, options: Fold) -> FoldReport:
    """Fold the gains and biases of the norms in the plan, and remove those that cannot be folded from it."""
    _refuse_other_functions(plan)
    # An eps that the call gives is the module's own, which a fold may change there.
    plan.swaps = [
        (name, module, info, replace(group, eps=None) if source_settings(module).get("eps") == group.eps else group)
        for name, module, info, group in plan.swaps
    ]
    calibrate = options.unfoldable == "calibrate"
    if not calibrate:
        _refuse_untrue_class(plan)
    # A norm that was swapped earlier has no gain and bias. A fit makes up for another function that it becomes.
    names = [
        name
        for name, module, _, group in plan.swaps
        if not is_swapped(module) or (calibrate and computes_n(type(module.inner)) and not is_as(module, group))
    ]
    report = fold_norms(change, names, options, replace(plan.options, eps=None)) if names else FoldReport(())
    kept = [norm for norm in report.norms if norm.action == "kept"]
    summary = f"norms cannot be folded ({kept[0].name}: {kept[0].reason}, ...)" if kept else ""
    if kept and len(kept) == len(plan.swaps):
        raise ValueError(f"all {len(kept)} {summary}: another Fold(unfoldable=...) or affine='drop' may help")
    if kept:
        change.warn(
            f"{len(kept)} of {len(report.norms)} {summary} and stay as they are. fold_affine(model) lists all; "
            "Fold(unfoldable=...) offers other ways"
        )
    stay = {norm.name for norm in kept}
    plan.swaps = [swap for swap in plan.swaps if swap[0] not in stay]
    if not calibrate:
        plan.swaps = [(*swap[:3], _start(swap[1], swap[3], plan.options)) for swap in plan.swaps]
        _warn_of_start(plan, change)
    _warn_of_losses(report, change, options)
    return report


def _warn_of_losses(report: FoldReport, change: Change, options: Fold) -> None:
    """Warn about what an approximate or fitted fold drops."""
    approximated = [norm for norm in report.norms if norm.deviation]
    if approximated and options.unfoldable == "approximate":
        worst = max(approximated, key=lambda norm: norm.deviation or 0.0)
        change.warn(
            f"{counted(len(approximated), 'norm')} folded without the deviation of their gain from its mean, up to "
            f"{worst.deviation:.2f} of it (at {worst.name}). The outputs moved by {report.difference:.1%}"
        )
    lost = sorted(norm.lost for norm in report.norms if norm.lost is not None)
    if lost and (median := lost[len(lost) // 2]) > 0.8:
        change.warn(
            f"at these settings half of the norms lose {median:.0%} or more of what they passed on: choose a smaller "
            "k; calibrate_k(model, batches).k proposes one for each norm"
        )


def _refuse_other_functions(plan: Plan) -> None:
    """Raise ValueError for another eps or centering than the norm's own: a fold starts from what the norm computes."""
    for name, module, info, _ in plan.swaps:
        if is_swapped(module) and learned_affine(module):
            raise ValueError(
                f"affine='fold' does not go with {name}, a {module.norm_name} with a gain and bias: "
                "unpatch_model(model) gives them to the norm that it replaced, and that one can be patched"
            )
        for key, own in (("eps", info.eps), ("centered", info.kind == "layernorm")):
            if (given := getattr(plan.options, key)) not in (None, own):
                raise ValueError(
                    f"{key}={given} does not go with affine='fold', which starts from the function that the model "
                    f"computes: {name} has {key}={own}"
                )


def _refuse_untrue_class(plan: Plan) -> None:
    """Raise ValueError if a user's class is not the N(x) of the replaced norm at its `plain_settings`."""
    cls = plan.options.cls
    for name, module, info, group in {swap[2].kind: swap for swap in plan.swaps}.values():
        if group.norm in NORM_CLASSES or is_swapped(module):
            continue
        stock = (nn.LayerNorm if info.kind == "layernorm" else nn.RMSNorm)(info.normalized_shape, eps=info.eps)
        start = replace(_start(module, group, plan.options), channels_first=None)
        x = torch.arange(4.0 * stock.weight.numel()).sin().mul(3).add(1).view(4, *info.normalized_shape)
        with torch.no_grad():
            new = make_norm(stock, vars(start), held({group.norm: cls}))(x)
        if not torch.allclose(new, stock(x), rtol=1e-3, atol=1e-3):
            raise ValueError(
                f"affine='fold' does not go with {cls.__name__}: at {start.settings} it is not the {info.kind} of "
                f"{name} without gain and bias, as its plain_settings say. Correct them, or use affine='drop'"
            )


def _start(module: nn.Module, group: NormGroup, options: Options) -> NormGroup:
    """Return the group with the settings at which the norm is N(x), unless the module computes something else now."""
    if is_swapped(module) and not is_plain(type(module.inner), module.settings()):
        return group
    return replace(group, settings={**group.settings, **_plain_settings(options)})


def _plain_settings(options: Options) -> Mapping[str, Any]:
    """Return the settings at which the new norm is N(x). A fold takes only classes that declare them."""
    cls: Any = options.cls
    return cast(Mapping[str, Any], cls.plain_settings)


def _warn_of_start(plan: Plan, change: Change) -> None:
    """Warn if a fold starts with other settings than those of the call."""
    given, plain = plan.options.settings, _plain_settings(plan.options)
    other = {k: v for k, v in given.items() if not isinstance(v, Mapping) and plain.get(k, v) != v}
    if other:
        wanted = ", ".join(f"{key}={value}" for key, value in other.items())
        starts = ", ".join(f"{key}={plain[key]}" for key in other)
        change.warn(
            f"the norms start with {starts} instead of {wanted}, which keeps the model's outputs. Call "
            f'set_norm(model, {wanted}) later, or fit to it with affine=Fold(unfoldable="calibrate", inputs=batch)'
        )


def warn_of_dropped(plan: Plan, change: Change) -> None:
    """Warn once about the trained gains and biases that the plan drops."""
    if hasattr(plan.options.cls, "from_norm"):
        return
    trained = 0
    for _, module, info, _ in plan.swaps:
        if is_swapped(module) and type(module.inner) is plan.options.cls:
            continue  # the new norm takes them over
        if is_swapped(module):
            values = [(t, float(key == "gain")) for key, t in learned_affine(module).items()]
        else:
            own = module.named_parameters(recurse=False)
            values = [(t, 0.0 if key == info.bias_name else 1.0 - info.gain_offset) for key, t in own]
        trained += any(not t.is_meta and bool((t.detach() != neutral).any()) for t, neutral in values)
    if trained:
        change.warn(
            f"the trained gains and biases of {counted(trained, 'norm')} are dropped. The model's outputs change "
            'until it is trained again. affine="fold" keeps what it learned. For a post-norm model (BERT, BART), use '
            'affine=Fold(unfoldable="calibrate", inputs=batch) and k=calibrate_k(model, batches).k'
        )
