"""Find out who reads the output of each norm, by watching one forward pass at the level of torch's dispatcher.

Watched tensors carry shadows through the operations (`shadows.py`). When one reaches a linear layer, its shadow shows
which column of the weight reads which channel, and whether the bias arrives unchanged. Any other reader of a watched
tensor is recorded as a use that cannot be folded, with the name of the operation.

Three kinds of tensors are watched: outputs of norms, outputs of linear layers (the branch that a residual connection
adds), and sums of the two. For a post-norm fold, the next norm must be the only reader of such a sum.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from hf_adanorm.detection import NormInfo
from hf_adanorm.running import Inputs, evaluating, first_accepted, hooked, real_rows
from hf_adanorm.state import storage_of, tensors_in

from .shadows import SHAPE_ONLY, Shadows, Source, Trace, aten

# ---------------------------------------------------------------------------------------------------- linear layers


def is_linear_map(module: nn.Module) -> bool:
    """Return whether the module is an nn.Linear, Conv1D or nn.Conv1d/2d/3d with the forward pass of that class."""
    kinds = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds)


def num_inputs(module: nn.Module) -> int:
    """Return the number of input features of a linear map (for a convolution: input channels)."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0])
    return module.in_features if isinstance(module, nn.Linear) else cast(nn.Conv1d, module).in_channels


def channel_dim(module: nn.Module, ndim: int) -> int:
    """Return the dimension of a linear map's input or output that holds its features."""
    if isinstance(module, (nn.Linear, Conv1D)):
        return ndim - 1
    return ndim - 1 - len(cast(nn.Conv1d, module).kernel_size)  # or 2d, 3d


# ---------------------------------------------------------------------------------------------------- what was seen


@dataclass(frozen=True)
class LinearUse:
    """A linear layer reads the norm."""

    module: str
    columns: tuple[int, ...]
    """The channel that each input feature reads; FOREIGN for another tensor's."""
    bias_arrives: bool
    dropout: bool
    unsure: bool


@dataclass(frozen=True)
class AddUse:
    """A residual connection adds the norm's output to the output of a linear layer."""

    branch: str
    """The linear layer."""
    total: int
    """The number of the sum."""
    dropout: bool
    branch_dropout: bool


@dataclass(frozen=True)
class OtherUse:
    """Anything else: `operation` inside `module`."""

    operation: str
    module: str


@dataclass(frozen=True)
class OutputUse:
    """The model returns the tensor, or a part of it, under `path`; `side`: as a by-product beside task outputs."""

    path: str
    side: bool


Use = LinearUse | AddUse | OtherUse | OutputUse


@dataclass
class Watched:
    """What one forward pass showed."""

    inputs: Inputs
    uses: dict[str, list[Use]] = field(default_factory=dict)
    """Per norm, in order. A norm that did not run is missing."""
    linear_calls: dict[str, list[dict[str, tuple[int, ...]]]] = field(default_factory=dict)
    """Per linear layer and call: which norms' channels its columns read."""
    ran: set[str] = field(default_factory=set)
    """The modules that ran."""
    sum_readers: dict[int, list[str]] = field(default_factory=dict)
    """Per sum: the norms that read it, and "!operation" for any other reader."""
    linear_readers: dict[str, list[str]] = field(default_factory=dict)
    """Per linear layer: the operations that read its output, "residual" for an AddUse."""
    norm_reads: dict[str, list[int]] = field(default_factory=dict)
    """Per norm and call, in the order of the first calls: the sum it read, -1 for anything else."""
    weight_readers: dict[str, str] = field(default_factory=dict)
    """Linear layers whose parameters are read outside their own forward, with the reader."""
    dtypes: set[torch.dtype] = field(default_factory=set)
    """The floating-point types of all results."""
    outputs: dict[str, Tensor] = field(default_factory=dict)
    """A sample of each output of the model, by its path."""
    norm_outputs: dict[str, list[Path]] = field(default_factory=dict)
    """Per norm, if a folder was given: a file for each call, with (rows, channels) without padding."""


