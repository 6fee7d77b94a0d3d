"""Fold a norm's trained gain and bias into the linear layers that read it.

    W (g * y + b) + c  =  (W diag(g)) y + (W b + c)

so a LayerNorm that only linear layers of its own read can become LayerNorm-simple (or AdaNorm with k = 0, C = 1) and
the model's output does not change. A fold takes three steps of one forward pass each:

1. Watch who reads which norm (`watch.py`), and plan what folds into which layer (`plan.py`).
2. Only for `"calibrate"`: fit gains and biases to the source's activations (`fit.py`).
3. Write them into the weights (`write.py`) and run the model again. A difference above the tolerance undoes the fold.

After a fold the norms have gain 1 and bias 0, so another fold changes nothing. A module that got a bias or another
eps is marked, so that the saved spec records it.

Post-norm layers add the norm's output h = g * y + b to a branch that ends in a linear layer (W, c). The next norm
reads the sum, and a common scale has no effect on its output. `"approximate"` then keeps the mean s of g:

    h + W a + c  ~  s * (y + (W / s) a + (c + b) / s),        next norm's eps / s^2

This is exact when g is constant. Otherwise it drops the deviation of g from its mean on that path. `"calibrate"` takes
s, and the gains and biases of the readers, from a least-squares fit, one norm after the other, with all earlier norms
replaced. So errors do not add up, and outlier channels (which hardly vary between tokens) go into the bias. For
AdaNorm the fit compensates for the effect of k on the scale. Up to the first norm without an exact fold, norms are
folded exactly. Where a bias would not arrive (on a masked path, say), only gains are fitted.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from hf_adanorm._tables import Printed, Row, listed
from hf_adanorm.detection import iter_norms
from hf_adanorm.holder import held
from hf_adanorm.modeling_adanorm import LayerNormSimple, is_swapped, make_norm
from hf_adanorm.report import NOT_FOLDED
from hf_adanorm.running import evaluating, hooked
from hf_adanorm.saving import configs_of, mark_folded, resolved_spec, write_specs
from hf_adanorm.spec import NormGroup
from hf_adanorm.swapping import Change, Options, all_or_nothing, apply_plan, make_plan, refuse_wrapped

from .fit import fit
from .heads import settle_heads, untie_heads
from .options import Fold
from .plan import TOLERANCES, FoldedNorm, FoldPlan, is_plain
from .watch import is_side_output, sample, watch
from .write import write

_HEADER = ("norm", "action", "consumers, or why not")


@dataclass(frozen=True, repr=False)
class FoldReport(Printed):
    """The result of a fold; prints as a table."""

    norms: tuple[FoldedNorm, ...]
    """What became of each norm, in the order of the model."""
    difference: float = 0.0
    """Largest difference of a task output before and after, relative to that output's largest value."""
    changed: dict[str, float] = field(default_factory=dict)
    """By-products of the model (hidden states) that changed, and by how much. Their norm has no gain and bias now."""
    added_biases: tuple[str, ...] = ()
    """Linear layers that got a bias."""
    protect: tuple[str, ...] = ()
    """Norms whose fold added a bias or adjusted an eps."""
    untied: dict[str, int] = field(default_factory=dict)
    """Heads that got a weight of their own, and the number of parameters that this adds."""
    is_stock: bool = False
    """Whether the model is a plain stock model, which any engine loads without this package. An untied head that the
    config cannot record makes it False: only transformers finds it in the checkpoint."""

    def names(self, *actions: str) -> list[str]:
        """Return the names of the norms with one of these actions."""
        return [norm.name for norm in self.norms if norm.action in actions]

    def _parts(self) -> tuple[str, Row, list[Row], list[str]]:
        rows: list[Row] = []
        for norm in self.norms:
            detail = norm.reason or ", ".join(norm.consumers)
            if norm.deviation is not None:
                detail += f" (deviation of the gain {norm.deviation:.3f})"
            if norm.lost is not None:
                detail += f" ({norm.lost:.1%} of the output not reproduced)"
            rows.append((norm.name, norm.action, detail))
        counts = {action: len(self.names(action)) for action in ("folded", "approximated", "kept", "nothing to fold")}
        text = ", ".join(f"{count} {action}" for action, count in counts.items() if count) or "no norms"
        text += f"; largest relative difference of the outputs {self.difference:.1e}"
        if self.changed:
            text += "; changed: " + listed([f"{path} ({value:.1e})" for path, value in self.changed.items()], 4)
        if self.added_biases:
            text += f"; {len(self.added_biases)} bias{'es' if len(self.added_biases) > 1 else ''} added"
        for name, count in self.untied.items():
            text += f"; {name} untied ({count:,} parameters more)"
        if self.is_stock:
            text += "; a plain stock model: it loads without hf_adanorm"
        return text, _HEADER, rows, []


