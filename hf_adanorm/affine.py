"""What becomes of trained gains and biases in a patch: dropped with a warning, folded, or kept to fade out.

`swapping.py` makes the plan and carries it out; the functions here change the groups of its swaps (`fade=...`) and
take out of it what a fold leaves alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ._tables import counted
from .detection import NormInfo
from .folding import FoldReport, OnUnfoldable, comes_in, fold_norms
from .modeling_adanorm import NormGroup, SwappedNorm, is_as, is_swapped, source_settings
from .swapping import Change, Plan


def fade(plan: Plan) -> None:
    """Keep the gains and biases of the norms in the plan as constants that fade out."""
    _refuse_other_functions(plan, "fade")
    plan.swaps = [(*swap[:3], _fading_group(*swap[1:])) for swap in plan.swaps]
    if all(group.fade is None for *_, group in plan.swaps):
        raise ValueError(
            f"there is nothing to fade: the {len(plan.swaps)} norms chosen are swapped already, and hold no gain "
            "and bias. unpatch_model(model) first, or start from the model as it was before it was patched"
        )


def _refuse_other_functions(plan: Plan, affine: str) -> None:
    """A fold and a fade begin with the very function of the source, which another eps or centering is not."""
    options = plan.options
    for name, module, info, _ in plan.swaps:
        if is_swapped(module):
            if module.keeps_affine:
                raise ValueError(
                    f"affine={affine!r} does not go with {name}, a {module.title} with a gain and a bias of its own: "
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


def _ramping(module: SwappedNorm, group: NormGroup, *, ramp: bool = True) -> NormGroup:
    """The group of a norm that was swapped before: with the state of its fade, and with k and C to come in where it
    computes plain N(x) so far. Without a ramp only gains and biases go on fading."""
    if module.fade or (ramp and module.fade is not None):
        return replace(group, fade=module.fade)
    ramp = ramp and _is_plain(module) and module.reference == "paper"  # to which alone a ramp leads
    return replace(group, fade=()) if ramp and comes_in(group) else group


def _is_plain(module: SwappedNorm) -> bool:
    return type(module).is_plain(module.settings())


def _fading_group(module: nn.Module, info: NormInfo, group: NormGroup) -> NormGroup:
    """The group with gain and bias fading; a norm that was swapped before keeps the state it has."""
    if is_swapped(module):
        return _ramping(module, group)
    if hasattr(module, "_hf_hook") and any(p.is_meta for p in module.parameters()):
        raise ValueError(
            f'affine="fade" needs the gains and biases in memory; those of a {type(module).__name__} are offloaded: '
            "load the model without offloading, patch it and save it"
        )
    present = (("gain", info.has_gain), ("bias", info.has_bias))
    return replace(group, fade=tuple(key for key, there in present if there))


def fold(
    plan: Plan, change: Change, on_unfoldable: OnUnfoldable, on_tied: str, inputs: Mapping[str, Any] | None, ramp: bool
) -> None:
    """Fold the gains and biases of the norms in the plan, and take out of it those that stay as they are."""
    _refuse_other_functions(plan, "fold")
    if plan.options.eps is not None:  # the source's own: what a fold makes of it stands on the module
        plan.swaps = [(*swap[:3], _without_given_eps(swap[1], swap[3])) for swap in plan.swaps]
    calibrate = on_unfoldable == "calibrate"
    at_once = calibrate or not ramp
    # What was swapped before has no gain and bias any more; a fit makes up for what else it becomes.
    groups = {
        name: group
        for name, module, _, group in plan.swaps
        if not is_swapped(module) or (calibrate and module.normalizes and not module.fade and not is_as(module, group))
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
    if len(kept) == len(plan.swaps) and on_unfoldable != "fade":
        why = report.norms[0]
        others = [f'on_unfoldable="{way}"' for way in ("approximate", "calibrate", "fade") if way != on_unfoldable]
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
            if on_unfoldable != "fade":
                continue
            group = _fading_group(module, info, group)
        elif is_swapped(module):
            group = _ramping(module, group, ramp=not at_once)
        elif not at_once and comes_in(group):
            group = replace(group, fade=())
        swaps.append((name, module, info, group))
    plan.swaps = swaps
    if kept and on_unfoldable != "fade":
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
    jumps = any(comes_in(group) and group.fade is None and _can_jump(module) for _, module, _, group in swaps)
    if not calibrate and jumps:
        what = "ramp=False" if not ramp else 'a norm with reference="lancopku"'
        change.warn(
            f"{what} sets k and C at once: the outputs of a pretrained model change a lot until it is trained again"
        )


def _without_given_eps(module: nn.Module, group: NormGroup) -> NormGroup:
    readable = not is_swapped(module) and source_settings(module).get("eps") == group.eps
    return replace(group, eps=None) if readable else group


def _can_jump(module: nn.Module) -> bool:
    """Whether it computes plain N(x) so far, or is on its way from it."""
    return not is_swapped(module) or module.fade is not None or _is_plain(module)


def warn_of_dropped(plan: Plan, change: Change) -> None:
    """One warning for what trained gains and biases the plan drops, one for fades that it cuts short."""
    trained = 0
    for _, module, info, group in plan.swaps:
        if group.kind.keeps_affine:
            continue
        if is_swapped(module):
            held = module.affine().items() if module.keeps_affine else ()
            trained += any(not t.is_meta and _differs(t, float(key == "gain")) for key, t in held)
            continue
        for name, parameter in module.named_parameters(recurse=False):
            neutral = 0.0 if name == info.bias_name else 1.0 - info.gain_offset
            if not parameter.is_meta and parameter.numel() and _differs(parameter, neutral):
                trained += 1
                break
    fading = [module for _, module, _, group in plan.swaps if is_swapped(module) and module.fade and not group.fade]
    progress = [module.get_buffer("fade_progress") for module in fading]
    if any(not t.is_meta and float(t) < 1.0 for t in progress):
        change.warn(
            f"the fade of {counted(len(fading), 'norm')} ends here, before its time: their gains and biases are "
            'dropped. affine="fade" keeps them fading'
        )
    if trained:
        change.warn(
            f"the trained gains and biases of {counted(trained, 'norm')} are dropped: the model's outputs change "
            'until it is trained again. affine="fold" keeps what it learned, for a post-norm model (BERT, BART) with '
            'on_unfoldable="calibrate" and k=calibrate_k(model, batches).k'
        )


def _differs(parameter: Tensor, value: float) -> bool:
    return bool((parameter.detach() != value).any())
