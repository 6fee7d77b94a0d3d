"""Fold a norm's trained gain and bias into the linear layers that read it, exactly.

    W (g * y + b) + c  =  (W diag(g)) y + (W b + c)

so a LayerNorm whose every reader is a linear layer of its own can become LayerNorm-simple (and AdaNorm with k = 0,
C = 1) without the model's output changing. One forward pass shows who reads what (`consumers.py`); the whole plan is
made before the first weight moves (`plan.py`); the outputs before and after are compared, and a difference above
the tolerance undoes everything.

After a fold the norms hold gain 1 and bias 0, so folding again changes nothing. Linear layers that lacked a bias and
needed one get it; where that happens, and where an eps was adjusted, it is marked on the module so that the saved
spec can say so.

Post-norm layers add the norm's output h = g * y + b to a branch that ends in a linear layer (W, c), and feed the sum
to the next norm, which does not see a common scale. `on_unfoldable="approximate"` then keeps the mean s of g:

    h + W a + c  ~  s * (y + (W / s) a + (c + b) / s),        next norm's eps / s^2

which is exact when all of g is one number, and drops the deviation of g from its mean on that path otherwise.
`on_unfoldable="calibrate"` takes s, and the gains and biases that the readers get, from a least-squares fit to the
source's activations on a batch of real data, norm after norm with all before it replaced. So errors do not add up,
outlier channels (which hardly vary from token to token) go into the bias, and for AdaNorm the fit makes up for what k
does to the scale. Norms whose fold is exact, with nothing replaced before them that is not, are folded exactly;
where a bias would not arrive (a masked path, say) the gains alone are fitted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from hf_adanorm._tables import html_table, text_table
from hf_adanorm.detection import iter_norms
from hf_adanorm.modeling_adanorm import NORM_CLASSES, LayerNormSimple, check_number, is_swapped
from hf_adanorm.options import CHOICES
from hf_adanorm.running import SLOW_BAR, dummy_inputs, hooked, run
from hf_adanorm.saving import configs_of, resolved_spec, write_specs
from hf_adanorm.spec import NormGroup
from hf_adanorm.swapping import (
    Change,
    Options,
    all_or_nothing,
    apply_plan,
    check_choice,
    make_plan,
    refuse_wrapped,
    unchanged,
)

from .fit import fold_by_fit
from .heads import settle_heads, untie_heads
from .plan import BLOCK, TOLERANCES, FoldedNorm, FoldPlan, comes_in, eps_name
from .uses import is_side_output, named_outputs

OnUnfoldable = Literal["keep", "approximate", "calibrate", "raise"]


_HEADER = ("norm", "action", "consumers, or why not")


@dataclass(frozen=True)
class FoldReport:
    """What a fold did. Prints as a table."""

    norms: tuple[FoldedNorm, ...]
    difference: float = 0.0
    """Largest difference of a task output before and after, relative to that output's largest value."""
    changed: dict[str, float] = field(default_factory=dict)
    """By-products of the model (hidden states) that are now those of a norm without gain and bias, and by how much."""
    added_biases: tuple[str, ...] = ()
    protect: tuple[str, ...] = ()
    """Norms whose fold changed more than values: a bias that was not there, an eps."""
    untied: dict[str, int] = field(default_factory=dict)
    """Heads that got a weight of their own, and how many parameters that adds to the model."""
    is_stock: bool = False
    """Whether what is left is a stock model, which whatever loads such models loads as it is, without this package.
    Not where a head was untied and the config cannot say so: transformers alone then sees it, by the checkpoint."""

    def names(self, *actions: str) -> list[str]:
        return [norm.name for norm in self.norms if norm.action in actions]

    def _rows(self) -> list[tuple[str, str, str]]:
        rows: list[tuple[str, str, str]] = []
        for norm in self.norms:
            detail = norm.reason or ", ".join(norm.consumers)
            if norm.deviation is not None:
                detail += f" (deviation of the gain {norm.deviation:.3f})"
            if norm.lost is not None:
                detail += f" ({norm.lost:.1%} of the output not reproduced)"
            rows.append((norm.name, norm.action, detail))
        return rows

    def _summary(self) -> str:
        counts = {action: len(self.names(action)) for action in ("folded", "approximated", "kept", "nothing to fold")}
        text = ", ".join(f"{count} {action}" for action, count in counts.items() if count) or "no norms"
        text += f"; largest relative difference of the outputs {self.difference:.1e}"
        if self.changed:
            text += "; changed: " + ", ".join(
                f"{path} ({value:.1e})" for path, value in list(self.changed.items())[:4]
            )
            text += f" and {len(self.changed) - 4} more" if len(self.changed) > 4 else ""
        if self.added_biases:
            text += f"; {len(self.added_biases)} bias{'es' if len(self.added_biases) > 1 else ''} added"
        for name, count in self.untied.items():
            text += f"; {name} untied ({count:,} parameters more)"
        if self.is_stock:
            text += "; a plain stock model: it loads without hf_adanorm"
        return text

    def __str__(self) -> str:
        return f"{text_table(_HEADER, self._rows())}\n{self._summary()}" if self.norms else self._summary()

    def _repr_html_(self) -> str:
        return html_table(_HEADER, self._rows(), self._summary())


