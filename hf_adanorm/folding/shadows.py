"""Follow the channels of a watched tensor through the operations that use it.

Every element of a watched output carries two shadows: the channel that it belongs to, and the factor with which that
channel's bias would arrive there (1 at first). Operations that only move elements (views, slices, permutes, gathers,
concatenation), or that are linear within every channel (padding, masks, means over positions), are also applied to the
shadows.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_adanorm.state import storage_of

PADDING, FOREIGN = -1, -2  # channel numbers of inserted zeros, and of elements of other tensors
Source = tuple[str, str]  # ("norm" | "linear" | "sum", name)

aten = torch.ops.aten
# One tensor in, the same elements out: replayed on the shadows as they are.
_MOVES = {
    aten.permute, aten.transpose, aten.t, aten.numpy_T, aten.expand, aten.unsqueeze, aten.squeeze, aten.slice,
    aten.select, aten.split, aten.split_with_sizes, aten.unbind, aten.chunk, aten.index_select, aten.gather,
    aten.index, aten.roll, aten.flip, aten.repeat, aten.narrow, aten.movedim, aten.unfold, aten.masked_select,
    aten.repeat_interleave,
}  # fmt: skip
_RESHAPES = {aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias, aten._reshape_copy, aten.flatten}
_SAME = {aten.clone, aten.detach, aten.alias, aten._to_copy, aten.contiguous, aten.lift_fresh}
# Read the shape, not the values.
SHAPE_ONLY = {
    aten.zeros_like, aten.ones_like, aten.empty_like, aten.full_like, aten.rand_like, aten.randn_like, aten.new_zeros,
    aten.new_ones, aten.new_empty, aten.new_full, aten.new_empty_strided, aten.sym_size, aten.sym_stride,
    aten.sym_numel, aten.size, aten.stride, aten.is_contiguous, aten.sym_storage_offset,
}  # fmt: skip


@dataclass(frozen=True)
class Trace:
    """Which channels of one source the elements of a tensor come from."""

    channel: Tensor
    """int64, the tensor's shape: flat index within the source's channels, PADDING or FOREIGN."""
    factor: Tensor
    """float64, the tensor's shape: how often the channel's bias arrives here (1: unchanged)."""
    dropout: bool = False
    """A dropout layer, idle in evaluation mode, comes before the tensor."""
    unsure: bool = False
    """A mask, a fill or padding had no effect on these inputs, but may have one on others."""

    @classmethod
    def begin(cls, channel: Tensor, like: Tensor) -> Trace:
        """Return the trace of a source's own output, which holds every bias once."""
        one = torch.ones((), dtype=torch.float64, device=like.device)
        return cls(channel.expand(like.shape), one.expand(like.shape))

    def whole(self) -> bool:
        """Return whether every bias arrives unchanged."""
        return bool((_thin(self.factor) == 1).all())

    def biases_arrive(self) -> bool:
        """Return whether every bias arrives unchanged, next to elements of other tensors, and without padding."""
        channel = _thin(self.channel)
        unpadded = not bool((channel == PADDING).any())
        return unpadded and bool(((_thin(self.factor) == 1) | (channel < 0)).all())

    def columns(self, dim: int) -> tuple[int, ...] | None:
        """Return the channel of every index along `dim`, or None if an index mixes several."""
        channel = _thin(self.channel, dim)
        channel = channel.movedim(dim, -1).flatten(0, -2) if channel.ndim > 1 else channel[None]
        high, low = _extremes(channel, [0])
        return tuple(high[0].tolist()) if torch.equal(low, high) else None


Traces = dict[Source, Trace]


def _thin(shadow: Tensor, keep: int | None = None) -> Tensor:
    """Return a shadow without the repetitions of an expanded one, except along the dimension `keep`."""
    for dim, stride in enumerate(shadow.stride()):
        if stride == 0 and dim != keep:
            shadow = shadow.narrow(dim, 0, min(shadow.shape[dim], 1))
    return shadow


