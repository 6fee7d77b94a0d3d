"""Fold a norm's trained gain and bias into the linear layers that read it, exactly.

    W (g * y + b) + c  =  (W diag(g)) y + (W b + c)

so a LayerNorm whose every reader is a linear layer of its own can become LayerNorm-simple (and AdaNorm with k = 0,
C = 1) without the model's output changing. One forward pass shows who reads what (`consumers.py`); the whole plan is
made before the first weight moves; the outputs before and after are compared, and a difference above the tolerance
undoes everything.

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
does to the scale.
"""

from __future__ import annotations

import contextlib
import html
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .consumers import (
    FOREIGN,
    AddUse,
    LinearUse,
    OtherUse,
    OutputUse,
    Use,
    Watched,
    is_linear_map,
    is_side_output,
    named_outputs,
    num_inputs,
    watch_consumers,
)
from .detection import NormInfo, iter_norms
from .dummy_inputs import dummy_inputs
from .modeling_adanorm import ADDED_BIAS, ADJUSTED_EPS, AdaNorm
from .specs import configs_of, own_configs, write_specs

OnUnfoldable = Literal["keep", "fade", "approximate", "calibrate", "raise"]
_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True, kw_only=True)
class FoldedNorm:
    """What became of one norm."""

    name: str
    action: Literal["folded", "approximated", "kept", "nothing to fold"]
    consumers: tuple[str, ...] = ()
    """The linear layers that took the gain and the bias."""
    reason: str = ""
    """Why it was kept, or what was approximated."""
    deviation: float | None = None
    """Standard deviation of the gain over its mean: what an approximated fold drops on the residual path."""


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

    def names(self, *actions: str) -> list[str]:
        return [norm.name for norm in self.norms if norm.action in actions]

    def _rows(self) -> list[tuple[str, str, str]]:
        rows: list[tuple[str, str, str]] = []
        for norm in self.norms:
            detail = norm.reason or ", ".join(norm.consumers)
            if norm.deviation is not None:
                detail += f" (deviation of the gain {norm.deviation:.3f})"
            rows.append((norm.name, norm.action, detail))
        return rows

    def _summary(self) -> str:
        counts = {action: len(self.names(action)) for action in ("folded", "approximated", "kept", "nothing to fold")}
        text = ", ".join(f"{count} {action}" for action, count in counts.items() if count) or "no norms"
        text += f"; largest relative difference of the outputs {self.difference:.1e}"
        if self.changed:
            text += "; changed: " + ", ".join(f"{path} ({value:.1e})" for path, value in self.changed.items())
        if self.added_biases:
            text += f"; {len(self.added_biases)} biases added"
        return text

    def __str__(self) -> str:
        rows = self._rows()
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
        lines = [f"{name:<{widths[0]}}  {action:<{widths[1]}}  {detail}".rstrip() for name, action, detail in rows]
        return "\n".join([*lines, self._summary()])

    def _repr_html_(self) -> str:
        cells = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in self._rows()
        )
        head = "<tr><th>norm</th><th>action</th><th>consumers, or why not</th></tr>"
        return f"<table>{head}{cells}</table><p>{html.escape(self._summary())}</p>"


def fold_affine(
    model: nn.Module,
    *,
    fold_inputs: Mapping[str, Any] | None = None,
    on_unfoldable: Literal["keep", "approximate", "calibrate", "raise"] = "keep",
    tolerance: float | None = None,
) -> FoldReport:
    """Fold gain and bias of every LayerNorm and RMSNorm into the linear layers that read it, in place.

    The norms keep their class with gain 1 and bias 0; task outputs stay what they were. Where a linear layer had to be
    given a bias, or an eps was adjusted, the norm becomes layernorm-simple (the same function), so that the saved
    model cannot be loaded without this package as if it were the stock one. `patch_model(model, ...,
    affine="fold")` folds and swaps in one go.

    Args:
        model: with its weights in memory; not wrapped by DDP, FSDP or torch.compile.
        fold_inputs: keyword arguments of one forward pass, by default made from the model's config. Give a real
        batch, with
            padding if the model takes it, where the default does not run or does not reach every part of the model.
        on_unfoldable: for norms that something else reads too. "keep" leaves them, "approximate" folds a post-norm
            residual norm but for the deviation of its gain, "calibrate" does so with gains and biases fitted to the
            source's activations on `fold_inputs`, norm after norm, "raise" stops before anything was changed.
        tolerance: largest difference of a task output, relative to its largest value; by default 1e-4 in float32.

    Returns:
        What became of each norm, and the difference measured.

    Raises:
        ValueError: a bad argument; no dummy inputs; a norm that cannot be folded with `on_unfoldable="raise"`.
        RuntimeError: the outputs moved by more than the tolerance. The model is then as it was.
    """
    if on_unfoldable not in ("keep", "approximate", "calibrate", "raise"):
        raise ValueError(f'on_unfoldable must be "keep", "approximate", "calibrate" or "raise", got {on_unfoldable!r}')
    from .patching import patch_model, refuse_wrapped  # patching imports this module

    refuse_wrapped(model)
    names = [name for name, _, info in iter_norms(model) if info.kind != "other"]
    report = fold_norms(model, names, fold_inputs=fold_inputs, on_unfoldable=on_unfoldable, tolerance=tolerance)
    if configs_of(model):
        if report.protect:
            exactly = "|".join(re.escape(name) for name in report.protect)
            patch_model(model, "layernorm-simple", include=exactly, targets="all")
        own_configs(model)
        write_specs(model)
    return report