def fold_affine(
    model: nn.Module,
    *,
    fold_inputs: Mapping[str, Any] | None = None,
    on_unfoldable: Literal["keep", "approximate", "calibrate", "raise"] = "keep",
    on_tied: str = "keep",
    tolerance: float | None = None,
) -> FoldReport:
    """Fold gain and bias of every LayerNorm and RMSNorm into the linear layers that read it, in place.

    The norms keep their class with gain 1 and bias 0; task outputs stay what they were. Where a linear layer had to be
    given a bias, or an eps was adjusted, the norm becomes layernorm-simple (the same function), so that the saved
    model cannot be loaded without this package as if it were the stock one. `patch_model(model, ...,
    affine="fold")` folds and swaps in one go.

    Where no bias and no eps had to change, what is left is a stock model whose gains are 1 and biases 0 (`is_stock` of
    the report): any engine that loads the architecture loads it as it is.

    Args:
        model: with its weights in memory; not wrapped by DDP, FSDP or torch.compile.
        fold_inputs: keyword arguments of one forward pass, by default made from the model's config. Give a real batch,
            with padding if the model takes it, where the default does not run or does not reach every part of the
            model.
        on_unfoldable: for norms that something else reads too. "keep" leaves them, "approximate" folds a post-norm
            residual norm but for the deviation of its gain, "calibrate" does so with gains and biases fitted to the
            source's activations on `fold_inputs`, norm after norm, "raise" stops before anything was changed.
        on_tied: for a norm whose head shares its weight with an embedding. "keep" leaves it, "untie" gives the head a
            copy of its own to fold into; the config says so, or the checkpoint does.
        tolerance: largest difference of a task output, relative to its largest value; by default 1e-4 in float32.

    Returns:
        What became of each norm, and the difference measured.

    Raises:
        ValueError: a bad argument; no dummy inputs; a norm that cannot be folded with `on_unfoldable="raise"`.
        RuntimeError: the outputs moved by more than the tolerance.
        Whatever is raised, a KeyboardInterrupt, say, the model is then as it was.
    """
    if on_unfoldable not in ("keep", "approximate", "calibrate", "raise"):
        raise ValueError(f'on_unfoldable must be "keep", "approximate", "calibrate" or "raise", got {on_unfoldable!r}')
    check_choice("on_tied", on_tied, CHOICES["on_tied"])
    refuse_wrapped(model)
    names = [name for name, _, info in iter_norms(model) if info.kind != "other"]
    with all_or_nothing(model) as change:
        report = fold_norms(
            change,
            names,
            fold_inputs=fold_inputs,
            on_unfoldable=on_unfoldable,
            on_tied=on_tied,
            tolerance=tolerance,
        )
        if configs_of(model):
            if report.protect:
                exactly = "re:" + "|".join(re.escape(name) for name in report.protect)
                apply_plan(make_plan(model, Options(cls=LayerNormSimple, include=exactly, targets="all")))
            write_specs(model)
    still_tied = report.untied and any(getattr(c, "tie_word_embeddings", False) for c in configs_of(model))
    return replace(report, is_stock=not report.protect and not still_tied and resolved_spec(model) is None)