def _extremes(channel: Tensor, dims: list[int]) -> tuple[Tensor, Tensor]:
    """Return the highest and the lowest channel along `dims`, which are kept, without regard to padding."""
    high = channel.amax(dims, keepdim=True)
    return high, torch.where(channel == PADDING, high, channel).amin(dims, keepdim=True)


class Shadows:
    """The shadows of all tensors of a forward pass."""

    def __init__(self) -> None:
        # By id; a tensor that is gone takes its shadows with it.
        self._traces: dict[int, tuple[weakref.ref[Tensor], Traces]] = {}
        self._storages: set[int] = set()

    def clear(self) -> None:
        """Drop all shadows."""
        self._traces.clear()
        self._storages.clear()

    def add(self, tensor: Tensor, traces: Traces) -> None:
        """Give a tensor further traces."""
        if traces:
            key = id(tensor)
            reference = weakref.ref(tensor, lambda _: self._traces.pop(key, None))
            self._traces[key] = (reference, {**self.of(tensor), **traces})
            self._storages.add(storage_of(tensor))
            self._storages.discard(0)

    def begin(self, tensor: Tensor, source: Source, channel: Tensor) -> None:
        """Make `tensor` the output of `source`. A norm that returned its input unchanged is a source of its own."""
        if source[0] == "norm":
            self._traces.pop(id(tensor), None)
        self.add(tensor, {source: Trace.begin(channel, tensor)})

    def of(self, tensor: Tensor) -> Traces:
        """Return the traces of a tensor; most have none."""
        reference, traces = self._traces.get(id(tensor), (None, {}))
        return traces if reference is not None and reference() is tensor else {}

    def touches(self, tensor: Tensor) -> bool:
        """Return whether the tensor, or another in its memory, has traces."""
        return bool(self.of(tensor)) or storage_of(tensor) in self._storages

    def aliased(self, tensor: Tensor) -> list[Source]:
        """Return the sources in the memory of a tensor without traces: it came from outside of torch (NumPy)."""
        shared = storage_of(tensor)
        if shared not in self._storages:
            return []
        living = [(reference(), traces) for reference, traces in self._traces.values()]
        return [s for other, traces in living if other is not None and storage_of(other) == shared for s in traces]

    def follow(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, inputs: list[Tensor]
    ) -> list[Source] | None:
        """Give `out` its traces of the `inputs` of `func`. Return the sources that are lost in it, or None if `func`
        cannot be followed."""
        packet = func.overloadpacket
        traced = [tensor for tensor in inputs if self.of(tensor)]
        first = args[0] if args else None
        single = isinstance(first, Tensor) and bool(self.of(first)) and all(tensor is first for tensor in traced)
        if not traced or "out" in kwargs:  # the latter may be read through other names
            return None
        if packet in _SAME and single and isinstance(out, Tensor) and out.is_floating_point():
            self.add(out, self.of(first))  # type: ignore[arg-type]
            return []
        if packet is aten.as_strided_ and single and out.is_contiguous() and self._has_shape(out):
            return []  # adaptive pooling restates the strides of its contiguous result
        if packet in _RESHAPES and single:
            return self._replay(first, out, lambda s, _: s.reshape(out.shape))
        if packet in _MOVES and single:
            return self._replay(first, out, lambda s, _: func(s, *args[1:], **kwargs))
        if packet is aten.constant_pad_nd and single and (args[2] if len(args) > 2 else 0) == 0:
            return self._replay(first, out, lambda s, fill: aten.constant_pad_nd(s, args[1], fill), fills=True)
        if packet is aten.masked_fill and single and isinstance(args[2], (int, float)) and args[2] == 0:
            return self._replay(first, out, lambda s, fill: s.masked_fill(args[1], fill), fills=True)
        if packet in (aten.cat, aten.stack):
            return self._concatenate(func, args, kwargs, out)
        if packet in (aten.mul, aten.div) and len(args) == 2 and len(traced) == 1 and not kwargs:
            return self._scale(packet, args, out)
        if packet in (aten.sum, aten.mean) and single and out.numel() and len(args) > 1 and args[1]:
            return self._reduce(packet, args, kwargs, out)
        return None

    def _has_shape(self, tensor: Tensor) -> bool:
        return all(trace.channel.shape == tensor.shape for trace in self.of(tensor).values())

    def _replay(
        self, tensor: Any, out: Any, move: Callable[[Tensor, int], Any], *, fills: bool = False
    ) -> list[Source]:
        """Apply `move(shadow, inserted value)` to both shadows of every trace. `fills`: the operation may insert zeros
        on other inputs if it does not on these."""
        for source, trace in self.of(tensor).items():
            moved = out, move(trace.channel, PADDING), move(trace.factor, 0)
            pieces = [moved] if isinstance(out, Tensor) else zip(*moved, strict=True)
            for piece, channel, factor in pieces:
                idle = fills and not bool((channel == PADDING).any())
                self.add(piece, {source: Trace(channel, factor, trace.dropout, trace.unsure or idle)})
        return []

    def _concatenate(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> list[Source]:
        parts = [part for part in args[0] if part.numel()] or args[0]  # an empty cache comes before keys and values
        if len(parts) == 1 and parts[0].shape == out.shape:
            self.add(out, self.of(parts[0]))
            return []
        foreign = [Trace(torch.full_like(x, FOREIGN, dtype=torch.int64), x.new_zeros(x.shape).double()) for x in parts]
        for source in {s for part in parts for s in self.of(part)}:
            found = [self.of(part).get(source, other) for part, other in zip(parts, foreign, strict=True)]
            channel, factor = (
                func([getattr(t, k) for t in found], *args[1:], **kwargs) for k in ("channel", "factor")
            )
            dropout, unsure = any(t.dropout for t in found), any(t.unsure for t in found)
            self.add(out, {source: Trace(channel, factor, dropout, unsure)})
        return []

    def _scale(self, packet: Any, args: tuple[Any, ...], out: Tensor) -> list[Source] | None:
        """Scale the factors for tensor * other or tensor / other, where `other` has no traces.

        Return the lost sources, or None for other / tensor.
        """
        left, right = args
        on_the_right = not (isinstance(left, Tensor) and self.of(left))
        if on_the_right and packet is aten.div:
            return None
        tensor, other = (right, left) if on_the_right else (left, right)
        many = isinstance(other, Tensor) and other.numel() > 1
        idle = many and bool((other == 1).all())
        amount = other.double() if isinstance(other, Tensor) else float(other)
        lost = []
        for source, trace in self.of(tensor).items():
            if source[0] != "norm" and many:  # a sum or a linear layer's output must stay as it is
                lost.append(source)
                continue
            thin = _thin(trace.factor)
            factor = thin * amount if packet is aten.mul else thin / amount
            channel = trace.channel.expand(out.shape)
            self.add(out, {source: Trace(channel, factor.expand(out.shape), trace.dropout, trace.unsure or idle)})
        return lost

    def _reduce(self, packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> list[Source] | None:
        """Follow a sum or mean over positions. One over channels mixes them and cannot be followed."""
        dims = list(args[1]) if isinstance(args[1], (list, tuple)) else [args[1]]
        keepdim = bool(args[2] if len(args) > 2 else kwargs.get("keepdim", False))
        made: Traces = {}
        for source, trace in self.of(args[0]).items():
            high, low = _extremes(trace.channel, dims)
            if not torch.equal(low, high):
                return None
            factor = packet(trace.factor, dims, keepdim)
            # A mean of ones is one but for rounding.
            factor = torch.where((factor - 1).abs() < 1e-12, 1.0, factor)
            made[source] = Trace(high.reshape(out.shape), factor, trace.dropout, trace.unsure)
        self.add(out, made)
        return []