def norm_rows(model: nn.Module, name: str, info: NormInfo, inputs: Mapping[str, Any], output: Tensor) -> Tensor:
    """Return a copy of a norm's output as (rows, channels), without padding."""
    if info.channels_first:
        output = output.movedim(1, -1)
    flat = output.detach().reshape(-1, math.prod(info.normalized_shape))
    real = real_rows(model, name, inputs, output.shape[: -len(info.normalized_shape)])
    return flat.clone() if real is None else flat[real.reshape(-1)]


# ------------------------------------------------------------------------------------------------ the model's output

# By-products, when a model returns other outputs beside them: they may change in a fold and are listed.
_SIDE_OUTPUTS = {"hidden_states", "encoder_hidden_states", "decoder_hidden_states", "encoder_last_hidden_state"}
_SIDE_OUTPUTS |= {"encoder_outputs", "past_key_values"}
_SAMPLE = 1 << 16  # elements of an output that are compared


def sample(output: Any) -> dict[str, Tensor]:
    """Return, by path, a flat copy of each tensor that a model returned, or of many of its elements."""
    # An odd step visits all columns of a matrix whose width is a power of two.
    return {
        path: tensor.detach().reshape(-1)[:: (tensor.numel() // _SAMPLE) | 1].clone()
        for path, tensor in named_outputs(output)
    }


def named_outputs(output: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a model's output with their paths ("logits", "text_model_output.pooler_output")."""
    if isinstance(output, Tensor):
        yield prefix or "output", output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from named_outputs(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(output, (list, tuple)):
        for index, value in enumerate(output):
            yield from named_outputs(value, f"{prefix or 'output'}.{index}")


def is_side_output(path: str) -> bool:
    """Return whether an output is a by-product: hidden states, or the output of a tower in a larger model."""
    head = path.split(".")[0]
    return head in _SIDE_OUTPUTS or head.endswith("_model_output")


# ----------------------------------------------------------------------------------------------------------- the pass


class _Watcher(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, model: nn.Module, norms: Mapping[str, NormInfo], inputs: Inputs, folder: Path | None):
        super().__init__()  # type: ignore[no-untyped-call]
        self.model, self.norms, self.folder = model, norms, folder
        self.seen = Watched(inputs=inputs)
        self.shadows = Shadows()
        self.numbers = itertools.count()
        self.muted = 0  # how many norms and linear maps are running: their own operations are not watched
        self.stack: list[str] = []
        self.own_storage = {
            storage_of(parameter): name
            for name, module in model.named_modules()
            if is_linear_map(module)
            for parameter in module.parameters(recurse=False)
        }

    def use(self, source: Source, use: Use) -> None:
        kind, name = source
        what = use.operation if isinstance(use, OtherUse) else "output"
        if kind == "norm":
            self.seen.uses.setdefault(name, []).append(use)
        elif isinstance(use, OutputUse) and use.side:
            return
        elif kind == "sum":
            self.seen.sum_readers[int(name)].append(f"!{what}")
        else:
            self.seen.linear_readers.setdefault(name, []).append(what)

    def lose(self, sources: Iterable[Source], operation: str) -> None:
        """Record that an operation into which nothing can be folded reads these sources."""
        for source in sources:
            self.use(source, OtherUse(operation, self.stack[-1] if self.stack else ""))

    def spoil(self, tensors: Iterable[Tensor], operation: str) -> None:
        """Record that an operation reads these tensors in a way that cannot be followed."""
        for tensor in tensors:
            if traces := self.shadows.of(tensor):
                self.lose(traces, operation)
            else:
                self.lose(self.shadows.aliased(tensor), f"{operation} (through an alias)")

    # -- modules -----------------------------------------------------------------------------------------------------

    def hooks(self) -> Iterator[Any]:
        """Register a pair of hooks on every module, one by one."""
        for name, module in self.model.named_modules():
            yield module.register_forward_pre_hook(
                lambda m, a, k, name=name: self.enter(name, m, (a, k)), with_kwargs=True, prepend=True
            )
            yield module.register_forward_hook(lambda m, _, out, name=name: self.leave(name, m, out))

    def enter(self, name: str, module: nn.Module, arguments: Any) -> None:
        """Note that a module starts, and what it reads if it is a norm or a linear map. Do not watch inside these."""
        self.seen.ran.add(name)
        self.stack.append(name)
        is_linear = is_linear_map(module)
        if self.muted == 0 and name in self.norms:
            self.enter_norm(name, arguments)
        elif self.muted == 0 and is_linear:
            self.enter_linear(name, module, list(tensors_in(arguments)))
        self.muted += name in self.norms or is_linear

    def leave(self, name: str, module: nn.Module, output: Any) -> None:
        self.stack.pop()
        self.muted -= name in self.norms or is_linear_map(module)
        if self.muted or not isinstance(output, Tensor):
            return
        if (info := self.norms.get(name)) is not None:
            channel = torch.arange(math.prod(info.normalized_shape), device=output.device)
            shape = (-1, *[1] * (output.ndim - 2)) if info.channels_first else info.normalized_shape
            self.shadows.begin(output, ("norm", name), channel.view(shape))
            self.seen.uses.setdefault(name, [])
            if self.folder is not None:
                self.muted += 1
                file = self.folder / f"{next(self.numbers)}.safetensors"
                rows = norm_rows(self.model, name, info, self.seen.inputs.values, output)
                save_file({"rows": rows.contiguous()}, file)
                self.seen.norm_outputs.setdefault(name, []).append(file)
                self.muted -= 1
        elif is_linear_map(module):
            dim = channel_dim(module, output.ndim)
            channel = torch.arange(output.shape[dim], device=output.device)
            self.shadows.begin(output, ("linear", name), channel.view(-1, *[1] * (output.ndim - 1 - dim)))

    def enter_norm(self, name: str, arguments: Any) -> None:
        """Note which watched sum a norm reads, or -1. Any other watched tensor that it reads cannot be folded."""
        read = -1
        for tensor in tensors_in(arguments):
            traces = self.shadows.of(tensor)
            if not traces:  # it may share the memory of a watched one
                self.spoil([tensor], "another norm")
            for source, trace in traces.items():
                if source[0] == "sum" and trace.whole() and not trace.unsure:
                    read = int(source[1])
                    self.seen.sum_readers[read].append(name)
                else:
                    self.use(source, OtherUse("another norm", name))
        self.seen.norm_reads.setdefault(name, []).append(read)

    def enter_linear(self, name: str, module: nn.Module, inputs: list[Tensor]) -> None:
        call: dict[str, tuple[int, ...]] = {}
        for tensor in inputs:
            if not self.shadows.of(tensor):
                self.spoil([tensor], "a linear layer")
            for source, trace in self.shadows.of(tensor).items():
                if not tensor.numel():
                    self.use(source, OtherUse("a linear layer that got no rows, which shows nothing", name))
                    continue
                dim = channel_dim(module, tensor.ndim)
                columns = trace.columns(dim) if len(inputs) == 1 and dim >= 0 else None
                if columns is None or len(columns) != num_inputs(module):
                    self.use(source, OtherUse("a linear layer that mixes its channels", name))
                elif source[0] == "norm":
                    call[source[1]] = columns
                    facts = (trace.biases_arrive(), trace.dropout, trace.unsure)
                    self.use(source, LinearUse(name, columns, *facts))
                else:
                    self.use(source, OtherUse("a linear layer", name))
        self.seen.linear_calls.setdefault(name, []).append(call)

    # -- operations --------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, follow the watched tensors that it reads, and note reads of a linear map's weight."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        # A single number, such as a scale, says nothing about the precision of the model.
        self.seen.dtypes.update(t.dtype for t in tensors_in(out) if t.is_floating_point() and t.numel() > 1)
        if self.muted or func.overloadpacket in SHAPE_ONLY:
            return out
        inputs = list(tensors_in((args, kwargs)))
        for tensor in inputs:
            owner = self.own_storage.get(storage_of(tensor))
            if owner is not None:
                where = repr(self.stack[-1]) if self.stack and self.stack[-1] else "the model's own forward"
                self.seen.weight_readers.setdefault(owner, f"{func.overloadpacket.__name__} in {where}")
        if not any(map(self.shadows.touches, inputs)):
            return out
        lost = self.shadows.follow(func, args, kwargs, out, inputs)
        may_be_residual = func.overloadpacket is aten.add and not kwargs and len(args) == len(inputs) == 2
        if lost is not None:
            self.lose(lost, func.overloadpacket.__name__)
        elif not (may_be_residual and self.add(inputs, out)):
            self.spoil(inputs, func.overloadpacket.__name__)
        return out

    def add(self, inputs: list[Tensor], out: Tensor) -> bool:
        """Record a residual connection: a norm's output plus a linear layer's. Return whether this sum is one."""
        found = sorted(((s, t) for x in inputs for s, t in self.shadows.of(x).items()), key=lambda pair: pair[0])
        if [kind for (kind, _), _ in found] != ["linear", "norm"] or not all(map(self.shadows.of, inputs)):
            return False
        (other, branch_trace), (source, trace) = found
        whole = all(t.whole() and not t.unsure for t in (trace, branch_trace))
        if not whole or not torch.equal(trace.channel, branch_trace.channel):  # also if one is broadcast
            return False
        total = len(self.seen.sum_readers)
        self.use(source, AddUse(other[1], total, trace.dropout, branch_trace.dropout))
        self.use(other, OtherUse("residual", ""))
        self.seen.sum_readers[total] = []
        self.shadows.add(out, {("sum", str(total)): Trace(trace.channel, trace.factor)})
        return True

    def outputs(self, output: Any) -> None:
        """Record what the model returns, and keep a sample of it."""
        self.muted += 1
        found = dict(named_outputs(output))
        has_task = not all(map(is_side_output, found))
        for path, tensor in found.items():
            for source in self.shadows.of(tensor):
                self.use(source, OutputUse(path, has_task and is_side_output(path)))
            if not self.shadows.of(tensor):
                self.spoil([tensor], "the model's output")
        self.seen.outputs = sample(output)


class _SeeDropout(TorchFunctionMode):
    """Notice dropout one level above the dispatcher, which it never reaches in evaluation mode."""

    def __init__(self, watcher: _Watcher):
        super().__init__()
        self.watcher = watcher

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if "dropout" not in name:
            return out
        given = args[0] if args else kwargs["input"]
        rate = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
        if "alpha" in name:
            self.watcher.spoil([given], name)  # not linear in training
        elif rate and (found := self.watcher.shadows.of(given)):
            out = out.view_as(out)  # a tensor of its own, so that other readers of `given` stay free of the mark
            self.watcher.shadows.add(out, {source: replace(trace, dropout=True) for source, trace in found.items()})
        return out


def watch(
    model: nn.Module, norms: Mapping[str, NormInfo], given: Mapping[str, Any] | None, folder: Path | None = None
) -> Watched:
    """Run `model` once in evaluation mode, and record every reader of every norm's output.

    Padding masks are added to the inputs, as what is masked matters for biases. The state of the model stays the same.

    Args:
        model: any module.
        norms: each norm to watch, by its name in `model.named_modules()`.
        given: keyword arguments of the forward pass; None for inputs made from the model's config.
        folder: where to save the outputs of the norms for a fit. Hidden states are then not asked for.

    Raises:
        ValueError: the model does not run on the inputs.
    """

    def run(inputs: Inputs) -> Watched:
        watcher = _Watcher(model, norms, inputs, folder)
        try:
            with evaluating(model), hooked(watcher.hooks()), _SeeDropout(watcher), watcher:
                watcher.outputs(model(**inputs.values))
        finally:  # each shadow refers to all others: large tensors would stay until the garbage collector runs
            watcher.shadows.clear()
        return watcher.seen

    return first_accepted(model, given, run, hidden_states=folder is None)
