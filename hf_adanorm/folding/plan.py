"""Which norms can be folded into what, decided for the whole model before a weight moves, and the fold itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from hf_adanorm.detection import NormInfo, iter_norms
from hf_adanorm.modeling_adanorm import ADDED_BIAS, ADJUSTED_EPS, is_swapped
from hf_adanorm.norms import computes_n
from hf_adanorm.running import with_masks
from hf_adanorm.spec import NormGroup
from hf_adanorm.swapping import Change

from .consumers import watch_consumers
from .linear import is_linear_map, num_inputs
from .shadows import FOREIGN
from .uses import AddUse, LinearUse, OtherUse, OutputUse, Watched

# The types of weights that can be folded into, and how far the outputs may move by rounding.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
BLOCK = 1 << 18  # elements of a weight that are folded at a time


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
    lost: float | None = None
    """Of a fold that was fitted: share of the variation of the norm's output that it does not reproduce (0..1)."""


@dataclass
class Fold:
    """One norm's part of the plan."""

    gain: Tensor  # float64, flat
    bias: Tensor
    readers: dict[str, tuple[int, ...]]  # linear layer -> channel of each column
    branch_bias: Tensor  # what the residual path adds to the branch, before the division by `scale`
    branches: tuple[str, ...] = ()
    next_norms: tuple[str, ...] = ()
    scale: float = 1.0
    without_bias: str = ""  # why a reader must not be given a bias, if so: a fit is then one of gains alone
    lost: float = 0.0  # by a fit, see `FoldedNorm`