def fold_norms(
    change: Change,
    names: Collection[str],
    *,
    fold_inputs: Mapping[str, Any] | None = None,
    on_unfoldable: OnUnfoldable = "keep",
    on_tied: str = "keep",
    tolerance: float | None = None,
    groups: Mapping[str, NormGroup] | None = None,
) -> FoldReport:
    """`fold_affine` for the norms called `names` of `change.model`, as a part of that change; leaves the config alone.
    `groups` says what each becomes, for "calibrate" (by default layernorm-simple)."""
    model, groups = change.model, groups or {}
    _check_model(model)
    if tolerance is not None:
        check_number("tolerance", tolerance)
    if on_unfoldable == "calibrate" and fold_inputs is None:
        raise ValueError(
            'on_unfoldable="calibrate" fits to real activations: pass fold_inputs, one batch of real data'
        )
    if fold_inputs is not None and not isinstance(fold_inputs, Mapping):
        raise TypeError(
            f"fold_inputs must map argument names of the model's forward to tensors, got {type(fold_inputs).__name__}"
        )
    inputs = _checked(model, fold_inputs) if fold_inputs is not None else dummy_inputs(model)
    calibrate = on_unfoldable == "calibrate"
    heads = untie_heads(model) if on_tied == "untie" else {}
    moving = [name for name, group in groups.items() if _moves(model.get_submodule(name), group)]
    plan = FoldPlan(
        model,
        names,
        inputs,
        approximate=calibrate or on_unfoldable == "approximate",
        calibrate=calibrate,
        moving=moving if calibrate else (),
    )
    untied = settle_heads(model, heads, {name for fold in plan.folds.values() for name in fold.readers})
    kept = [norm for norm in plan.norms if norm.action == "kept"]
    if kept and on_unfoldable == "raise":
        listed = "; ".join(f"{norm.name}: {norm.reason}" for norm in kept[:5])
        more = f" (and {len(kept) - 5} more)" if len(kept) > 5 else ""
        raise ValueError(
            f"{len(kept)} of {len(plan.norms)} norms cannot be folded: {listed}{more}. "
            f'Nothing was changed; on_unfoldable="keep" leaves them as they are'
        )
    if all(norm.action in ("kept", "nothing to fold") for norm in plan.norms):
        return FoldReport(tuple(plan.norms))
    _check_outputs(plan.watched.outputs)
    states = _hidden_states(model, inputs)
    replacements = _replacements(plan, groups)
    if plan.fitted:
        fold_by_fit(plan, inputs, replacements, change)
    else:
        for name in tqdm(plan.order, desc="folding", unit="norm", **SLOW_BAR):
            plan.absorb(name, change)
    plan.neutralize(change)
    with hooked(_replaced(plan, replacements if calibrate else {})):
        after = _outputs(model, inputs, hidden_states=bool(states))
    difference, changed = _compare(dict(named_outputs(plan.watched.outputs)), after)
    changed |= {path: _difference(states[path], after[path]) for path in states}
    limit = tolerance if tolerance is not None else _default_tolerance(plan)
    exact = not plan.fitted and all(norm.deviation is None or norm.deviation < 1e-7 for norm in plan.norms)
    if exact and not difference <= limit:
        raise RuntimeError(
            f"folding moved the outputs by {difference:.2e} of their largest value, above the tolerance {limit:.0e}; "
            f"the model is as it was. Pass a real batch as fold_inputs, or a larger tolerance to fold_affine if that "
            f"is rounding (a half-precision model)"
        )
    if difference != difference:
        raise RuntimeError("folding made the outputs NaN; the model is as it was")
    side = {path: value for path, value in changed.items() if value > limit}
    return FoldReport(tuple(plan.result()), difference, side, tuple(plan.added_biases), tuple(plan.protect()), untied)


def _moves(module: nn.Module, group: NormGroup) -> bool:
    """Whether what `module` becomes is, but for gain and bias, another function."""
    if comes_in(group) or not is_swapped(module):
        return comes_in(group)
    plain = module.norm_name != "adanorm" or (module.settings().get("k"), module.settings().get("C")) == (0.0, 1.0)
    same = group.eps in (None, module.eps) and (group.centered is not False) == module.centered
    return not (plain and same)


def _checked(model: nn.Module, fold_inputs: Mapping[str, Any]) -> dict[str, Any]:
    """`fold_inputs`, with which the model runs. Raises ValueError, with the model's own words, when it does not."""
    inputs = dict(fold_inputs)
    try:
        run(model, inputs)
    except Exception as error:  # of whatever kind the model makes of them
        raise ValueError(
            f"{type(model).__name__} does not run on fold_inputs={{{', '.join(map(str, inputs))}}}: "
            f"{type(error).__name__}: {error}"
        ) from error
    return inputs