def fold_norms(
    model: nn.Module,
    names: Collection[str],
    *,
    fold_inputs: Mapping[str, Any] | None = None,
    on_unfoldable: OnUnfoldable = "keep",
    tolerance: float | None = None,
    settings: Mapping[str, tuple[float, float]] | None = None,
) -> FoldReport:
    """`fold_affine` for the norms called `names`; leaves the config alone. `settings` gives the (C, k) that each will
    have, for "calibrate" (by default 1 and 0: layernorm-simple)."""
    _check_model(model)
    if on_unfoldable == "calibrate" and fold_inputs is None:
        raise ValueError(
            'on_unfoldable="calibrate" fits to real activations: pass fold_inputs, one batch of real data'
        )
    if fold_inputs is not None and not isinstance(fold_inputs, Mapping):
        raise TypeError(
            f"fold_inputs must map argument names of the model's forward to tensors, got {type(fold_inputs).__name__}"
        )
    inputs = dict(fold_inputs) if fold_inputs is not None else dummy_inputs(model)
    calibrate = on_unfoldable == "calibrate"
    plan = _Plan(model, names, inputs, approximate=calibrate or on_unfoldable == "approximate")
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
    replacements = _replacements(plan, settings or {})
    undo = plan.apply(_Fit(plan, inputs, replacements) if calibrate else None)
    try:
        with _replaced(plan, replacements if calibrate else {}):
            after = dict(named_outputs(_run(model, inputs)))
        difference, changed = _compare(dict(named_outputs(plan.watched.outputs)), after)
        limit = tolerance if tolerance is not None else _default_tolerance(model)
        exact = not calibrate and all(norm.deviation is None or norm.deviation < 1e-7 for norm in plan.norms)
        if exact and not difference <= limit:
            raise RuntimeError(
                f"folding moved the outputs by {difference:.2e} of their largest value, "
                f"above the tolerance {limit:.0e}; "
                f"the model is as it was. Pass a larger tolerance if that is rounding (a half-precision model), or a "
                f"real batch as fold_inputs"
            )
        if difference != difference:
            raise RuntimeError("folding made the outputs NaN; the model is as it was")
    except BaseException:
        undo()
        raise
    side = {path: value for path, value in changed.items() if value > limit}
    return FoldReport(tuple(plan.result(calibrate)), difference, side, tuple(plan.added_biases), tuple(plan.protect()))


def _replacements(plan: _Plan, settings: Mapping[str, tuple[float, float]]) -> dict[str, Callable[[Tensor], Tensor]]:
    """What takes the place of each folded norm, as a function of its input."""

    def make(name: str) -> Callable[[Tensor], Tensor]:
        info, module = plan.infos[name], plan.modules[name]
        C, k = settings.get(name, (1.0, 0.0))
        centered = info.kind == "layernorm"

        def norm(x: Tensor) -> Tensor:
            eps = getattr(module, key) if (key := _eps_name(module)) else info.eps  # as adjusted by then
            swapped = AdaNorm(info.normalized_shape, eps, C, k, centered=centered, channels_first=info.channels_first)
            return cast(Tensor, swapped(x))

        return norm

    return {name: make(name) for name in plan.folds}