class FoldPlan:
    """Decides for every norm; then `absorb` carries it out, norm by norm, and `neutralize` ends it."""

    def __init__(
        self,
        model: nn.Module,
        names: Collection[str],
        inputs: Mapping[str, Any],
        *,
        approximate: bool,
        calibrate: bool = False,
        moving: Collection[str] = (),
    ) -> None:
        """`moving`: norms that become something else than N(x), for "calibrate" to fit whatever their gain."""
        self.model, self.moving = model, moving
        self.modules: dict[str, nn.Module] = dict(model.named_modules())
        self.infos: dict[str, NormInfo] = {n: i for n, _, i in iter_norms(model) if i.kind != "other"}
        watchable = {n: (i.normalized_shape, i.channels_first) for n, i in self.infos.items()}
        padded, self.unseen_masks = with_masks(model, inputs)
        runs = [inputs] if all(value is inputs.get(key) for key, value in padded.items()) else [inputs, padded]
        self.watched: Watched = watch_consumers(model, watchable, *runs, follow_sums=approximate)
        self.approximate = approximate
        self.owners: dict[int, set[str]] = {}
        for name, module in self.modules.items():
            for parameter in module.parameters(recurse=False):
                self.owners.setdefault(parameter.data_ptr(), set()).add(name)
        self.added_biases: list[str] = []
        self.masters: dict[str, tuple[Tensor, Tensor]] = {}  # float64, of layers that several norms fold into
        self.folds: dict[str, Fold] = {}
        self.norms: list[FoldedNorm] = [self._decide(name) for name in names]
        self.pending = Counter(name for fold in self.folds.values() for name in (*fold.readers, *fold.branches))
        order = self.order
        inexact = {norm.name for norm in self.norms if norm.name in moving or (norm.deviation or 0.0) >= 1e-7}
        first = next((at for at, name in enumerate(order) if name in inexact), len(order))
        self.fitted = order[first:] if calibrate else []  # up to there nothing has changed, and no fit is needed

    # -- decisions ---------------------------------------------------------------------------------------------------

    def _decide(self, name: str) -> FoldedNorm:
        gain, bias = self._affine(self.modules[name], self.infos[name])
        if not bool(gain.isfinite().all() and bias.isfinite().all()):
            raise ValueError(f"the gain or bias of {name} is not finite: there is nothing to fold it into")
        has_bias, scale = bool(bias.any()), float(gain.mean())
        if bool((gain == 1).all()) and not has_bias and name not in self.moving:
            return FoldedNorm(name=name, action="nothing to fold", reason="gain is 1 and bias is 0")
        uses = self.watched.uses.get(name, [])
        linear = [use for use in uses if isinstance(use, LinearUse)]
        adds = [use for use in uses if isinstance(use, AddUse)]
        if (refusal := next(filter(None, self._refusals(name, linear, adds, has_bias, scale)), None)) is not None:
            return FoldedNorm(name=name, action="kept", reason=refusal)
        readers = {use.module: use.columns for use in linear}
        without_bias = next(filter(None, (self._bias_lost(name, use) for use in linear)), "")
        if not adds:
            self.folds[name] = Fold(gain, bias, readers, torch.zeros_like(bias), without_bias=without_bias)
            if not (has_bias and any(use.dropout for use in linear)):
                return FoldedNorm(name=name, action="folded", consumers=tuple(readers))
            reason = "exact but for dropout, which in training no longer acts on the bias"
            return FoldedNorm(name=name, action="approximated", consumers=tuple(readers), reason=reason, deviation=0.0)
        branches = tuple(dict.fromkeys(use.branch for use in adds))
        following = tuple(dict.fromkeys(n for use in adds for n in self.watched.sum_readers[use.total]))
        self.folds[name] = Fold(gain, bias, readers, bias, branches, following, scale, without_bias)
        reason = "residual: mean of the gain and the bias into " + ", ".join(branches)
        if has_bias and any(use.dropout or use.branch_dropout for use in adds):
            reason += "; in training dropout acts on the folded bias"
        deviation = float(gain.std(correction=0) / scale)
        consumers = (*readers, *branches)
        return FoldedNorm(name=name, action="approximated", consumers=consumers, reason=reason, deviation=deviation)

    def _refusals(
        self, name: str, linear: list[LinearUse], adds: list[AddUse], has_bias: bool, scale: float
    ) -> Iterator[str | None]:
        """Why a norm cannot be folded: the first reason that there is counts."""
        yield self._refuse_norm(name)
        yield from (_refuse_use(use) for use in self.watched.uses[name] if isinstance(use, (OtherUse, OutputUse)))
        if adds and not self.approximate:
            yield f"added to the residual stream (to the output of {adds[0].branch})"
        yield from (self._refuse_reader(name, use, has_bias) for use in linear)
        if (unseen := self._unseen(self.infos[name], [use.module for use in linear])) is not None:
            yield f"{unseen} did not run on these inputs and may read it too: give fold_inputs that reach it"
        if (reader := self.watched.in_training.get(name)) is not None:
            yield f"in training mode also read by {reader}"
        yield self._refuse_residual(adds, scale) if adds else None if linear else "nothing reads it"

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

    def _refuse_norm(self, name: str) -> str | None:
        info, module = self.infos[name], self.modules[name]
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
        if has_bias and (lost := self._bias_lost(norm, use)) is not None:
            return f"its bias is not zero, and would not arrive as it is: {lost}"
        return None

    def _bias_lost(self, norm: str, use: LinearUse) -> str | None:
        """Why a bias of the norm cannot go into the bias of a layer that reads it."""
        if not use.bias_arrives:
            return f"padded, masked or scaled between the norm and {use.module}"
        last = max(u.run for u in self.watched.uses[norm] if isinstance(u, LinearUse) and u.module == use.module)
        if use.unsure and use.run == last:  # the pass with most masks
            return f"masked or padded before {use.module}: give fold_inputs that show it"
        if self.unseen_masks:
            masks = ", ".join(self.unseen_masks)
            return f"what {masks} would mask is not known: give fold_inputs with it"
        padding = getattr(self.modules[use.module], "padding", 0)
        sides = padding if isinstance(padding, tuple) else (padding,)
        zeros = getattr(self.modules[use.module], "padding_mode", "zeros") == "zeros"
        if zeros and any(side not in (0, "valid") for side in sides):
            return f"{use.module} pads with zeros"
        if use.dropout and not self.approximate:
            return f"dropout in training between the norm and {use.module}"
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
        if weight is None or type(weight) not in (nn.Parameter, Tensor) or weight.dtype not in TOLERANCES:
            return f"{name} is quantised or keeps its weight in another form ({type(weight).__name__})"
        for key, tensor in module._parameters.items():
            if tensor is not None and (others := self._tied(tensor, name)):
                return f"the {key} of {name} is tied to {others}"
        if (reader := self.watched.weight_readers.get(name)) is not None:
            return f"the weight of {name} is also read by {reader}"
        return None

    def _refuse_residual(self, adds: list[AddUse], scale: float) -> str | None:
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
            module = self.modules[following_norm]
            if is_swapped(module) and not computes_n(type(module.inner)):
                return f"{following_norm}, which reads the sum, is {module.norm_name} and does not take its scale away"
            if eps_name(module) is None:
                return f"the eps of {following_norm} cannot be set"
        return None

    def _unseen(self, info: NormInfo, readers: Iterable[str]) -> str | None:
        """A linear layer of this width that did not run, beside one that reads the norm (experts, cross-attention)."""
        for name, module in self.modules.items():
            reads = is_linear_map(module) and num_inputs(module) == info.normalized_shape[-1]
            if name in self.watched.ran or not reads:
                continue
            owner = name
            while owner and owner not in self.watched.ran:
                owner = owner.rpartition(".")[0]
            prefix = f"{owner}." if owner else ""  # the model itself ran, whatever did not
            numbered = _is_numbered(name[len(prefix) :])
            for reader in readers:
                if reader.startswith(prefix) and (numbered or not _is_numbered(reader[len(prefix) :])):
                    return name
        return None

    def protect(self) -> list[str]:
        added = set(self.added_biases)
        return [name for name, fold in self.folds.items() if fold.branches or added & set(fold.readers)]

    def result(self) -> list[FoldedNorm]:
        """The norms as decided, with what a fit lost in place of the deviation of the gain."""
        return [self._result_of_fit(norm) if norm.name in self.fitted else norm for norm in self.norms]

    def _result_of_fit(self, norm: FoldedNorm) -> FoldedNorm:
        fold = self.folds[norm.name]
        reason = "fitted to the inputs" + (f", without a bias ({fold.without_bias})" if fold.without_bias else "")
        return replace(norm, action="approximated", deviation=None, lost=fold.lost, reason=reason)

    # -- carrying it out ---------------------------------------------------------------------------------------------

    @property
    def order(self) -> list[str]:
        """The norms to fold, in the order they run."""
        return [name for name in self.watched.norm_reads if name in self.folds]

    def in_passing(self, norm: str) -> bool:
        """Whether a norm runs once in a forward pass, and before every layer that its fold changes."""
        fold, order = self.folds[norm], self.watched.ran
        later = (*fold.readers, *fold.branches, *fold.next_norms)
        once = len(self.watched.norm_reads[norm]) == self.watched.num_runs
        return once and all(order[name] > order[norm] for name in later)

    @torch.no_grad()
    def absorb(self, norm: str, change: Change) -> None:
        """Fold one norm into its readers, its branches and the eps of the norms that follow, in float64, rounded once.
        The norm itself keeps its gain and bias until `neutralize`."""
        fold = self.folds[norm]
        has_bias = bool(fold.bias.any()) or bool(fold.branch_bias.any())
        for name, columns in fold.readers.items():
            module: Any = self.modules[name]
            index = torch.tensor(columns, device=module.weight.device)
            own = index >= 0
            gain = torch.where(own, fold.gain.to(index.device)[index.clamp_min(0)], 1.0)
            shift = torch.where(own, fold.bias.to(index.device)[index.clamp_min(0)], 0.0)
            self._write(name, _Columns(module, gain, shift), has_bias, change)
        scale, branch_bias = fold.scale, fold.branch_bias
        for name in fold.branches:
            self._write(name, _Branch(scale, branch_bias), has_bias, change)
        for name in fold.next_norms:
            following = self.modules[name]
            key = eps_name(following)
            assert key is not None  # checked in _refuse_residual
            beside_std = getattr(following, "reference", "paper") == "lancopku"  # where eps is added to it
            setattr(following, key, getattr(following, key) / (scale if beside_std else scale**2))
            following.__dict__[ADJUSTED_EPS] = True

    @torch.no_grad()
    def neutralize(self, change: Change) -> None:
        """Gain 1 and bias 0 for every norm that was folded."""
        for name in self.folds:
            info, module = self.infos[name], self.modules[name]
            for key, value in ((info.gain_name, 1.0 - info.gain_offset), (info.bias_name, 0.0)):
                if key is not None and isinstance(tensor := getattr(module, key, None), Tensor):
                    change.keep(tensor)
                    tensor.fill_(value)

    def _write(self, name: str, step: _Columns | _Branch, needs_bias: bool, change: Change) -> None:
        """Give a linear layer what `step` makes of its weight and bias, a large one block by block of its rows."""
        module: Any = self.modules[name]
        weight, bias = module.weight.detach(), getattr(module, "bias", None)
        outputs = weight.shape[1] if isinstance(module, Conv1D) else weight.shape[0]
        zeros = torch.zeros(outputs, dtype=torch.float64, device=weight.device)
        old_bias = zeros if bias is None else bias.detach().double()
        self.pending[name] -= 1
        once = not self.pending[name] and name not in self.masters
        blocks = [slice(None)]
        if once and isinstance(module, nn.Linear):
            rows = max(BLOCK // weight.shape[1], 1)
            blocks = [slice(start, start + rows) for start in range(0, outputs, rows)]
        biases = []
        for block in blocks:
            part = weight[block]
            before = (part.double(), old_bias[block]) if once else self.masters.pop(name, (weight.double(), old_bias))
            after = step(*before)
            if self.pending[name]:  # another norm's fold comes
                self.masters[name] = after
            new, new_bias = (value.to(weight.dtype) for value in after)
            if not all(bool(value.sum(dtype=torch.float64).isfinite()) for value in (new, new_bias)):
                finite = bool(part.isfinite().all() and old_bias.isfinite().all())
                raise RuntimeError(
                    f"folding into {name} overflows {weight.dtype}; the model is as it was. Fold in float32"
                    if finite
                    else f"the weights of {name} are not finite: there is nothing to fold into"
                )
            change.keep(module.weight)
            part.copy_(new)
            biases.append(new_bias)
        if bias is not None:
            change.keep(bias)
            bias.copy_(torch.cat(biases))
        elif needs_bias:
            module.bias = nn.Parameter(torch.cat(biases), requires_grad=module.weight.requires_grad)
            module.__dict__[ADDED_BIAS] = True
            self.added_biases.append(name)


class _Columns:
    """(W diag(g), W b + c) for a linear layer, Conv1D (its weight is transposed) or (grouped) convolution."""

    def __init__(self, module: nn.Module, gain: Tensor, shift: Tensor) -> None:
        if not isinstance(module, (Conv1D, nn.Linear)):
            weight, groups = cast(Tensor, module.weight), int(module.groups)  # type: ignore[arg-type]
            # Output channels of group i read input channels i * width .. (i + 1) * width.
            gain, shift = (t.view(groups, -1).repeat_interleave(len(weight) // groups, 0) for t in (gain, shift))
            gain, shift = (t.view(*t.shape, *[1] * (weight.ndim - 2)) for t in (gain, shift))
        self.factor = gain[:, None] if isinstance(module, Conv1D) else gain
        self.module, self.shift = module, shift

    def __call__(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self.module, Conv1D):
            moved = self.shift @ weight
        elif isinstance(self.module, nn.Linear):
            moved = weight @ self.shift
        else:
            moved = (weight * self.shift).flatten(1).sum(1)
        return weight * self.factor, bias + moved

    def inverse(self, weight: Tensor) -> Tensor:
        """The weight as it was, but for rounding."""
        return weight / self.factor


@dataclass(frozen=True)
class _Branch:
    """(W / s, (c + b) / s)"""

    scale: float
    bias: Tensor

    def __call__(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return weight / self.scale, (bias + self.bias.to(bias.device)) / self.scale

    def inverse(self, weight: Tensor) -> Tensor:
        return weight * self.scale


def _is_numbered(path: str) -> bool:
    return any(part.isdigit() for part in path.split("."))


def comes_in(group: NormGroup) -> bool:
    """Whether the norm differs from plain N(x) and a schedule can lead from there to it."""
    return group.norm == "adanorm" and {"C": 1.0, "k": 0.1, **group.settings} != {"C": 1.0, "k": 0.0}


def eps_name(module: nn.Module) -> str | None:
    for key in ("eps", "variance_epsilon"):
        if isinstance(module.__dict__.get(key), float):
            return str(key)
    return None


def _refuse_use(use: OtherUse | OutputUse) -> str | None:
    if isinstance(use, OutputUse):
        return None if use.side else f"it is the model's output ({use.path})"
    where = f" in {use.module}" if use.module else ""
    if use.operation in ("add", "add_"):
        return f"added to the residual stream{where}"
    if use.operation.startswith(("another norm", "a linear layer")):
        return f"read by {use.operation} ({use.module})"
    return f"read by the operation {use.operation}{where}"
