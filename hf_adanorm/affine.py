"""What becomes of trained gains and biases in a patch: dropped with a warning, or folded.

`swapping.py` makes the plan and carries it out; the functions here change the groups of its swaps and
take out of it what a fold leaves alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ._tables import counted
from .folding import FoldReport, OnUnfoldable, comes_in, fold_norms
from .modeling_adanorm import is_swapped, source_settings
from .norms import computes_n
from .replaced import learned_affine
from .spec import NormGroup
from .swapping import Change, Plan, is_as


def _refuse_other_functions(plan: Plan, affine: str) -> None:
    """A fold begins with the very function of the source, which another eps or centering is not."""
    options = plan.options
    for name, module, info, _ in plan.swaps:
        if is_swapped(module):
            if learned_affine(module):
                raise ValueError(
                    f"affine={affine!r} does not go with {name}, a {module.norm_name} with a gain and bias: "
                    "unpatch_model(model) gives them to the norm that it replaced, and that one can be patched"
                )
            continue
        if options.eps is not None and options.eps != info.eps:
            raise ValueError(
                f"eps={options.eps:g} does not go with affine={affine!r}, which starts from the function that the "
                f"model computes: {name} has eps={info.eps:g}"
            )
        if options.centered is not None and options.centered != (info.kind == "layernorm"):
            raise ValueError(
                f"centered={options.centered} does not go with affine={affine!r}, which starts from the function that "
                f"the model computes: {name} is a {info.kind}"
            )


def _start(group: NormGroup) -> NormGroup:
    """The group of a norm that starts as plain N(x)."""
    return replace(group, settings={**group.settings, "C": 1.0, "k": 0.0}) if comes_in(group) else group


def _is_plain(module: Any) -> bool:
    settings = module.settings()
    return bool(module.norm_name == "layernorm-simple" or (settings.get("k") == 0.0 and settings.get("C") == 1.0))


def fold(
    plan: Plan, change: Change, on_unfoldable: OnUnfoldable, on_tied: str, inputs: Mapping[str, Any] | None
) -> None:
    """Fold the gains and biases of the norms in the plan, and take out of it those that stay as they are."""
    _refuse_other_functions(plan, "fold")
    if plan.options.eps is not None:  # the source's own: what a fold makes of it stands on the module
        plan.swaps = [(*swap[:3], _without_given_eps(swap[1], swap[3])) for swap in plan.swaps]
    calibrate = on_unfoldable == "calibrate"
    # What was swapped before has no gain and bias any more; a fit makes up for what else it becomes.
    groups = {
        name: group
        for name, module, _, group in plan.swaps
        if not is_swapped(module) or (calibrate and computes_n(type(module.inner)) and not is_as(module, group))
    }
    report = FoldReport(())
    if groups:
        report = fold_norms(
            change,
            list(groups),
            fold_inputs=inputs,
            on_unfoldable=on_unfoldable,
            on_tied=on_tied,
            groups=groups,
        )
    kept = set(report.names("kept"))
    if len(kept) == len(plan.swaps):
        why = report.norms[0]
        others = [f'on_unfoldable="{way}"' for way in ("approximate", "calibrate") if way != on_unfoldable]
        raise ValueError(
            f"none of the {len(kept)} norms can be folded ({why.name}: {why.reason}); nothing was changed. "
            + (
                f"{' or '.join(others)} may do"
                if any(not is_swapped(module) for _, module, *_ in plan.swaps)
                else 'They are swapped already: affine="drop" changes their settings alone'
            )
        )
    swaps = []
    for name, module, info, group in plan.swaps:
        if name in kept:
            continue
        if not calibrate and (not is_swapped(module) or _is_plain(module)):
            group = _start(group)
        swaps.append((name, module, info, group))
    plan.swaps = swaps
    if kept:
        first = next(norm for norm in report.norms if norm.name in kept)
        change.warn(
            f"{len(kept)} of {len(report.norms)} norms cannot be folded and stay as they are ({first.name}: "
            f"{first.reason}, ...): fold_affine(model) lists each; on_unfoldable says what else can be done"
        )
    approximated = [norm for norm in report.norms if norm.deviation]
    if on_unfoldable == "approximate" and approximated:
        worst = max(approximated, key=lambda norm: norm.deviation or 0.0)
        change.warn(
            f"{counted(len(approximated), 'norm')} folded but for the deviation of their gain from its mean, up to "
            f"{worst.deviation:.2f} of it (at {worst.name}): the outputs moved by {report.difference:.1%} of their "
            "largest value. fold_affine(model) reports each norm"
        )
    lost = sorted(norm.lost for norm in report.norms if norm.lost is not None)
    if lost and lost[len(lost) // 2] > 0.8:
        change.warn(
            f"at these settings half of the norms lose {lost[len(lost) // 2]:.0%} or more of what they passed on: "
            "choose a smaller k, calibrate_k(model, batches).k gives one for each norm"
        )


def _without_given_eps(module: nn.Module, group: NormGroup) -> NormGroup:
    readable = not is_swapped(module) and source_settings(module).get("eps") == group.eps
    return replace(group, eps=None) if readable else group


def warn_of_dropped(plan: Plan, change: Change) -> None:
    """One warning for what trained gains and biases the plan drops."""
    trained = 0
    for _, module, info, _ in plan.swaps:
        if hasattr(plan.options.cls, "from_norm"):
            continue
        if is_swapped(module):
            held = learned_affine(module).items()
            trained += any(not t.is_meta and _differs(t, float(key == "gain")) for key, t in held)
            continue
        for name, parameter in module.named_parameters(recurse=False):
            neutral = 0.0 if name == info.bias_name else 1.0 - info.gain_offset
            if not parameter.is_meta and parameter.numel() and _differs(parameter, neutral):
                trained += 1
                break
    if trained:
        change.warn(
            f"the trained gains and biases of {counted(trained, 'norm')} are dropped: the model's outputs change "
            'until it is trained again. affine="fold" keeps what it learned, for a post-norm model (BERT, BART) with '
            'on_unfoldable="calibrate" and k=calibrate_k(model, batches).k'
        )


def _differs(parameter: Tensor, value: float) -> bool:
    return bool((parameter.detach() != value).any())
