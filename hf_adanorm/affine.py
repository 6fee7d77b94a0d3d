"""What becomes of trained gains and biases in a patch: dropped with a warning, or folded.

`swapping.py` makes the plan of a patch and carries it out. The functions here run in between. A fold takes those norms
out of the plan that stay as they are, and lets the others start as plain N(x).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from ._tables import counted
from .folding import Fold, FoldReport, fold_norms, is_plain
from .modeling_adanorm import is_swapped, source_settings
from .norms import computes_n
from .replaced import learned_affine
from .spec import NormGroup
from .swapping import Change, Options, Plan, is_as


def fold(plan: Plan, change: Change, options: Fold) -> FoldReport:
    """Fold the gains and biases of the norms in the plan, and take those out of it that cannot be folded."""
    _refuse_other_functions(plan)
    if plan.options.eps is not None:  # equal to the source's own, which a fold may change on the module
        plan.swaps = [(*swap[:3], _without_given_eps(swap[1], swap[3])) for swap in plan.swaps]
    calibrate = options.unfoldable == "calibrate"
    # Norms that were swapped before have no gain and bias any more; a fit makes up for what else they become.
    names = [
        name
        for name, module, _, group in plan.swaps
        if not is_swapped(module) or (calibrate and computes_n(type(module.inner)) and not is_as(module, group))
    ]
    report = fold_norms(change, names, options, plan.options) if names else FoldReport(())
    kept = [norm for norm in report.norms if norm.action == "kept"]
    if kept and len(kept) == len(plan.swaps):
        _raise_nothing_folds(report, plan, options)
    stay = {norm.name for norm in kept}
    plan.swaps = [swap for swap in plan.swaps if swap[0] not in stay]
    if not calibrate:
        plan.swaps = [(*swap[:3], _start(swap[1], swap[3], plan.options)) for swap in plan.swaps]
        _warn_of_start(plan, change)
    if kept:
        change.warn(
            f"{len(kept)} of {len(report.norms)} norms cannot be folded and stay as they are ({kept[0].name}: "
            f"{kept[0].reason}, ...): fold_affine(model) lists each; Fold(unfoldable=...) says what else can be done"
        )
    _warn_of_losses(report, change, options)
    return report


def _raise_nothing_folds(report: FoldReport, plan: Plan, options: Fold) -> None:
    why = report.norms[0]
    others = [f'Fold(unfoldable="{way}")' for way in ("approximate", "calibrate") if way != options.unfoldable]
    raise ValueError(
        f"none of the {len(plan.swaps)} norms can be folded ({why.name}: {why.reason}); nothing was changed. "
        + (
            'They are swapped already: affine="drop" changes their settings alone'
            if all(is_swapped(module) for _, module, *_ in plan.swaps)
            else f"affine={' or affine='.join(others)} may help"
        )
    )


def _warn_of_losses(report: FoldReport, change: Change, options: Fold) -> None:
    """Warn about what an approximate or fitted fold drops."""
    approximated = [norm for norm in report.norms if norm.deviation]
    if options.unfoldable == "approximate" and approximated:
        worst = max(approximated, key=lambda norm: norm.deviation or 0.0)
        change.warn(
            f"{counted(len(approximated), 'norm')} folded without the deviation of their gain from its mean, up to "
            f"{worst.deviation:.2f} of it (at {worst.name}): the outputs moved by {report.difference:.1%} of their "
            "largest value. fold_affine(model) reports each norm"
        )
    lost = sorted(norm.lost for norm in report.norms if norm.lost is not None)
    if lost and lost[len(lost) // 2] > 0.8:
        change.warn(
            f"at these settings half of the norms lose {lost[len(lost) // 2]:.0%} or more of what they passed on: "
            "choose a smaller k; calibrate_k(model, batches).k proposes one for each norm"
        )


def _refuse_other_functions(plan: Plan) -> None:
    """Raise ValueError for another eps or centering than the source's: a fold starts from the source's function."""
    options = plan.options
    for name, module, info, _ in plan.swaps:
        if is_swapped(module):
            if learned_affine(module):
                raise ValueError(
                    f"affine='fold' does not go with {name}, a {module.norm_name} with a gain and bias: "
                    "unpatch_model(model) gives them to the norm that it replaced, and that one can be patched"
                )
            continue
        if options.eps is not None and options.eps != info.eps:
            raise ValueError(
                f"eps={options.eps:g} does not go with affine='fold', which starts from the function that the "
                f"model computes: {name} has eps={info.eps:g}"
            )
        if options.centered is not None and options.centered != (info.kind == "layernorm"):
            raise ValueError(
                f"centered={options.centered} does not go with affine='fold', which starts from the function that "
                f"the model computes: {name} is a {info.kind}"
            )


def _start(module: nn.Module, group: NormGroup, options: Options) -> NormGroup:
    """Return the group with the settings at which the norm is N(x), unless it was something else already."""
    if is_swapped(module) and not is_plain(type(module.inner), module.settings()):
        return group
    return replace(group, settings={**group.settings, **options.cls.plain_settings})  # type: ignore[attr-defined]


def _warn_of_start(plan: Plan, change: Change) -> None:
    """Warn where the settings of the call are not those that a fold starts with."""
    given = {key: value for key, value in plan.options.settings.items() if not isinstance(value, Mapping)}
    plain = plan.options.cls.plain_settings  # type: ignore[attr-defined]
    if other := {key: value for key, value in given.items() if plain.get(key, value) != value}:
        wanted = ", ".join(f"{key}={value}" for key, value in other.items())
        starts = ", ".join(f"{key}={plain[key]}" for key in other)
        change.warn(
            f"the norms start with {starts} instead of {wanted}, so that the fold keeps the model's outputs: call "
            f'set_norm(model, {wanted}) later on, or fit to {wanted} with affine=Fold(unfoldable="calibrate", '
            "inputs=batch)"
        )


def _without_given_eps(module: nn.Module, group: NormGroup) -> NormGroup:
    readable = not is_swapped(module) and source_settings(module).get("eps") == group.eps
    return replace(group, eps=None) if readable else group


def warn_of_dropped(plan: Plan, change: Change) -> None:
    """Warn once about the trained gains and biases that the plan drops."""
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
            'until it is trained again. affine="fold" keeps what it learned; for a post-norm model (BERT, BART) use '
            'affine=Fold(unfoldable="calibrate", inputs=batch) and k=calibrate_k(model, batches).k'
        )


def _differs(parameter: Tensor, value: float) -> bool:
    return bool((parameter.detach() != value).any())