def fold_affine(
    model: nn.Module,
    *,
    tied: Literal["keep", "untie"] = "keep",
    unfoldable: Literal["keep", "approximate", "calibrate", "raise"] = "keep",
    inputs: Mapping[str, Any] | None = None,
    tolerance: float | None = None,
) -> FoldReport:
    """Fold gain and bias of every LayerNorm and RMSNorm into the linear layers that read it, in place.

    The norms keep their class with gain 1 and bias 0; task outputs stay the same. If a layer gets a bias that it
    lacked, or an eps changes, the norm becomes layernorm-simple (the same function). The saved model then cannot be
    loaded without this package as if it were the stock one. `patch_model(model, ..., affine="fold")` also swaps.

    If no layer gets a bias and no eps changes, the result is a stock model with gains 1 and biases 0 (`is_stock` of
    the report), which any engine for this architecture loads. The config lists the folded norms (`folded_norms`).

    The model runs twice, or three times with `"calibrate"`, always in evaluation mode.

    Args:
        model: with its weights in memory; not wrapped by DDP, FSDP or torch.compile.
        tied: see `Fold`, as for all options.
        unfoldable: what to do with norms that have other readers.
        inputs: keyword arguments of one forward pass.
        tolerance: largest change of a task output, relative to its largest value.

    Returns:
        The action for each norm, and the measured difference.

    Raises:
        TypeError, ValueError: a bad argument; inputs that the model does not accept; a norm that cannot be folded with
            `unfoldable="raise"`.
        RuntimeError: the outputs moved by more than the tolerance. After any error, the model is unchanged, its
            weights to within rounding.
    """
    options = Fold(tied=tied, unfoldable=unfoldable, inputs=inputs, tolerance=tolerance)
    refuse_wrapped(model)
    with all_or_nothing(model) as change:
        report = fold_norms(change, None, options)
        if configs_of(model):
            if report.protect:
                exactly = "re:" + "|".join(re.escape(name) for name in report.protect)
                apply_plan(make_plan(model, Options(cls=LayerNormSimple, include=exactly, targets="all")))
            write_specs(model)
            still_tied = report.untied and any(getattr(c, "tie_word_embeddings", False) for c in configs_of(model))
            is_stock = not report.protect and not still_tied and resolved_spec(model) is None
            mark_folded(model, report.names("folded", "approximated"))
            report = replace(report, is_stock=is_stock)
    return report