@contextlib.contextmanager
def _replaced(plan: _Plan, replacements: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    hooks = [
        plan.modules[name].register_forward_hook(lambda module, args, output, new=new: new(args[0]))
        for name, new in replacements.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _check_model(model: nn.Module) -> None:
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("folding needs the weights: this model is on the meta device. Load it first")
    if any(p.numel() == 0 and hasattr(p, "ds_id") for p in model.parameters()):
        raise ValueError("folding needs whole weights: fold before DeepSpeed ZeRO-3 partitions them")


def _default_tolerance(model: nn.Module) -> float:
    return max(_TOLERANCES.get(p.dtype, 1e-4) for p in model.parameters() if p.is_floating_point())


def _run(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """One forward pass under the same conditions as the watched one."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return model(**inputs)
    finally:
        for module, flag in training.items():
            module.training = flag


def _compare(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> tuple[float, dict[str, float]]:
    """(largest relative difference of the task outputs, differences of the by-products)."""
    main = any(not is_side_output(path) for path in before)
    largest, side = 0.0, {}
    for path, old in before.items():
        new = after[path]
        if not old.is_floating_point() or old.numel() == 0:
            continue
        finite = old.isfinite()  # a fully masked row is NaN before and after
        gap = (new.double() - old.double())[finite].abs()
        scale = old.double()[finite].abs()
        value = float(gap.max() / scale.max().clamp_min(1e-30)) if gap.numel() else 0.0
        if main and is_side_output(path):
            side[path] = value
        elif value != value or value > largest:
            largest = value
    return largest, side


@dataclass
class _Fold:
    """One norm's part of the plan."""

    gain: Tensor  # float64, flat
    bias: Tensor
    readers: dict[str, tuple[int, ...]]  # linear layer -> channel of each column
    branch_bias: Tensor  # what the residual path adds to the branch, before the division by `scale`
    branches: tuple[str, ...] = ()
    next_norms: tuple[str, ...] = ()
    scale: float = 1.0
    lost: float = 0.0  # by a fit: share of the source's variation that is not reproduced


class _Plan:
    """Decides for every norm; then `apply()` carries it all out and returns the way back."""

    def __init__(self, model: nn.Module, names: Collection[str], inputs: Mapping[str, Any], approximate: bool):
        self.model = model
        self.modules: dict[str, nn.Module] = dict(model.named_modules())
        self.infos: dict[str, NormInfo] = {n: i for n, _, i in iter_norms(model) if i.kind != "other"}
        watchable = {n: (i.normalized_shape, i.channels_first) for n, i in self.infos.items()}
        self.watched: Watched = watch_consumers(model, watchable, inputs, follow_sums=approximate)
        self.approximate = approximate
        self.owners: dict[int, set[str]] = {}
        for name, module in self.modules.items():
            for parameter in module.parameters(recurse=False):
                self.owners.setdefault(parameter.data_ptr(), set()).add(name)
        self.added_biases: list[str] = []
        self.masters: dict[str, tuple[Tensor, Tensor]] = {}
        self.folds: dict[str, _Fold] = {}
        self.norms: list[FoldedNorm] = [self._decide(name) for name in names]

    # -- decisions ---------------------------------------------------------------------------------------------------

    def _decide(self, name: str) -> FoldedNorm:
        info, module = self.infos[name], self.modules[name]
        gain, bias = self._affine(module, info)
        if bool((gain == 1).all()) and not bool(bias.any()):
            return FoldedNorm(name=name, action="nothing to fold", reason="gain is 1 and bias is 0")
        if (refusal := self._refuse_norm(name, info, module)) is not None:
            return FoldedNorm(name=name, action="kept", reason=refusal)
        uses = self.watched.uses[name]
        linear = [use for use in uses if isinstance(use, LinearUse)]
        adds = [use for use in uses if isinstance(use, AddUse)]
        rest = [use for use in uses if not isinstance(use, (LinearUse, AddUse))]
        for other in rest:
            if (refusal := _refuse_use(other)) is not None:
                return FoldedNorm(name=name, action="kept", reason=refusal)
        if adds and not self.approximate:
            reason = f"added to the residual stream (to the output of {adds[0].branch})"
            return FoldedNorm(name=name, action="kept", reason=reason)
        for use in linear:
            if (refusal := self._refuse_reader(name, use, bool(bias.any()))) is not None:
                return FoldedNorm(name=name, action="kept", reason=refusal)
        readers = {use.module: use.columns for use in linear}
        if (unseen := self._unseen(info, readers)) is not None:
            reason = f"{unseen} did not run on these inputs and may read it too: give fold_inputs that reach it"
            return FoldedNorm(name=name, action="kept", reason=reason)
        if not adds:
            if not readers:
                return FoldedNorm(name=name, action="kept", reason="nothing reads it")
            self.folds[name] = _Fold(gain, bias, readers, torch.zeros_like(bias))
            if bool(bias.any()) and any(use.dropout for use in linear):
                reason = "exact but for dropout, which in training no longer acts on the bias"
                return FoldedNorm(
                    name=name, action="approximated", consumers=tuple(readers), reason=reason, deviation=0.0
                )
            return FoldedNorm(name=name, action="folded", consumers=tuple(readers))
        scale = float(gain.mean())
        if (refusal := self._refuse_residual(name, adds, scale)) is not None:
            return FoldedNorm(name=name, action="kept", reason=refusal)
        branches = tuple(dict.fromkeys(use.branch for use in adds))
        following = tuple(dict.fromkeys(n for use in adds for n in self.watched.sum_readers[use.total]))
        self.folds[name] = _Fold(gain, bias, readers, bias, branches, following, scale)
        reason = "residual: mean of the gain and the bias into " + ", ".join(branches)
        if bool(bias.any()) and any(use.dropout or use.branch_dropout for use in adds):
            reason += "; in training dropout acts on the folded bias"
        deviation = float(gain.std(correction=0) / scale)
        return FoldedNorm(
            name=name,
            action="approximated",
            consumers=(*readers, *branches),
            reason=reason,
            deviation=deviation,
        )

    @staticmethod
    def _affine(module: nn.Module, info: NormInfo) -> tuple[Tensor, Tensor]:
        """Gain and bias in effect, float64, flat."""
        width = torch.Size(info.normalized_shape).numel()
        tensors = [*module.parameters(), *module.buffers()]
        device = tensors[0].device if tensors else torch.device("cpu")
        gain = torch.ones(width, dtype=torch.float64, device=device)
        bias = torch.zeros(width, dtype=torch.float64, device=device)
        if info.has_gain and info.gain_name:
            gain = getattr(module, info.gain_name).detach().double().flatten() + info.gain_offset
        if info.has_bias and info.bias_name:
            bias = getattr(module, info.bias_name).detach().double().flatten()
        return gain, bias

    def _refuse_norm(self, name: str, info: NormInfo, module: nn.Module) -> str | None:
        if info.parametrized or parametrize.is_parametrized(module):
            return "its gain or bias is parametrized"
        if info.inside:
            return f"part of the conditioned norm {info.inside}"
        if name not in self.watched.uses:
            return "did not run on these inputs: give fold_inputs that reach it"
        for key in (info.gain_name, info.bias_name):
            tensor = getattr(module, key, None) if key else None
            if isinstance(tensor, Tensor) and (others := self._tied(tensor, name)):
                return f"its {key} is shared with {others}"
        if not self.watched.uses[name]:
            return "nothing reads it"
        return None

    def _tied(self, tensor: Tensor, name: str) -> str:
        module = self.modules[name]
        others = self.owners.get(tensor.data_ptr(), set())
        return ", ".join(sorted(other for other in others if self.modules[other] is not module))

    def _refuse_reader(self, norm: str, use: LinearUse, has_bias: bool) -> str | None:
        module = self.modules[use.module]
        if (refusal := self._refuse_linear(use.module)) is not None:
            return refusal
        for call in self.watched.linear_calls[use.module]:
            if call.get(norm) != use.columns:
                others = sorted(set(call) - {norm})
                what = f"the norm {others[0]}" if others else "something that is not this norm's output"
                return f"{use.module} also reads {what}"
            mine = {j for j, channel in enumerate(use.columns) if channel != FOREIGN}
            for other, columns in call.items():
                if other != norm and mine & {j for j, channel in enumerate(columns) if channel != FOREIGN}:
                    return f"{use.module} is shared with the norm {other}"
        if not has_bias:
            return None
        if not use.bias_arrives:
            return f"padded, masked or scaled between the norm and {use.module}, and its bias is not zero"
        if use.unsure:
            return f"multiplied by a mask before {use.module}, and its bias is not zero: give fold_inputs with padding"
        padding = getattr(module, "padding", 0)
        zeros = getattr(module, "padding_mode", "zeros") == "zeros"
        if zeros and (padding == "same" or (not isinstance(padding, str) and any(_as_tuple(padding)))):
            return f"{use.module} pads with zeros, and the norm's bias is not zero"
        if use.dropout and not self.approximate:
            return f"dropout in training between the norm and {use.module}, and its bias is not zero"
        return None

    def _refuse_linear(self, name: str) -> str | None:
        """Why the weights of a linear layer may not be changed."""
        module = self.modules[name]
        if parametrize.is_parametrized(module) or "weight" not in module._parameters:
            return f"{name} is parametrized, its weight is computed from others"
        parent = self.modules.get(name.rpartition(".")[0])
        if hasattr(parent, "base_layer") or any(part.startswith("lora_") for part in name.split(".")):
            return f"{name} belongs to an adapter: merge it first"
        weight = module._parameters["weight"]
        if (
            not isinstance(weight, Tensor)
            or weight.dtype not in _TOLERANCES
            or type(weight) not in (nn.Parameter, Tensor)
        ):
            return f"{name} is quantised or keeps its weight in another form ({type(weight).__name__})"
        for key, tensor in module._parameters.items():
            if tensor is not None and (others := self._tied(tensor, name)):
                return f"the {key} of {name} is tied to {others}"
        if (reader := self.watched.weight_readers.get(name)) is not None:
            return f"the weight of {name} is also read by {reader}"
        return None

    def _refuse_residual(self, name: str, adds: list[AddUse], scale: float) -> str | None:
        if scale <= 0:
            return f"the mean of its gain is {scale:.3g}, and dividing by it needs it positive"
        sums: set[int] = set()
        for use in adds:
            if (refusal := self._refuse_linear(use.branch)) is not None:
                return f"the branch it is added to: {refusal}"
            readers = self.watched.linear_readers.get(use.branch, [])
            mine = sum(other.branch == use.branch for other in adds)
            if len(readers) != mine or any(reader != "residual" for reader in readers):
                return f"the output of {use.branch} is read by more than this residual connection"
            following = self.watched.sum_readers[use.total]
            if not following or any(reader.startswith("!") for reader in following):
                what = following[0].lstrip("!") if following else "nothing"
                return f"the sum with {use.branch} goes on in the residual stream ({what}), not only into a norm"
            sums.add(use.total)
        for following_norm in {n for total in sums for n in self.watched.sum_readers[total]}:
            if any(read not in sums for read in self.watched.norm_reads[following_norm]):
                return f"{following_norm} also reads something else than this norm's residual sum"
            if _eps_name(self.modules[following_norm]) is None:
                return f"the eps of {following_norm} cannot be set"
        return None

    def _unseen(self, info: NormInfo, readers: Iterable[str]) -> str | None:
        """A linear layer of this width that did not run, beside one that reads the norm (experts, cross-attention)."""
        for name, module in self.modules.items():
            if (
                name in self.watched.ran
                or not is_linear_map(module)
                or num_inputs(module) != info.normalized_shape[-1]
            ):
                continue
            owner = name
            while owner and owner not in self.watched.ran:
                owner = owner.rpartition(".")[0]
            if not owner:
                continue
            numbered = _is_numbered(name[len(owner) + 1 :])
            for reader in readers:
                if reader.startswith(owner + ".") and (numbered or not _is_numbered(reader[len(owner) + 1 :])):
                    return name
        return None

    def protect(self) -> list[str]:
        added = set(self.added_biases)
        return [name for name, fold in self.folds.items() if fold.branches or added & set(fold.readers)]

    def result(self, calibrated: bool) -> list[FoldedNorm]:
        """The norms as decided, with what a fit lost in place of the deviation of the gain."""
        if not calibrated:
            return self.norms
        return [
            replace(norm, action="approximated", deviation=self.folds[norm.name].lost, reason="fitted to the inputs")
            if norm.name in self.folds
            else norm
            for norm in self.norms
        ]

    # -- carrying it out ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def apply(self, fit: _Fit | None = None) -> _Undo:
        """Change weights, biases, eps, and set the norms' gains to 1 and biases to 0. Float64 arithmetic, rounded
        once.

        With `fit`, norm after norm in the order they run, each fitted to the source with all before it replaced.
        """
        undo = _Undo()
        try:
            order = [name for name in self.watched.norm_reads if name in self.folds]
            for name in order:
                fold = self.folds[name]
                if fit is not None:
                    fit.update(name, fold)
                self._absorb(fold, undo)
            if fit is not None:
                fit.close()
            for name in order:
                info, module = self.infos[name], self.modules[name]
                for key, value in ((info.gain_name, 1.0 - info.gain_offset), (info.bias_name, 0.0)):
                    if key is not None and isinstance(tensor := getattr(module, key, None), Tensor):
                        undo.keep(tensor)
                        tensor.fill_(value)
        except BaseException:
            if fit is not None:
                fit.close()
            undo()
            raise
        return undo

    def _absorb(self, fold: _Fold, undo: _Undo) -> None:
        """Fold one norm into its readers, its branches and the eps of the norms that follow."""
        has_bias = bool(fold.bias.any()) or bool(fold.branch_bias.any())
        for name, columns in fold.readers.items():
            weight, bias = self._master(name)
            index = torch.tensor(columns, device=weight.device)
            own = index >= 0
            gain = torch.where(own, fold.gain.to(weight.device)[index.clamp_min(0)], 1.0)
            shift = torch.where(own, fold.bias.to(weight.device)[index.clamp_min(0)], 0.0)
            self._write(name, *_absorb(self.modules[name], weight, bias, gain, shift), has_bias, undo)
        for name in fold.branches:
            weight, bias = self._master(name)
            bias = (bias + fold.branch_bias.to(bias.device)) / fold.scale
            self._write(name, weight / fold.scale, bias, has_bias, undo)
        for name in fold.next_norms:
            norm = self.modules[name]
            key = _eps_name(norm)
            assert key is not None  # checked in _refuse_residual
            undo.eps.append((norm, key, getattr(norm, key), ADJUSTED_EPS in norm.__dict__))
            setattr(norm, key, getattr(norm, key) / fold.scale**2)
            norm.__dict__[ADJUSTED_EPS] = True

    def _master(self, name: str) -> tuple[Tensor, Tensor]:
        """Weight and bias of a linear layer in float64, as folded so far."""
        if name not in self.masters:
            module: Any = self.modules[name]
            weight = module.weight.detach().double()
            outputs = weight.shape[1] if _is_conv1d(module) else weight.shape[0]
            bias = getattr(module, "bias", None)
            zeros = torch.zeros(outputs, dtype=torch.float64, device=weight.device)
            self.masters[name] = weight, zeros if bias is None else bias.detach().double()
        return self.masters[name]

    def _write(self, name: str, weight: Tensor, bias: Tensor, needs_bias: bool, undo: _Undo) -> None:
        self.masters[name] = weight, bias
        module: Any = self.modules[name]
        old_weight, old_bias = module.weight, getattr(module, "bias", None)
        new_weight, new_bias = weight.to(old_weight.dtype), bias.to(old_weight.dtype)
        if not bool(new_weight.isfinite().all() and new_bias.isfinite().all()):
            raise RuntimeError(
                f"folding into {name} overflows {old_weight.dtype}; the model is as it was. Fold in float32"
            )
        undo.keep(old_weight)
        old_weight.copy_(new_weight)
        if old_bias is not None:
            undo.keep(old_bias)
            old_bias.copy_(new_bias)
        elif needs_bias:
            module.bias = nn.Parameter(new_bias, requires_grad=old_weight.requires_grad)
            module.__dict__[ADDED_BIAS] = True
            undo.added.append(module)
            self.added_biases.append(name)


class _Fit:
    """Fits gain and bias by least squares, for a norm that is more than a change of scale (k > 0), or that follows on
    norms whose fold dropped something: its new output z is what the model gives with every norm before it replaced,
    and per channel the readers get the gain and bias that bring z closest to the source's output h."""

    def __init__(self, plan: _Plan, inputs: Mapping[str, Any], replacements: Mapping[str, Callable[[Tensor], Tensor]]):
        self.plan, self.inputs, self.replacements = plan, inputs, replacements
        self.mask = inputs.get("attention_mask")
        self.hooks: list[Any] = []
        self.targets = self._capture(list(plan.folds))

    def _rows(self, name: str, output: Tensor) -> Tensor:
        """(rows, channels), float64, without padding."""
        shape, dims = self.plan.infos[name].normalized_shape, len(self.plan.infos[name].normalized_shape)
        if self.plan.infos[name].channels_first:
            output = output.movedim(1, -1)
        rows = output.double().reshape(-1, torch.Size(shape).numel())
        if isinstance(self.mask, Tensor) and output.shape[:-dims] == self.mask.shape:
            rows = rows[self.mask.reshape(-1).bool()]
        return rows

    def _capture(self, names: Sequence[str]) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {name: [] for name in names}
        hooks = [
            self.plan.modules[name].register_forward_hook(
                lambda module, args, output, name=name: found[name].append(self._rows(name, output))
            )
            for name in names
        ]
        try:
            _run(self.plan.model, self.inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return {name: torch.cat(rows) for name, rows in found.items()}

    def update(self, name: str, fold: _Fold) -> None:
        replacement = self.replacements[name]
        self.hooks.append(
            self.plan.modules[name].register_forward_hook(lambda module, args, output: replacement(args[0]))
        )
        z, h = self._capture([name])[name], self.targets[name]
        z_mean, h_mean = z.mean(0), h.mean(0)
        z0, h0 = z - z_mean, h - h_mean
        variance, covariance = z0.square().sum(0), (z0 * h0).sum(0)
        moves = variance > 1e-8 * len(z)  # a channel that stands still has no slope: it keeps its gain
        fold.gain = torch.where(moves, covariance / variance.clamp_min(1e-30), fold.gain)
        fold.bias = h_mean - fold.gain * z_mean
        if fold.branches:
            scale = float(covariance.sum() / variance.sum())
            if scale <= 0:
                raise RuntimeError(
                    f"{name} at these settings has nothing in common with its source: choose a smaller k"
                )
            fold.scale, fold.branch_bias = scale, h_mean - scale * z_mean
        lost = h - (fold.scale * z + fold.branch_bias if fold.branches else fold.gain * z + fold.bias)
        fold.lost = float(lost.norm() / h0.norm().clamp_min(1e-30))

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()


class _Undo:
    """Puts back every tensor and attribute that a fold changed."""

    def __init__(self) -> None:
        self.tensors: list[tuple[Tensor, Tensor]] = []
        self.added: list[nn.Module] = []
        self.eps: list[tuple[nn.Module, str, float, bool]] = []

    def keep(self, tensor: Tensor) -> None:
        if not any(kept is tensor for kept, _ in self.tensors):
            self.tensors.append((tensor, tensor.detach().clone()))

    @torch.no_grad()
    def __call__(self) -> None:
        for tensor, old in self.tensors:
            tensor.copy_(old)
        for module in self.added:
            module.bias = None  # type: ignore[assignment]
            del module.__dict__[ADDED_BIAS]
        for norm, key, eps, marked in reversed(self.eps):
            setattr(norm, key, eps)
            if not marked:
                norm.__dict__.pop(ADJUSTED_EPS, None)


def _absorb(module: nn.Module, weight: Tensor, bias: Tensor, gain: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """(W diag(g), W b + c) for a linear layer, Conv1D (its weight is transposed) or (grouped) convolution."""
    if _is_conv1d(module):
        return weight * gain[:, None], bias + shift @ weight
    if isinstance(module, nn.Linear):
        return weight * gain, bias + weight @ shift
    groups = int(module.groups)  # type: ignore[arg-type]
    outputs, width = weight.shape[0], weight.shape[1]
    # Output channels of group i read input channels i * width .. (i + 1) * width.
    gain, shift = (t.view(groups, width).repeat_interleave(outputs // groups, 0) for t in (gain, shift))
    spatial = [1] * (weight.ndim - 2)
    moved = (weight * shift.view(outputs, width, *spatial)).flatten(1).sum(1)
    return weight * gain.view(outputs, width, *spatial), bias + moved


def _is_conv1d(module: nn.Module) -> bool:
    return is_linear_map(module) and not hasattr(module, "in_features") and not hasattr(module, "in_channels")


def _as_tuple(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _is_numbered(path: str) -> bool:
    return any(part.isdigit() for part in path.split("."))


def _eps_name(module: nn.Module) -> str | None:
    for key in ("eps", "variance_epsilon"):
        if isinstance(module.__dict__.get(key), float):
            return str(key)
    return None


def _refuse_use(use: Use) -> str | None:
    if isinstance(use, OutputUse):
        return None if use.side else f"it is the model's output ({use.path})"
    assert isinstance(use, OtherUse)
    where = f" in {use.module}" if use.module else ""
    if use.operation in ("add", "add_"):
        return f"added to the residual stream{where}"
    if use.operation.startswith(("another norm", "a linear layer")):
        return f"read by {use.operation} ({use.module})"
    return f"read by the operation {use.operation}{where}"
