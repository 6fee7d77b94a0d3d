"""Decide for every norm whether it can be folded and into which layers, before any weight changes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hf_adanorm.detection import NormInfo
from hf_adanorm.modeling_adanorm import is_swapped
from hf_adanorm.norms import computes_n, settings_of

from .options import Fold
from .watch import AddUse, LinearUse, OtherUse, OutputUse, Use, Watched, is_linear_map, num_inputs

# The types of weights that can be folded into, and how far the outputs may move by rounding.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
EXACT = 1e-7  # a gain that deviates from its mean by no more than this counts as constant


@dataclass(frozen=True, kw_only=True)
class FoldedNorm:
    """What a fold did to one norm."""

    name: str
    """Its name in the model."""
    action: Literal["folded", "approximated", "kept", "nothing to fold"]
    """What became of it."""
    consumers: tuple[str, ...] = ()
    """The linear layers that took the gain and the bias."""
    reason: str = ""
    """Why it was kept, or how it was approximated."""
    deviation: float | None = None
    """Standard deviation of the gain over its mean; an approximated fold drops it on the residual path."""
    lost: float | None = None
    """Share of the variation of the norm's output (0..1) that a fitted fold does not reproduce."""


@dataclass
class Step:
    """The fold of one norm."""

    gain: Tensor
    """float64, flat; folded into the readers, as the bias is."""
    bias: Tensor
    branch_bias: Tensor
    """float64, flat; added to the biases of the branches before the division."""
    readers: dict[str, tuple[int, ...]]
    """The channel that each column of a linear layer reads."""
    branches: tuple[str, ...] = ()
    """Linear layers whose output is added to that of the norm. Their weights are divided by `scale`."""
    scale: float = 1.0
    next_norms: tuple[str, ...] = ()
    """Norms that read the sum. Their eps is adjusted to the scale."""
    without_bias: str = ""
    """Why the readers cannot take a bias, or "". A fit then fits gains only."""
    lost: float = 0.0