def _replacements(plan: FoldPlan, groups: Mapping[str, NormGroup]) -> dict[str, Callable[[Tensor], Tensor]]:
    """What takes the place of each folded norm, as a function of its input."""

    def make(name: str) -> Callable[[Tensor], Tensor]:
        info, module, group = plan.infos[name], plan.modules[name], groups.get(name)
        kind = LayerNormSimple if group is None else NORM_CLASSES[group.norm]
        settings: dict[str, Any] = {} if group is None else dict(group.settings)
        settings["centered"] = info.kind == "layernorm" if group is None else group.centered is not False
        settings["channels_first"] = info.channels_first
        settings["reference"] = (group and group.reference) or getattr(module, "reference", "paper")

        def norm(x: Tensor) -> Tensor:
            eps = None if group is None else group.eps
            if eps is None:
                eps = getattr(module, key) if (key := eps_name(module)) else info.eps  # as adjusted by then
            return cast(Tensor, kind(info.normalized_shape, eps, **settings)(x))

        return norm

    return {name: make(name) for name in plan.folds}


def _replaced(plan: FoldPlan, replacements: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[Any]:
    for name, new in replacements.items():
        yield plan.modules[name].register_forward_hook(lambda module, args, output, new=new: new(args[0]))


def _check_model(model: nn.Module) -> None:
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("folding needs the weights: this model is on the meta device. Load it first")
    if any(p.numel() == 0 and hasattr(p, "ds_id") for p in model.parameters()):
        raise ValueError("folding needs whole weights: fold before DeepSpeed ZeRO-3 partitions them")


def _check_outputs(outputs: Any) -> None:
    """Raise ValueError for outputs that could show no difference."""
    task = [tensor for _, tensor in named_outputs(outputs) if tensor.is_floating_point()]
    if not any(bool(tensor.isfinite().any()) for tensor in task):
        raise ValueError(
            "the model's outputs on these inputs hold no finite number, by which a fold could be checked: pass "
            "fold_inputs, a real batch, and look for NaN in the weights"
        )


def _outputs(model: nn.Module, inputs: Mapping[str, Any], *, hidden_states: bool) -> dict[str, Tensor]:
    with unchanged(model):  # transformers leaves the hooks that capture hidden states, and a mark
        return dict(named_outputs(run(model, {**inputs, **({"output_hidden_states": True} if hidden_states else {})})))


def _hidden_states(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The hidden states that the model returns only when it is asked for them; none where it cannot be asked."""
    if not isinstance(model, PreTrainedModel):
        return {}
    try:
        outputs = _outputs(model, inputs, hidden_states=True)
    except (TypeError, ValueError, RuntimeError):  # not a parameter of every model
        return {}
    return {path: tensor for path, tensor in outputs.items() if "hidden_states" in path}


def _default_tolerance(plan: FoldPlan) -> float:
    """That of the coarsest number that the fold changes: of the norms, the layers that take them up, the outputs."""
    changed = {name for norm, fold in plan.folds.items() for name in (norm, *fold.readers, *fold.branches)}
    dtypes = {parameter.dtype for name in changed for parameter in plan.modules[name].parameters(recurse=False)}
    dtypes |= {tensor.dtype for _, tensor in named_outputs(plan.watched.outputs) if tensor.is_floating_point()}
    return max(TOLERANCES.get(dtype, 1e-4) for dtype in dtypes)


def _compare(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> tuple[float, dict[str, float]]:
    """(largest relative difference of the task outputs, differences of the by-products)."""
    main = any(not is_side_output(path) for path in before)
    largest, side = 0.0, {}
    for path, old in before.items():
        value = _difference(old, after[path])
        if main and is_side_output(path):
            side[path] = value
        elif value != value or value > largest:
            largest = value
    return largest, side


def _difference(old: Tensor, new: Tensor) -> float:
    """Largest difference, relative to the largest value; 0 for what holds no floating-point numbers."""
    if not old.is_floating_point() or old.numel() == 0:
        return 0.0
    gaps, scales = [], []
    for a, b in zip(*(torch.split(tensor.flatten(), BLOCK) for tensor in (old, new)), strict=True):
        finite = a.isfinite()  # a fully masked row is NaN before and after
        a = torch.where(finite, a, 0.0).double()
        gaps.append((torch.where(finite, b, 0.0).double() - a).abs().max())
        scales.append(a.abs().max())
    return float(torch.stack(gaps).max() / torch.stack(scales).max().clamp_min(1e-30))