def fold_norms(
    change: Change, names: Collection[str] | None, options: Fold, become: Options | None = None
) -> FoldReport:
    """Fold like `fold_affine`, as a part of a larger change, without a change of the config.

    Args:
        change: the change in progress; its model is folded.
        names: the norms to fold; None for all.
        options: see `Fold`.
        become: the norm that replaces them, to which `"calibrate"` fits; by default layernorm-simple.
    """
    model, become = change.model, become or Options(cls=LayerNormSimple)
    parameters = list(model.parameters())
    if any(p.is_meta or hasattr(p, "device_mesh") or (hasattr(p, "ds_id") and not p.numel()) for p in parameters):
        raise ValueError(
            "folding needs whole weights, and these are sharded or on the meta device: load the model, fold and save "
            "it, and only then shard it"
        )
    infos = {name: info for name, _, info in iter_norms(model) if info.kind != "other"}
    names = list(infos) if names is None else names
    calibrate = options.unfoldable == "calibrate"
    groups = {n: become.group(n, model.get_submodule(n), infos[n]) for n in names} if calibrate else {}
    heads = untie_heads(model) if options.tied == "untie" else {}
    with tempfile.TemporaryDirectory(prefix="hf_adanorm-") as folder:
        watched = watch(model, infos, options.inputs, Path(folder) if calibrate else None)
        moving = [name for name, group in groups.items() if _moves(model.get_submodule(name), group, become.cls)]
        plan = FoldPlan(model, infos, watched, names, options, moving)
        untied = settle_heads(model, heads, {reader for step in plan.steps.values() for reader in step.readers})
        kept = [norm for norm in plan.norms if norm.action == "kept"]
        if kept and options.unfoldable == "raise":
            reasons = [f"{norm.name}: {norm.reason}" for norm in kept]
            raise ValueError(f"{len(kept)} of {len(plan.norms)} norms cannot be folded: {listed(reasons)}")
        for norm in plan.norms:  # for `inspect_model`
            vars(plan.modules[norm.name]).pop(NOT_FOLDED, None)
            if norm.action == "kept":
                vars(plan.modules[norm.name])[NOT_FOLDED] = norm.reason
        if not plan.steps:
            return FoldReport(tuple(plan.norms))
        if not any(bool(t.isfinite().any()) for t in watched.outputs.values() if t.is_floating_point()):
            raise ValueError(
                "the model's outputs on these inputs hold no finite number, so a fold cannot be checked: pass a real "
                "batch as inputs, and look for NaN in the weights"
            )

        def replaced(name: str, x: Tensor) -> Tensor:
            """Return what the norm that replaces `name` computes, with the eps that `name` has now."""
            classes = held({groups[name].norm: become.cls})
            return cast(Tensor, make_norm(plan.modules[name], vars(groups[name]), classes)(x))

        if plan.fitted:
            fit(plan, replaced)
    added = write(plan, change)
    difference, side = _check(plan, options, plan.steps if calibrate else (), replaced)
    protect = [n for n, s in plan.steps.items() if s.branches or (s.bias.any() and s.readers.keys() & set(added))]
    return FoldReport(plan.result(), difference, side, tuple(added), tuple(protect), untied)


def _moves(module: nn.Module, group: NormGroup, cls: type[nn.Module]) -> bool:
    """Return whether `module` becomes another function, apart from gain and bias."""
    was_plain = not is_swapped(module) or is_plain(type(module.inner), module.settings())
    return not (was_plain and is_plain(cls, group.settings))


def _check(
    plan: FoldPlan, options: Fold, names: Collection[str], replaced: Callable[[str, Tensor], Tensor]
) -> tuple[float, dict[str, float]]:
    """Run the folded model with the norms `names` replaced, and compare the outputs.

    Return the largest relative difference of a task output, and those of the by-products. Raise RuntimeError above the
    tolerance.
    """
    watched = plan.watched
    hooks = (
        plan.modules[name].register_forward_hook(lambda module, args, out, name=name: replaced(name, args[0]))
        for name in names
    )
    with evaluating(plan.model), hooked(hooks):
        after = sample(plan.model(**watched.inputs.values))
    moved = {path: _difference(old, after[path]) for path, old in watched.outputs.items()}
    side = {path: value for path, value in moved.items() if is_side_output(path)}
    side = side if len(side) < len(moved) else {}
    tasks = [value for path, value in moved.items() if path not in side]
    difference = float(torch.tensor(tasks, dtype=torch.float64).max())  # NaN if one of them is
    coarsest = max(TOLERANCES.get(dtype, 1e-4) for dtype in watched.dtypes)
    limit = options.tolerance if options.tolerance is not None else coarsest
    must_hold = plan.is_exact or options.tolerance is not None or math.isnan(difference)
    if must_hold and not difference <= limit:
        raise RuntimeError(
            f"folding moved the outputs by {difference:.2e} of their largest value, above the tolerance {limit:.0e}; "
            f"the model is unchanged. Pass a real batch as inputs, or a larger tolerance if that is rounding"
        )
    return difference, {path: value for path, value in side.items() if value > limit}


def _difference(old: Tensor, new: Tensor) -> float:
    """Return the largest difference, relative to the largest value; 0 for integers and empty tensors."""
    if not old.is_floating_point() or old.numel() == 0:
        return 0.0
    finite = old.isfinite()  # a fully masked row is NaN before and after
    old, new = (torch.where(finite, tensor, 0.0).double() for tensor in (old, new))
    return float((new - old).abs().max() / old.abs().max().clamp_min(1e-30))