class FoldPlan:
    """What a fold will do: `steps` by norm, in the order of their calls, and the decision on each norm in `norms`.

    Args:
        model: with heads untied, if the fold unties them.
        infos: every norm of the model, by name.
        watched: what a forward pass showed.
        names: the norms to fold.
        options: `"approximate"` folds the mean gain of residual norms. `"calibrate"` does so, too, and fits gains and
            biases from the first norm whose fold is not exact.
        moving: norms that become something else than N(x).
    """

    def __init__(
        self,
        model: nn.Module,
        infos: Mapping[str, NormInfo],
        watched: Watched,
        names: Collection[str],
        options: Fold,
        moving: Collection[str],
    ) -> None:
        self.model, self.infos, self.watched = model, infos, watched
        self.modules: dict[str, nn.Module] = dict(model.named_modules())
        self._approximate, self._moving = options.unfoldable in ("approximate", "calibrate"), moving
        self._owners: dict[int, set[str]] = defaultdict(set)
        for name, module in self.modules.items():
            for parameter in module.parameters(recurse=False):
                self._owners[parameter.data_ptr()].add(name)
        steps: dict[str, Step] = {}
        self.norms = [self._decide(name, steps) for name in names]
        self.steps = {name: steps[name] for name in watched.norm_reads if name in steps}
        inexact = {norm.name for norm in self.norms if norm.name in moving or (norm.deviation or 0.0) >= EXACT}
        order = list(self.steps)
        first = next((at for at, name in enumerate(order) if name in inexact), len(order))
        self.fitted = order[first:] if options.unfoldable == "calibrate" else []  # what comes before needs no fit

    @property
    def is_exact(self) -> bool:
        """Whether the outputs must not change."""
        return not self.fitted and all((norm.deviation or 0.0) < EXACT for norm in self.norms)

    def result(self) -> tuple[FoldedNorm, ...]:
        """Return the norms as decided, with what a fit lost in place of the deviation of the gain."""
        norms = {norm.name: norm for norm in self.norms}
        for name in self.fitted:
            step = self.steps[name]
            reason = "fitted to the inputs" + (f", without a bias ({step.without_bias})" if step.without_bias else "")
            norms[name] = replace(norms[name], action="approximated", deviation=None, lost=step.lost, reason=reason)
        return tuple(norms.values())

    # -- decisions ---------------------------------------------------------------------------------------------------

    def _decide(self, name: str, steps: dict[str, Step]) -> FoldedNorm:
        gain, bias = _affine(self.modules[name], self.infos[name])
        has_bias, scale = bool(bias.any()), float(gain.mean())
        if bool((gain == 1).all()) and not has_bias and name not in self._moving:
            return FoldedNorm(name=name, action="nothing to fold", reason="gain is 1 and bias is 0")
        uses = self.watched.uses.get(name, [])
        linear = [use for use in uses if isinstance(use, LinearUse)]
        adds = [use for use in uses if isinstance(use, AddUse)]
        if refusal := next(self._refuse(name, linear, adds, has_bias, scale), ""):
            return FoldedNorm(name=name, action="kept", reason=refusal)
        step = steps[name] = Step(gain, bias, branch_bias=bias, readers={use.module: use.columns for use in linear})
        step.without_bias = next((lost for use in linear for lost in self._bias_lost(use)), "")
        if not adds:
            if not (has_bias and any(use.dropout for use in linear)):
                return FoldedNorm(name=name, action="folded", consumers=tuple(step.readers))
            reason, deviation = "exact except for dropout, which in training no longer acts on the bias", 0.0
        else:
            step.branches = tuple(dict.fromkeys(use.branch for use in adds))
            step.next_norms = tuple(dict.fromkeys(n for use in adds for n in self.watched.sum_readers[use.total]))
            step.scale = scale
            reason = "residual: mean of the gain and the bias into " + ", ".join(step.branches)
            if has_bias and any(use.dropout or use.branch_dropout for use in adds):
                reason += "; in training dropout acts on the folded bias"
            deviation = float(gain.std(correction=0) / scale)
        consumers = (*step.readers, *step.branches)
        return FoldedNorm(name=name, action="approximated", consumers=consumers, reason=reason, deviation=deviation)

    # Each of the following yields reasons against a fold. The first one counts, and nothing after it is computed.

    def _refuse(
        self, name: str, linear: list[LinearUse], adds: list[AddUse], has_bias: bool, scale: float
    ) -> Iterator[str]:
        info, module = self.infos[name], self.modules[name]
        if parametrize.is_parametrized(module):
            yield "its gain or bias is parametrized"
        if wrapper := self._adapter_around(name):
            yield f"trained by an adapter (in {wrapper}), whose gain the base must not get: merge or unload it first"
        if info.inside:
            yield f"part of the conditioned norm {info.inside}"
        if name not in self.watched.uses:
            yield "did not run on these inputs: pass inputs that reach it"
        for key in filter(None, (info.gain_name, info.bias_name)):
            if others := self._tied(getattr(module, key), name):
                yield f"its {key} is shared with {others}"
        yield from filter(None, map(_refuse_use, self.watched.uses[name]))
        if adds and not self._approximate:
            yield f"added to the residual stream (to the output of {adds[0].branch})"
        for use in linear:
            yield from self._refuse_reader(name, use, has_bias)
        if unseen := self._unseen(info, [use.module for use in linear]):
            yield f"{unseen} did not run on these inputs and may read it too: pass inputs that reach it"
        if adds:
            yield from self._refuse_residual(adds, scale)
        elif not linear:
            yield "nothing reads it"

    def _adapter_around(self, name: str) -> str:
        """Return the wrapper of PEFT that holds `name` beside an adapter's copy of it or addition to it, or "".

        The adapter can be switched off."""
        while name:
            name = name.rpartition(".")[0]
            if {"base_layer", "original_module"} & self.modules[name]._modules.keys():
                return name or type(self.model).__name__
        return ""

    def _tied(self, tensor: Tensor, name: str) -> str:
        return ", ".join(sorted(self._owners.get(tensor.data_ptr(), set()) - {name}))

    def _refuse_reader(self, norm: str, use: LinearUse, has_bias: bool) -> Iterator[str]:
        yield from self._refuse_linear(use.module)
        for call in self.watched.linear_calls[use.module]:
            if call.get(norm) != use.columns:
                others = [f"the norm {other}" for other in sorted(call) if other != norm]
                what = others[0] if others else "something that is not this norm's output"
                yield f"{use.module} also reads {what}"
        for lost in self._bias_lost(use) if has_bias else ():
            yield f"its bias is not zero, and would not arrive as it is: {lost}"

    def _bias_lost(self, use: LinearUse) -> Iterator[str]:
        """Yield why a bias of the norm cannot go into the bias of a layer that reads it."""
        if not use.bias_arrives:
            yield f"padded, masked or scaled between the norm and {use.module}"
        if use.unsure:
            yield f"masked or padded before {use.module}: pass inputs that show it"
        if masks := self.watched.inputs.unseen_masks:
            yield f"what {', '.join(masks)} would mask is not known: pass inputs with it"
        module: Any = self.modules[use.module]
        if getattr(module, "padding_mode", "") == "zeros" and module.padding != "valid" and any(module.padding):
            yield f"{use.module} pads with zeros"
        if use.dropout and not self._approximate:
            yield f"dropout in training between the norm and {use.module}"

    def _refuse_linear(self, name: str) -> Iterator[str]:
        module = self.modules[name]
        if parametrize.is_parametrized(module) or "weight" not in module._parameters:
            yield f"{name} is parametrized, its weight is computed from others"
        if self._adapter_around(name) or any(part.startswith("lora_") for part in name.split(".")):
            yield f"{name} belongs to an adapter: merge it first"
        weight = module._parameters["weight"]
        if weight is None or type(weight) not in (nn.Parameter, Tensor) or weight.dtype not in TOLERANCES:
            yield f"{name} is quantized or keeps its weight in another form ({type(weight).__name__})"
        for key, tensor in module.named_parameters(recurse=False):
            if others := self._tied(tensor, name):
                yield f"the {key} of {name} is tied to {others}"
        if (reader := self.watched.weight_readers.get(name)) is not None:
            yield f"the weight of {name} is also read by {reader}"

    def _refuse_residual(self, adds: list[AddUse], scale: float) -> Iterator[str]:
        if scale <= 0:
            yield f"the mean of its gain is {scale:.3g}, and dividing by it needs it positive"
        sums = {use.total for use in adds}
        for use in adds:
            yield from (f"the branch it is added to: {refusal}" for refusal in self._refuse_linear(use.branch))
            readers = self.watched.linear_readers.get(use.branch, [])
            if readers != ["residual"] * sum(other.branch == use.branch for other in adds):
                yield f"the output of {use.branch} is read by more than this residual connection"
            following = self.watched.sum_readers[use.total]
            if not following or any(reader.startswith("!") for reader in following):
                what = following[0].lstrip("!") if following else "nothing"
                yield f"the sum with {use.branch} goes on in the residual stream ({what}), not only into a norm"
        for following_norm in {n for total in sums for n in self.watched.sum_readers[total]}:
            if not sums.issuperset(self.watched.norm_reads[following_norm]):
                yield f"{following_norm} also reads something else than this norm's residual sum"
            module = self.modules[following_norm]
            if is_swapped(module) and not computes_n(type(module.inner)):
                yield f"{following_norm}, which reads the sum, is {module.norm_name} and does not take its scale away"
            if eps_name(module) is None:
                yield f"the eps of {following_norm} cannot be set"

    def _unseen(self, info: NormInfo, readers: Iterable[str]) -> str:
        """Return a linear layer of this width that did not run, next to a reader of the norm (experts,
        cross-attention), or ""."""
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
        return ""


