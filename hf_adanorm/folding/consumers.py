"""Who reads a norm's output: found by watching one forward pass at the level of torch's dispatcher.

Every element of a watched output carries two shadows: the channel it belongs to, and the factor with which that
channel's bias would arrive there (1 at first). Operations that only move elements (views, slices, permutes, gathers,
concatenation) or that are linear along every single channel (padding, masks, means over positions) are applied to the
shadows as well, so when the tensor reaches a linear layer the shadows say which column of its weight reads which
channel, and whether the bias arrives unchanged. Anything else that reads a watched tensor is recorded as a use that
cannot be folded, with the operation's name.

Three kinds of tensors are watched: outputs of norms, outputs of linear layers (the branch that a residual connection
adds), and sums of the two (which must go into the next norm and nowhere else for a post-norm fold).
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from hf_adanorm.running import evaluating, hooked
from hf_adanorm.swapping import unchanged

PADDING, FOREIGN = -1, -2  # channel numbers of zeros that were put in, and of elements from elsewhere

aten = torch.ops.aten
# One tensor in, the same elements out: replayed on the shadows as they are.
_MOVES = {
    aten.permute, aten.transpose, aten.t, aten.numpy_T, aten.expand, aten.unsqueeze, aten.squeeze, aten.slice,
    aten.select, aten.split, aten.split_with_sizes, aten.unbind, aten.chunk, aten.index_select, aten.gather,
    aten.index, aten.roll, aten.flip, aten.repeat, aten.narrow, aten.movedim, aten.unfold, aten.masked_select,
    aten.repeat_interleave,
}  # fmt: skip
_RESHAPES = {
    aten.view,
    aten._unsafe_view,
    aten.reshape,
    aten._reshape_alias,
    aten._reshape_copy,
    aten.flatten,
}
_SAME = {aten.clone, aten.detach, aten.alias, aten._to_copy, aten.contiguous, aten.lift_fresh}
# Read the shape, not the values.
_SHAPE_ONLY = {
    aten.zeros_like, aten.ones_like, aten.empty_like, aten.full_like, aten.rand_like, aten.randn_like, aten.new_zeros,
    aten.new_ones, aten.new_empty, aten.new_full, aten.new_empty_strided, aten.sym_size, aten.sym_stride,
    aten.sym_numel, aten.size, aten.stride, aten.is_contiguous, aten.sym_storage_offset,
}  # fmt: skip
# Fields of a model's output that are by-products when it has others: they may change in a fold and are listed.
SIDE_OUTPUTS = {
    "hidden_states",
    "encoder_hidden_states",
    "decoder_hidden_states",
    "encoder_last_hidden_state",
}


@dataclass(frozen=True)
class Trace:
    """Where the elements of a tensor come from, seen from one source."""

    channel: Tensor
    """int64, the tensor's shape: flat index within the source's channels, PADDING or FOREIGN."""
    factor: Tensor
    """float64, the tensor's shape: how often the channel's bias arrives here (1: unchanged)."""
    dropout: bool = False
    """A dropout layer (idle while watching) stands between."""
    unsure: bool = False
    """Multiplied by ones, filled or padded nowhere: what masked and padded nothing while watching says nothing."""

    def whole(self) -> bool:
        """Whether every bias arrives as it is."""
        return bool((_thin(self.factor) == 1).all())


@dataclass(frozen=True)
class LinearUse:
    """A linear layer reads the norm; `columns[j]` is the channel that input feature j reads (FOREIGN: another
    tensor's)."""

    module: str
    columns: tuple[int, ...]
    bias_arrives: bool
    dropout: bool
    unsure: bool
    run: int = 1
    """In which forward pass, counted from 1."""


@dataclass(frozen=True)
class AddUse:
    """A residual connection adds the norm's output to the output of the linear layer `branch`; `total` names the
    sum."""

    branch: str
    total: int
    dropout: bool
    branch_dropout: bool


@dataclass(frozen=True)
class OtherUse:
    """Anything else: `operation` inside `module`."""

    operation: str
    module: str


@dataclass(frozen=True)
class OutputUse:
    """The tensor is (part of) what the model returns, under `path`; `side`: a by-product beside task outputs."""

    path: str
    side: bool


Use = LinearUse | AddUse | OtherUse | OutputUse
Source = tuple[str, str]  # ("norm" | "linear" | "sum", name)


@dataclass
class Watched:
    """What the forward passes showed."""

    uses: dict[str, list[Use]]
    """Per norm, in order. A norm that did not run is missing."""
    linear_calls: dict[str, list[dict[str, tuple[int, ...]]]]
    """Per linear layer and call: which norms' channels its columns read."""
    ran: dict[str, int]
    """The modules that ran, numbered in the order of their first call."""
    sum_readers: dict[int, list[str]] = field(default_factory=dict)
    """Per sum: norms that read it; anything else that does appears as "!operation"."""
    linear_readers: dict[str, list[str]] = field(default_factory=dict)
    """Per linear layer (with `follow_sums`): the operations that read its output, "residual" for an AddUse."""
    norm_reads: dict[str, list[int]] = field(default_factory=dict)
    """Per norm and call: the sum it read, -1 for anything else."""
    weight_readers: dict[str, str] = field(default_factory=dict)
    """Linear layers whose parameters are read outside their own forward, and by what."""
    outputs: Any = None
    """Of the first pass."""
    num_runs: int = 0
    in_training: dict[str, str] = field(default_factory=dict)
    """Per norm: what reads it in training mode only."""


def is_linear_map(module: nn.Module) -> bool:
    """nn.Linear, Conv1D and nn.Conv1d/2d/3d, and subclasses that leave the forward pass alone."""
    forward = type(module).forward
    return any(
        isinstance(module, kind) and forward is kind.forward
        for kind in (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    )


def num_inputs(module: nn.Module) -> int:
    """Input features of a linear map (for a convolution: input channels)."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0])
    return int(module.in_features if isinstance(module, nn.Linear) else module.in_channels)  # type: ignore[arg-type]


def _channel_dim(module: nn.Module, ndim: int) -> int:
    """The dimension of a linear map's input (or output) that holds its features."""
    if isinstance(module, (nn.Linear, Conv1D)):
        return ndim - 1
    spatial = len(module.kernel_size)  # type: ignore[arg-type]
    return ndim - 1 - spatial


def _storage(tensor: Tensor) -> int:
    """Where the tensor's memory begins; 0 if it has none."""
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


def _thin(shadow: Tensor, keep: int | None = None) -> Tensor:
    """A shadow without the repetitions of an expanded one (but along the dimension `keep`), which are most of it."""
    for dim, stride in enumerate(shadow.stride()):
        if stride == 0 and dim != keep:
            shadow = shadow.narrow(dim, 0, min(shadow.shape[dim], 1))
    return shadow


def _columns(trace: Trace, dim: int) -> tuple[int, ...] | None:
    """The channel of every index along `dim`, or None where one index mixes several."""
    channel = _thin(trace.channel, dim)
    channel = channel.movedim(dim, -1).flatten(0, -2) if channel.ndim > 1 else channel[None]
    high = channel.amax(0)
    low = torch.where(channel == PADDING, high, channel).amin(0)
    return tuple(high.tolist()) if torch.equal(low, high) else None


class _Watcher(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, model: nn.Module, norms: Mapping[str, tuple[tuple[int, ...], bool]], follow_sums: bool):
        super().__init__()  # type: ignore[no-untyped-call]
        self.model, self.follow_sums = model, follow_sums
        self.norms = {name: shape for name, (shape, _) in norms.items()}
        self.channel_dims = {name: 1 if channels_first else -1 for name, (_, channels_first) in norms.items()}
        self.seen = Watched(uses={}, linear_calls={}, ran={})
        # By id; a tensor that is gone takes its shadows with it.
        self.traces: dict[int, tuple[weakref.ref[Tensor], dict[Source, Trace]]] = {}
        self.storages: set[int] = set()
        self.muted = 0
        self.stack: list[str] = []
        self.num_sums = 0
        self.own_storage = {
            _storage(parameter): name
            for name, module in model.named_modules()
            if is_linear_map(module)
            for parameter in module.parameters(recurse=False)
        }

    def start(self) -> None:
        """Before each forward pass."""
        self.traces.clear()
        self.storages.clear()
        self.stack.clear()
        self.muted = 0
        self.seen.num_runs += 1

    # -- book-keeping ------------------------------------------------------------------------------------------------

    def tag(self, tensor: Tensor, traces: dict[Source, Trace]) -> None:
        if traces:
            key = id(tensor)
            self.traces[key] = (
                weakref.ref(tensor, lambda _: self.traces.pop(key, None)),
                {**self.get(tensor), **traces},
            )
            self.storages.add(_storage(tensor))
            self.storages.discard(0)

    def get(self, tensor: Tensor) -> dict[Source, Trace]:
        reference, traces = self.traces.get(id(tensor), (None, {}))
        return traces if reference is not None and reference() is tensor else {}

    def use(self, source: Source, use: Use) -> None:
        kind, name = source
        what = use.operation if isinstance(use, OtherUse) else "output"
        if kind == "norm":
            self.seen.uses.setdefault(name, []).append(use)
        elif kind == "sum":
            self.seen.sum_readers.setdefault(int(name), []).append(f"!{what}")
        else:
            self.seen.linear_readers.setdefault(name, []).append(what)

    def spoil(self, tensors: Iterator[Tensor], operation: str) -> None:
        """Record a reader that cannot be folded into."""
        where = self.stack[-1] if self.stack else ""
        for tensor in tensors:
            traces = self.get(tensor)
            for source in traces:
                self.use(source, OtherUse(operation, where))
            if not traces and _storage(tensor) in self.storages:
                # The same memory through a door we did not see (NumPy, say): blame every source that lives there.
                shared = _storage(tensor)
                for reference, others in self.traces.values():
                    if (other := reference()) is not None and _storage(other) == shared:
                        for source in others:
                            self.use(source, OtherUse(f"{operation} (through an alias)", where))

    # -- modules -----------------------------------------------------------------------------------------------------

    def hooks(self) -> Iterator[Any]:
        """Register a pair of hooks on every module, one by one."""
        for name, module in self.model.named_modules():
            yield module.register_forward_pre_hook(
                lambda m, a, k, name=name: self.enter(name, m, a, k), with_kwargs=True, prepend=True
            )
            yield module.register_forward_hook(lambda m, _, out, name=name: self.leave(name, m, out))

    def enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.seen.ran.setdefault(name, len(self.seen.ran))
        self.stack.append(name)
        if self.muted == 0 and name in self.norms:
            self.enter_norm(name, args, kwargs)
        elif self.muted == 0 and is_linear_map(module):
            self.enter_linear(name, module, args, kwargs)
        if name in self.norms or is_linear_map(module):
            self.muted += 1

    def leave(self, name: str, module: nn.Module, output: Any) -> None:
        self.stack.pop()
        if name in self.norms or is_linear_map(module):
            self.muted -= 1
        if self.muted or not isinstance(output, Tensor):
            return
        if name in self.norms:
            shape = self.norms[name]
            channel = torch.arange(shape[0] if len(shape) == 1 else torch.Size(shape).numel(), device=output.device)
            dim = self.channel_dims[name]
            if len(shape) == 1:
                view = [1] * output.ndim
                view[dim] = shape[0]
                channel = channel.view(view)
            else:
                channel = channel.view(shape)
            self.traces.pop(id(output), None)  # a norm that returned its input as it was is still a source of its own
            self.tag(output, {("norm", name): self.fresh(channel, output)})
            self.seen.uses.setdefault(name, [])
        elif self.follow_sums and is_linear_map(module):
            dim = _channel_dim(module, output.ndim)
            channel = torch.arange(output.shape[dim], device=output.device)
            channel = channel.view([-1 if i == dim else 1 for i in range(output.ndim)])
            self.tag(output, {("linear", name): self.fresh(channel, output)})

    @staticmethod
    def fresh(channel: Tensor, like: Tensor) -> Trace:
        one = torch.ones((), dtype=torch.float64, device=like.device)
        return Trace(channel.expand(like.shape), one.expand(like.shape))

    def enter_norm(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        read = -1
        for tensor in _tensors((args, kwargs)):
            for source, trace in self.get(tensor).items():
                if source[0] == "sum" and trace.whole() and not trace.unsure:
                    self.seen.sum_readers.setdefault(int(source[1]), []).append(name)
                    read = int(source[1])
                else:
                    self.use(source, OtherUse("another norm", name))
            if not self.get(tensor):
                self.spoil(iter([tensor]), "another norm")
        self.seen.norm_reads.setdefault(name, []).append(read)

    def enter_linear(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call: dict[str, tuple[int, ...]] = {}
        inputs = list(_tensors((args, kwargs)))
        for tensor in inputs:
            if not self.get(tensor):
                self.spoil(iter([tensor]), "a linear layer")
            for source, trace in self.get(tensor).items():
                if not tensor.numel():
                    self.use(source, OtherUse("a linear layer that got no rows, which shows nothing", name))
                    continue
                dim = _channel_dim(module, tensor.ndim)
                columns = _columns(trace, dim) if len(inputs) == 1 and dim >= 0 else None
                if columns is None or len(columns) != num_inputs(module):
                    self.use(source, OtherUse("a linear layer that mixes its channels", name))
                    continue
                channel = _thin(trace.channel)
                arrives = not bool((channel == PADDING).any())
                arrives = arrives and bool(((_thin(trace.factor) == 1) | (channel < 0)).all())
                if source[0] == "norm":
                    call[source[1]] = columns
                    self.use(
                        source, LinearUse(name, columns, arrives, trace.dropout, trace.unsure, self.seen.num_runs - 1)
                    )
                else:
                    self.use(source, OtherUse("a linear layer", name))
        self.seen.linear_calls.setdefault(name, []).append(call)

    # -- operations --------------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.muted:
            return out
        inputs = list(_tensors((args, kwargs)))
        for tensor in inputs:
            owner = self.own_storage.get(_storage(tensor))
            if owner is not None and func.overloadpacket not in _SHAPE_ONLY:
                self.seen.weight_readers.setdefault(owner, f"{func.overloadpacket.__name__} in {self.where()}")
        if any(self.get(t) or _storage(t) in self.storages for t in inputs):
            self.follow(func, args, kwargs, out, inputs)
        return out

    def where(self) -> str:
        return repr(self.stack[-1]) if self.stack and self.stack[-1] else "the model's own forward"

    def follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, inputs: list[Tensor]) -> None:
        packet = func.overloadpacket
        if packet in _SHAPE_ONLY:
            return
        traced = [t for t in inputs if self.get(t)]
        if not traced:
            self.spoil(iter(inputs), packet.__name__)
            return
        first = args[0] if args else None
        single = isinstance(first, Tensor) and bool(self.get(first)) and all(t is first for t in traced)
        handled = False
        if "out" in kwargs:
            pass  # written into a tensor that may be read through other names
        elif packet in _SAME and single and isinstance(out, Tensor) and out.is_floating_point():
            self.tag(out, self.get(first))  # type: ignore[arg-type]
            handled = True
        elif packet is aten.as_strided_ and single and out.is_contiguous() and self.has_shape(out):
            handled = True  # adaptive pooling restates the strides of its contiguous result
        elif packet in _RESHAPES and single:
            handled = self.replay(first, out, lambda s, _: s.reshape(out.shape))
        elif packet in _MOVES and single:
            handled = self.replay(first, out, lambda s, _: func(s, *args[1:], **kwargs))
        elif packet is aten.constant_pad_nd and single and (args[2] if len(args) > 2 else 0) == 0:
            handled = self.replay(first, out, lambda s, fill: aten.constant_pad_nd(s, args[1], fill), fills=True)
        elif packet is aten.masked_fill and single and isinstance(args[2], (int, float)) and args[2] == 0:
            handled = self.replay(first, out, lambda s, fill: s.masked_fill(args[1], fill), fills=True)
        elif packet in (aten.cat, aten.stack):
            handled = self.concatenate(func, args, kwargs, out)
        elif packet in (aten.mul, aten.div) and len(args) == 2 and len(traced) == 1 and not kwargs:
            handled = self.scale(packet, args, out)
        elif packet in (aten.sum, aten.mean) and single and out.numel() and len(args) > 1 and args[1]:
            handled = self.reduce(packet, args, kwargs, out)
        elif packet is aten.add and self.follow_sums and not kwargs and len(args) == 2 and len(inputs) == 2:
            handled = self.add(inputs, out)
        if not handled:
            self.spoil(iter(inputs), packet.__name__)

    def has_shape(self, tensor: Tensor) -> bool:
        return all(trace.channel.shape == tensor.shape for trace in self.get(tensor).values())

    def replay(self, tensor: Any, out: Any, move: Callable[[Tensor, int], Any], *, fills: bool = False) -> bool:
        """Apply `move(shadow, value of what is put in)` to both shadows of every trace. `fills`: it is there to put
        zeros in; where it puts none on these inputs, it may on others."""
        outs = [out] if isinstance(out, Tensor) else list(out)
        for source, trace in self.get(tensor).items():
            channel, factor = move(trace.channel, PADDING), move(trace.factor, 0)
            channels = [channel] if isinstance(out, Tensor) else list(channel)
            factors = [factor] if isinstance(out, Tensor) else list(factor)
            for piece, c, f in zip(outs, channels, factors, strict=True):
                idle = fills and not bool((c == PADDING).any())
                self.tag(piece, {source: Trace(c, f, trace.dropout, trace.unsure or idle)})
        return True

    def concatenate(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> bool:
        parts = args[0]
        for source in {s for part in parts for s in self.get(part)}:
            found = [self.get(part).get(source) for part in parts]
            channels = [
                t.channel if t else torch.full_like(p, FOREIGN, dtype=torch.int64)
                for t, p in zip(found, parts, strict=True)
            ]
            factors = [
                t.factor if t else torch.zeros_like(p, dtype=torch.float64) for t, p in zip(found, parts, strict=True)
            ]
            trace = Trace(
                func(channels, *args[1:], **kwargs),
                func(factors, *args[1:], **kwargs),
                any(t.dropout for t in found if t),
                any(t.unsure for t in found if t),
            )
            self.tag(out, {source: trace})
        return True

    def scale(self, packet: Any, args: tuple[Any, ...], out: Tensor) -> bool:
        """tensor * other, or tensor / other, where other does not come from the norm: linear along every channel."""
        left, right = args
        swapped = not (isinstance(left, Tensor) and self.get(left))
        if swapped and packet is aten.div:
            return False
        tensor, other = (right, left) if swapped else (left, right)
        ones = isinstance(other, Tensor) and other.numel() > 1 and bool((other == 1).all())
        amount = other.double() if isinstance(other, Tensor) else float(other)
        for source, trace in self.get(tensor).items():
            if source[0] != "norm" and isinstance(other, Tensor) and other.numel() > 1:  # no sum as it is, in any case
                self.use(source, OtherUse(packet.__name__, self.stack[-1] if self.stack else ""))
                continue
            thin = _thin(trace.factor)
            factor = thin * amount if packet is aten.mul else thin / amount
            channel = trace.channel.expand(out.shape)
            self.tag(out, {source: Trace(channel, factor.expand(out.shape), trace.dropout, trace.unsure or ones)})
        return True

    def reduce(self, packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> bool:
        """A sum or mean over positions keeps the channels apart; one over channels does not."""
        dims = args[1] if isinstance(args[1], (list, tuple)) else [args[1]]
        keepdim = bool(args[2] if len(args) > 2 else kwargs.get("keepdim", False))
        made: dict[Source, Trace] = {}
        for source, trace in self.get(args[0]).items():
            high = trace.channel.amax(dims, keepdim=True)
            low = torch.where(trace.channel == PADDING, high, trace.channel).amin(dims, keepdim=True)
            if not torch.equal(low, high):
                return False
            factor = packet(trace.factor, dims, keepdim)
            # A mean of ones is one but for rounding.
            factor = torch.where((factor - 1).abs() < 1e-12, 1.0, factor)
            made[source] = Trace(high.reshape(out.shape), factor, trace.dropout, trace.unsure)
        self.tag(out, made)
        return True

    def add(self, inputs: list[Tensor], out: Tensor) -> bool:
        """norm's output + linear layer's output, channel by channel: the residual connection of a post-norm layer."""
        norm, branch = inputs
        if not any(kind == "norm" for kind, _ in self.get(norm)):
            norm, branch = branch, norm
        of_norm, of_branch = self.get(norm), self.get(branch)
        if len(of_norm) != 1 or len(of_branch) != 1 or norm.shape != branch.shape or norm is branch:
            return False
        (source, trace), (other, branch_trace) = *of_norm.items(), *of_branch.items()
        whole = all(t.whole() and not t.unsure for t in (trace, branch_trace))
        if (source[0], other[0]) != ("norm", "linear") or not whole:
            return False
        if not torch.equal(trace.channel, branch_trace.channel):
            return False
        self.use(source, AddUse(other[1], self.num_sums, trace.dropout, branch_trace.dropout))
        self.use(other, OtherUse("residual", ""))
        self.seen.sum_readers[self.num_sums] = []
        self.tag(out, {("sum", str(self.num_sums)): Trace(trace.channel, trace.factor)})
        self.num_sums += 1
        return True

    # -- the model's output ------------------------------------------------------------------------------------------

    def outputs(self, output: Any) -> None:
        self.muted += 1
        if self.seen.outputs is None:
            self.seen.outputs = output
        found = dict(named_outputs(output))
        main = [path for path in found if not is_side_output(path)]
        for path, tensor in found.items():
            side = bool(main) and is_side_output(path)
            for source in self.get(tensor):
                self.use(source, OutputUse(path, side))
            if not self.get(tensor):
                self.spoil(iter([tensor]), "the model's output")


def named_outputs(output: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model's output with their paths ("logits", "text_model_output.pooler_output")."""
    if isinstance(output, Tensor):
        yield prefix or "output", output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from named_outputs(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(output, (list, tuple)):
        for index, value in enumerate(output):
            yield from named_outputs(value, f"{prefix}.{index}" if prefix else f"output.{index}")


def is_side_output(path: str) -> bool:
    """Hidden states and the outputs of towers inside a larger model, which are by-products when there are others."""
    head = path.split(".")[0]
    return head in SIDE_OUTPUTS or head.endswith("_model_output") or head in ("encoder_outputs", "past_key_values")


class _SeeDropout(TorchFunctionMode):
    """Dropout does nothing in evaluation mode and never reaches the dispatcher: seen one level higher. It is kept from
    doing anything in training mode."""

    def __init__(self, watcher: _Watcher):
        super().__init__()
        self.watcher = watcher

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name not in _DROPOUTS:
            return func(*args, **kwargs)
        given = args[0] if args else kwargs.get("input")
        if self.watcher.model.training:
            if len(args) > 2:
                args = (*args[:2], False, *args[3:])
            else:
                kwargs = {**kwargs, "train" if "train" in kwargs else "training": False}
        out = func(*args, **kwargs)
        if "alpha" in name and isinstance(given, Tensor):
            self.watcher.spoil(iter([given]), name)  # in training it is not linear, whatever the bias
        rate = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
        if "alpha" in name or rate == 0 or not isinstance(given, Tensor) or not isinstance(out, Tensor):
            return out
        if not self.watcher.get(given):
            return out
        out = out.view_as(out)  # a tensor of its own, so that other readers of `given` stay free of the mark
        traces = {s: Trace(t.channel, t.factor, True, t.unsure) for s, t in self.watcher.get(given).items()}
        self.watcher.tag(out, traces)
        return out


_DROPOUTS = {
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "feature_dropout",
    "alpha_dropout",
    "feature_alpha_dropout",
}


def watch_consumers(
    model: nn.Module,
    norms: Mapping[str, tuple[tuple[int, ...], bool]],
    *runs: Mapping[str, Any],
    follow_sums: bool = False,
) -> Watched:
    """Run `model(**inputs)` in evaluation mode for each of `runs`, and once more in training mode, and record every
    reader of every norm's output.

    Args:
        model: left as it was (training flags and buffers included).
        norms: name -> (normalized shape, channels first) of each norm to watch, by `named_modules()` names.
        runs: keyword arguments of the forward passes.
        follow_sums: also watch the outputs of linear layers, to see residual connections whole.
    """
    watcher = _Watcher(model, norms, follow_sums)
    with hooked(watcher.hooks()), evaluating(model):
        for inputs in runs:
            watcher.start()
            with _SeeDropout(watcher), watcher:
                watcher.outputs(model(**inputs))
    _watch_training(watcher.seen, _Watcher(model, norms, follow_sums), runs[0])
    return watcher.seen


def _watch_training(seen: Watched, watcher: _Watcher, inputs: Mapping[str, Any]) -> None:
    """One pass in training mode: what reads a norm there only (an auxiliary loss), and what else reads a layer.

    A model that does not run there, without labels say, shows nothing."""
    model = watcher.model
    with unchanged(model) as change:
        for buffer in model.buffers():
            if buffer.is_floating_point() or buffer.numel() == 1:  # statistics and counters
                change.keep(buffer)
        with hooked(watcher.hooks()), evaluating(model):
            model.train()
            watcher.start()
            with contextlib.suppress(Exception), warnings.catch_warnings(), _SeeDropout(watcher), watcher:
                warnings.simplefilter("ignore")
                watcher.outputs(model(**inputs))
    for name, calls in watcher.seen.linear_calls.items():
        if name in seen.linear_calls:
            seen.linear_calls[name] += calls
    seen.weight_readers = {**watcher.seen.weight_readers, **seen.weight_readers}
    for name, uses in watcher.seen.uses.items():
        known = {_reader(use) for use in seen.uses.get(name, [])}
        for use in uses:
            if (reader := _reader(use)) not in known and not (reader.startswith("add ") and "a sum" in known):
                seen.in_training.setdefault(name, reader)


def _reader(use: Use) -> str:
    if isinstance(use, LinearUse):
        return use.module
    if isinstance(use, OtherUse):
        return f"{use.operation} in {use.module or 'the model'}"
    return "a sum" if isinstance(use, AddUse) else "the model's output"
