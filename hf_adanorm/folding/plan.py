"""Decide for every norm whether it can be folded and into which layers, before any weight changes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hf_adanorm.detection import NormInfo
from hf_adanorm.modeling_adanorm import is_swapped
from hf_adanorm.norms import computes_n, settings_of

from .shadows import FOREIGN
from .watch import AddUse, LinearUse, OtherUse, OutputUse, Watched, is_linear_map, num_inputs

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
    readers: dict[str, tuple[int, ...]]
    """The channel that each column of a linear layer reads."""
    branches: tuple[str, ...] = ()
    """Linear layers whose output is added to that of the norm. Their weights are divided by `scale`."""
    branch_bias: Tensor | None = None
    """float64, flat; added to the biases of the branches before the division."""
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
        approximate: whether to fold the mean gain of residual norms.
        calibrate: whether to fit gains and biases, from the first norm whose fold is not exact.
        moving: norms that become something else than N(x).
    """

    def __init__(
        self,
        model: nn.Module,
        infos: Mapping[str, NormInfo],
        watched: Watched,
        names: Collection[str],
        *,
        approximate: bool,
        calibrate: bool,
        moving: Collection[str],
    ) -> None:
        self.model, self.infos, self.watched = model, infos, watched
        self.modules: dict[str, nn.Module] = dict(model.named_modules())
        self._approximate, self._moving = approximate, moving
        self._owners: dict[int, set[str]] = {}
        for name, module in self.modules.items():
            for parameter in module.parameters(recurse=False):
                self._owners.setdefault(parameter.data_ptr(), set()).add(name)
        steps: dict[str, Step] = {}
        self.norms = [self._decide(name, steps) for name in names]
        self.steps = {name: steps[name] for name in watched.norm_reads if name in steps}
        inexact = {norm.name for norm in self.norms if norm.name in moving or (norm.deviation or 0.0) >= EXACT}
        order = list(self.steps)
        first = next((at for at, name in enumerate(order) if name in inexact), len(order))
        self.fitted = order[first:] if calibrate else []  # before the first one, nothing needs a fit

    @property
    def is_exact(self) -> bool:
        """Whether the outputs must not change."""
        return not self.fitted and all((norm.deviation or 0.0) < EXACT for norm in self.norms)

    def changed(self) -> tuple[str, ...]:
        """Return the norms whose fold adds a bias to a layer that lacked one, or adjusts an eps."""

        def adds_bias(step: Step) -> bool:
            return bool(step.bias.any()) and any(getattr(self.modules[n], "bias", None) is None for n in step.readers)

        return tuple(name for name, step in self.steps.items() if step.branches or adds_bias(step))

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
        if not bool(gain.isfinite().all() and bias.isfinite().all()):
            raise ValueError(f"the gain or bias of {name} is not finite: there is nothing to fold it into")
        has_bias, scale = bool(bias.any()), float(gain.mean())
        if bool((gain == 1).all()) and not has_bias and name not in self._moving:
            return FoldedNorm(name=name, action="nothing to fold", reason="gain is 1 and bias is 0")
        uses = self.watched.uses.get(name, [])
        linear = [use for use in uses if isinstance(use, LinearUse)]
        adds = [use for use in uses if isinstance(use, AddUse)]
        refusal = next(filter(None, self._refusals(name, linear, adds, has_bias, scale)), None)
        if refusal is not None:
            return FoldedNorm(name=name, action="kept", reason=refusal)
        step = steps[name] = Step(gain, bias, {use.module: use.columns for use in linear})
        step.without_bias = next(filter(None, (self._bias_lost(use) for use in linear)), "")
        if not adds:
            if not (has_bias and any(use.dropout for use in linear)):
                return FoldedNorm(name=name, action="folded", consumers=tuple(step.readers))
            reason, deviation = "exact but for dropout, which in training no longer acts on the bias", 0.0
        else:
            step.branches = tuple(dict.fromkeys(use.branch for use in adds))
            step.next_norms = tuple(dict.fromkeys(n for use in adds for n in self.watched.sum_readers[use.total]))
            step.branch_bias, step.scale = bias, scale
            reason = "residual: mean of the gain and the bias into " + ", ".join(step.branches)
            if has_bias and any(use.dropout or use.branch_dropout for use in adds):
                reason += "; in training dropout acts on the folded bias"
            deviation = float(gain.std(correction=0) / scale)
        consumers = (*step.readers, *step.branches)
        return FoldedNorm(name=name, action="approximated", consumers=consumers, reason=reason, deviation=deviation)

    def _refusals(
        self, name: str, linear: list[LinearUse], adds: list[AddUse], has_bias: bool, scale: float
    ) -> Iterator[str | None]:
        """Yield each reason why a norm cannot be folded, or None where it does not apply. The first reason counts."""
        yield self._refuse_norm(name)
        yield from (_refuse_use(use) for use in self.watched.uses[name] if isinstance(use, (OtherUse, OutputUse)))
        if adds and not self._approximate:
            yield f"added to the residual stream (to the output of {adds[0].branch})"
        yield from (self._refuse_reader(name, use, has_bias) for use in linear)
        if (unseen := self._unseen(self.infos[name], [use.module for use in linear])) is not None:
            yield f"{unseen} did not run on these inputs and may read it too: pass inputs that reach it"
        yield self._refuse_residual(adds, scale) if adds else None if linear else "nothing reads it"

    def _refuse_norm(self, name: str) -> str | None:
        info, module = self.infos[name], self.modules[name]
        if parametrize.is_parametrized(module):
            return "its gain or bias is parametrized"
        if (wrapper := self._adapter_around(name)) is not None:
            return f"trained by an adapter (in {wrapper}), whose gain the base must not get: merge or unload it first"
        if info.inside:
            return f"part of the conditioned norm {info.inside}"
        if name not in self.watched.uses:
            return "did not run on these inputs: pass inputs that reach it"
        for key in (info.gain_name, info.bias_name):
            tensor = getattr(module, key, None) if key else None
            if isinstance(tensor, Tensor) and (others := self._tied(tensor, name)):
                return f"its {key} is shared with {others}"
        return None if self.watched.uses[name] else "nothing reads it"

    def _adapter_around(self, name: str) -> str | None:
        """Return the wrapper of PEFT that holds `name` beside an adapter's copy of it or addition to it, or None.

        The adapter can be switched off."""
        while name:
            name = name.rpartition(".")[0]
            if {"base_layer", "original_module"} & self.modules[name]._modules.keys():
                return name or type(self.model).__name__
        return None

    def _tied(self, tensor: Tensor, name: str) -> str:
        module = self.modules[name]
        others = self._owners.get(tensor.data_ptr(), set())
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
        if has_bias and (lost := self._bias_lost(use)) is not None:
            return f"its bias is not zero, and would not arrive as it is: {lost}"
        return None

    def _bias_lost(self, use: LinearUse) -> str | None:
        """Return why a bias of the norm cannot go into the bias of a layer that reads it, or None."""
        if not use.bias_arrives:
            return f"padded, masked or scaled between the norm and {use.module}"
        if use.unsure:
            return f"masked or padded before {use.module}: pass inputs that show it"
        if self.watched.inputs.unseen_masks:
            masks = ", ".join(self.watched.inputs.unseen_masks)
            return f"what {masks} would mask is not known: pass inputs with it"
        padding = getattr(self.modules[use.module], "padding", 0)
        sides = padding if isinstance(padding, tuple) else (padding,)
        zeros = getattr(self.modules[use.module], "padding_mode", "zeros") == "zeros"
        if zeros and any(side not in (0, "valid") for side in sides):
            return f"{use.module} pads with zeros"
        if use.dropout and not self._approximate:
            return f"dropout in training between the norm and {use.module}"
        return None

    def _refuse_linear(self, name: str) -> str | None:
        """Return why the weights of a linear layer may not be changed, or None."""
        module = self.modules[name]
        if parametrize.is_parametrized(module) or "weight" not in module._parameters:
            return f"{name} is parametrized, its weight is computed from others"
        if self._adapter_around(name) is not None or any(part.startswith("lora_") for part in name.split(".")):
            return f"{name} belongs to an adapter: merge it first"
        weight = module._parameters["weight"]
        if weight is None or type(weight) not in (nn.Parameter, Tensor) or weight.dtype not in TOLERANCES:
            return f"{name} is quantized or keeps its weight in another form ({type(weight).__name__})"
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
        """Return a linear layer of this width that did not run, next to a reader of the norm (experts,
        cross-attention), or None."""
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


def _refuse_use(use: OtherUse | OutputUse) -> str | None:
    if isinstance(use, OutputUse):
        return None if use.side else f"it is the model's output ({use.path})"
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
    return plain is not None and {**settings_of(cls), **settings, **plain} == {**settings_of(cls), **settings}


def eps_name(module: nn.Module) -> str | None:
    """Return the attribute in which a norm keeps its eps, or None."""
    keys = ("eps", "variance_epsilon")
    return next((key for key in keys if isinstance(module.__dict__.get(key), float)), None)