def by_column(columns: Sequence[int], gain: Tensor, bias: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return gain and bias of each column of a layer: 1 and 0 where it reads another tensor than the norm's output."""
    index = torch.tensor(columns, device=gain.device)
    reads, channel = index >= 0, index.clamp_min(0)
    return torch.where(reads, gain[channel], 1.0).to(device), torch.where(reads, bias[channel], 0.0).to(device)


def _affine(module: nn.Module, info: NormInfo) -> tuple[Tensor, Tensor]:
    """Return gain and bias in effect, float64, flat."""
    width = torch.Size(info.normalized_shape).numel()
    device = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    gain = torch.ones(width, dtype=torch.float64, device=device)
    bias = torch.zeros(width, dtype=torch.float64, device=device)
    if info.gain_name:
        gain = getattr(module, info.gain_name).detach().double().flatten() + info.gain_offset
    if info.bias_name:
        bias = getattr(module, info.bias_name).detach().double().flatten()
    return gain, bias


def _refuse_use(use: Use) -> str:
    """Return why a use of the norm's output keeps it from being folded, or ""."""
    if isinstance(use, OutputUse):
        return "" if use.side else f"it is the model's output ({use.path})"
    if not isinstance(use, OtherUse):
        return ""
    where = f" in {use.module}" if use.module else ""
    if use.operation in ("add", "add_"):
        return f"added to the residual stream{where}"
    if use.operation.startswith(("another norm", "a linear layer")):
        return f"read by {use.operation} ({use.module})"
    return f"read by the operation {use.operation}{where}"


def _is_numbered(path: str) -> bool:
    return any(part.isdigit() for part in path.split("."))


def is_plain(cls: type, settings: Mapping[str, Any]) -> bool:
    """Return whether a norm of this class with these settings is N(x), as the class declares."""
    plain = getattr(cls, "plain_settings", None)
    return plain is not None and {**settings_of(cls), **settings}.items() >= plain.items()


def eps_name(module: nn.Module) -> str | None:
    """Return the attribute in which a norm keeps its eps, or None."""
    return next((key for key in ("eps", "variance_epsilon") if isinstance(module.__dict__.get(key), float)), None)
