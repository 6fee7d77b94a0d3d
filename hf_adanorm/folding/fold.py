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

import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

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
    _check_model(model)
    infos = {name: info for name, _, info in iter_norms(model) if info.kind != "other"}
    names = list(infos) if names is None else names
    calibrate = options.unfoldable == "calibrate"
    groups = {n: become.group(n, model.get_submodule(n), infos[n]) for n in names} if calibrate else {}
    heads = untie_heads(model) if options.tied == "untie" else {}
    with tempfile.TemporaryDirectory(prefix="hf_adanorm-") as folder:
        watched = watch(model, infos, options.inputs, Path(folder) if calibrate else None)
        plan = FoldPlan(
            model,
            infos,
            watched,
            names,
            approximate=calibrate or options.unfoldable == "approximate",
            calibrate=calibrate,
            moving=[n for n, group in groups.items() if _moves(model.get_submodule(n), group, become.cls)],
        )
        untied = settle_heads(model, heads, {reader for step in plan.steps.values() for reader in step.readers})
        kept = [norm for norm in plan.norms if norm.action == "kept"]
        if kept and options.unfoldable == "raise":
            listed = "; ".join(f"{norm.name}: {norm.reason}" for norm in kept[:5])
            more = f" (and {len(kept) - 5} more)" if len(kept) > 5 else ""
            raise ValueError(
                f"{len(kept)} of {len(plan.norms)} norms cannot be folded: {listed}{more}. "
                f'Nothing was changed; unfoldable="keep" leaves them as they are'
            )
        if not plan.steps:
            _note_kept(model, plan.norms)
            return FoldReport(tuple(plan.norms))
        if not any(bool(t.isfinite().any()) for t in watched.outputs.values() if t.is_floating_point()):
            raise ValueError(
                "the model's outputs on these inputs hold no finite number, so a fold cannot be checked: pass a real "
                "batch as inputs, and look for NaN in the weights"
            )

        def replacement(name: str) -> Callable[[Tensor], Tensor]:
            """Return what replaces a norm, with the eps that it has at the time of the call."""
            return lambda x: make_norm(plan.modules[name], vars(groups[name]), held({groups[name].norm: become.cls}))(
                x
            )

        replacements = {name: replacement(name) for name in plan.steps} if calibrate else {}
        if plan.fitted:
            fit(plan, replacements)
    changed = plan.changed()
    added_biases = write(plan, change)
    difference, side = _check(plan, options, replacements)
    _note_kept(model, plan.result())
    return FoldReport(plan.result(), difference, side, tuple(added_biases), changed, untied)


def _note_kept(model: nn.Module, norms: Iterable[FoldedNorm]) -> None:
    """Store the reason on every norm that was not folded, for `inspect_model`."""
    for norm in norms:
        module = model.get_submodule(norm.name)
        module.__dict__.pop(NOT_FOLDED, None)
        if norm.action == "kept":
            module.__dict__[NOT_FOLDED] = norm.reason


def _check_model(model: nn.Module) -> None:
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("folding needs the weights: this model is on the meta device. Load it first")
    if any(p.numel() == 0 and hasattr(p, "ds_id") for p in model.parameters()):
        raise ValueError("folding needs whole weights: fold before DeepSpeed ZeRO-3 partitions them")
    if any(hasattr(p, "device_mesh") for p in model.parameters()):
        raise ValueError(
            "folding needs whole weights, and these are sharded (tp_plan, FSDP): fold and save the model first, then "
            "load the folded model sharded"
        )


def _moves(module: nn.Module, group: NormGroup, cls: type[nn.Module]) -> bool:
    """Return whether `module` becomes another function, apart from gain and bias."""
    if not is_plain(cls, group.settings) or not is_swapped(module):
        return not is_plain(cls, group.settings)
    same = group.eps in (None, module.eps) and (group.centered is not False) == module.centered
    return not (is_plain(type(module.inner), module.settings()) and same)


# ---------------------------------------------------------------------------------------------------------- the check


def _check(
    plan: FoldPlan, options: Fold, replacements: Mapping[str, Callable[[Tensor], Tensor]]
) -> tuple[float, dict[str, float]]:
    """Run the folded model with the norms that will replace its own, and compare the outputs.

    Return the largest relative difference of a task output, and those of the by-products. Raise RuntimeError above the
    tolerance.
    """

    def replaced() -> Iterator[Any]:
        for name, new in replacements.items():
            yield plan.modules[name].register_forward_hook(lambda module, args, output, new=new: new(args[0]))

    watched = plan.watched
    with evaluating(plan.model), hooked(replaced()):
        after = sample(plan.model(**watched.inputs.values))
    has_task = any(not is_side_output(path) for path in watched.outputs)
    difference, side = 0.0, {}
    for path, old in watched.outputs.items():
        value = _difference(old, after[path])
        if has_task and is_side_output(path):
            side[path] = value
        elif value != value or value > difference:
            difference = value
    if difference != difference:
        raise RuntimeError("folding made the outputs NaN; the model is unchanged")
    coarsest = max(TOLERANCES.get(dtype, 1e-4) for dtype in watched.dtypes)
    limit = options.tolerance if options.tolerance is not None else coarsest
    if difference > limit and (plan.is_exact or options.tolerance is not None):
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
