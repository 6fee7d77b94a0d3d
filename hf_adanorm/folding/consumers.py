"""Find out who reads a norm's output, by watching one forward pass at the level of torch's dispatcher.

Watched tensors carry shadows through the operations (`shadows.py`). When one reaches a linear layer, its shadow says
which column of the weight reads which channel, and whether the bias arrives unchanged. Anything else that reads a
watched tensor is recorded as a use that cannot be folded, with the operation's name.

Three kinds of tensors are watched: outputs of norms, outputs of linear layers (the branch that a residual connection
adds), and sums of the two (which must go into the next norm and nowhere else for a post-norm fold).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from hf_adanorm.detection import NormInfo
from hf_adanorm.running import Inputs, evaluating, first_accepted, hooked
from hf_adanorm.state import storage_of, tensors_in

from .linear import channel_dim, is_linear_map, num_inputs
from .shadows import SHAPE_ONLY, Shadows, Source, Trace, aten
from .uses import (
    AddUse,
    LinearUse,
    OtherUse,
    OutputUse,
    Use,
    Watched,
    is_side_output,
    named_outputs,
    norm_rows,
    sample,
)


class _Watcher(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, model: nn.Module, norms: Mapping[str, NormInfo], inputs: Inputs, keep_outputs: Collection[str]):
        super().__init__()  # type: ignore[no-untyped-call]
        self.model, self.norms, self.keep_outputs = model, norms, keep_outputs
        self.seen = Watched(inputs=inputs)
        self.shadows = Shadows()
        self.muted = 0
        self.stack: list[str] = []
        self.own_storage = {
            storage_of(parameter): name
            for name, module in model.named_modules()
            if is_linear_map(module)
            for parameter in module.parameters(recurse=False)
        }

    # -- book-keeping ------------------------------------------------------------------------------------------------

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
        """Record that an operation, into which nothing can be folded, reads these sources."""
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
        if (info := self.norms.get(name)) is not None:
            channel = torch.arange(torch.Size(info.normalized_shape).numel(), device=output.device)
            channel = channel.view(info.normalized_shape)
            if info.channels_first and channel.ndim == 1:
                channel = channel.view(-1, *[1] * (output.ndim - 2))
            self.shadows.begin(output, ("norm", name), channel)
            self.seen.uses.setdefault(name, [])
            if name in self.keep_outputs:
                rows = norm_rows(self.model, name, info, self.seen.inputs.values, output)
                self.seen.norm_outputs.setdefault(name, []).append(rows)
        elif is_linear_map(module):
            dim = channel_dim(module, output.ndim)
            channel = torch.arange(output.shape[dim], device=output.device)
            channel = channel.view(-1, *[1] * (output.ndim - 1 - dim))
            self.shadows.begin(output, ("linear", name), channel)

    def enter_norm(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        read = -1
        for tensor in tensors_in((args, kwargs)):
            for source, trace in self.shadows.of(tensor).items():
                if source[0] == "sum" and trace.whole() and not trace.unsure:
                    self.seen.sum_readers[int(source[1])].append(name)
                    read = int(source[1])
                else:
                    self.use(source, OtherUse("another norm", name))
            if not self.shadows.of(tensor):
                self.spoil([tensor], "another norm")
        self.seen.norm_reads.setdefault(name, []).append(read)

    def enter_linear(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call: dict[str, tuple[int, ...]] = {}
        inputs = list(tensors_in((args, kwargs)))
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
                    continue
                if source[0] == "norm":
                    call[source[1]] = columns
                    facts = (trace.biases_arrive(), trace.dropout, trace.unsure)
                    self.use(source, LinearUse(name, columns, *facts))
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
        self.seen.dtypes.update(t.dtype for t in tensors_in(out) if t.is_floating_point() and t.numel() > 1)
        if self.muted:
            return out
        inputs = list(tensors_in((args, kwargs)))
        for tensor in inputs:
            owner = self.own_storage.get(storage_of(tensor))
            if owner is not None and func.overloadpacket not in SHAPE_ONLY:
                self.seen.weight_readers.setdefault(owner, f"{func.overloadpacket.__name__} in {self.where()}")
        if any(map(self.shadows.touches, inputs)):
            self.follow(func, args, kwargs, out, inputs)
        return out

    def where(self) -> str:
        return repr(self.stack[-1]) if self.stack and self.stack[-1] else "the model's own forward"

    def follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, inputs: list[Tensor]) -> None:
        packet = func.overloadpacket
        if packet in SHAPE_ONLY:
            return
        lost = self.shadows.follow(func, args, kwargs, out, inputs)
        if lost is not None:
            self.lose(lost, packet.__name__)
            return
        may_be_residual = packet is aten.add and not kwargs and len(args) == len(inputs) == 2
        if not (may_be_residual and self.add(inputs, out)):
            self.spoil(inputs, packet.__name__)

    def add(self, inputs: list[Tensor], out: Tensor) -> bool:
        """Record a norm's output plus a linear layer's, channel by channel, as in a post-norm residual connection.
        Return whether it is one."""
        norm, branch = inputs
        if not any(kind == "norm" for kind, _ in self.shadows.of(norm)):
            norm, branch = branch, norm
        of_norm, of_branch = self.shadows.of(norm), self.shadows.of(branch)
        if len(of_norm) != 1 or len(of_branch) != 1 or norm.shape != branch.shape or norm is branch:
            return False
        (source, trace), (other, branch_trace) = *of_norm.items(), *of_branch.items()
        whole = all(t.whole() and not t.unsure for t in (trace, branch_trace))
        if (source[0], other[0]) != ("norm", "linear") or not whole:
            return False
        if not torch.equal(trace.channel, branch_trace.channel):
            return False
        total = len(self.seen.sum_readers)
        self.use(source, AddUse(other[1], total, trace.dropout, branch_trace.dropout))
        self.use(other, OtherUse("residual", ""))
        self.seen.sum_readers[total] = []
        self.shadows.add(out, {("sum", str(total)): Trace(trace.channel, trace.factor)})
        return True

    # -- the model's output ------------------------------------------------------------------------------------------

    def outputs(self, output: Any) -> None:
        """Record what the model returns, and keep a sample of it."""
        self.muted += 1
        found = dict(named_outputs(output))
        main = [path for path in found if not is_side_output(path)]
        for path, tensor in found.items():
            side = bool(main) and is_side_output(path)
            for source in self.shadows.of(tensor):
                self.use(source, OutputUse(path, side))
            if not self.shadows.of(tensor):
                self.spoil([tensor], "the model's output")
            self.seen.outputs[path] = sample(tensor)
        self.shadows.clear()


class _SeeDropout(TorchFunctionMode):
    """Notice dropout one level above the dispatcher, which it never reaches in evaluation mode."""

    def __init__(self, watcher: _Watcher):
        super().__init__()
        self.watcher = watcher

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name not in _DROPOUTS:
            return func(*args, **kwargs)
        given = args[0] if args else kwargs.get("input")
        out = func(*args, **kwargs)
        if "alpha" in name and isinstance(given, Tensor):
            self.watcher.spoil([given], name)  # in training it is not linear, whatever the bias
        rate = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
        if "alpha" in name or rate == 0 or not isinstance(given, Tensor) or not isinstance(out, Tensor):
            return out
        if not (found := self.watcher.shadows.of(given)):
            return out
        out = out.view_as(out)  # a tensor of its own, so that other readers of `given` stay free of the mark
        self.watcher.shadows.add(out, {source: replace(trace, dropout=True) for source, trace in found.items()})
        return out


_DROPOUTS = {"dropout", "dropout1d", "dropout2d", "dropout3d"}
_DROPOUTS |= {"feature_dropout", "alpha_dropout", "feature_alpha_dropout"}


def watch_consumers(
    model: nn.Module,
    norms: Mapping[str, NormInfo],
    given: Mapping[str, Any] | None,
    *,
    keep_outputs: Collection[str] = (),
) -> Watched:
    """Run `model` once in evaluation mode, and record every reader of every norm's output.

    Padding masks are added to the inputs, as what is masked matters for biases. The model is left as it was.

    Args:
        model: any module.
        norms: each norm to watch, by its name in `model.named_modules()`.
        given: keyword arguments of the forward pass; None for inputs made from the model's config.
        keep_outputs: names of norms whose outputs are to be kept, for a fit.

    Raises:
        ValueError: the model does not run on the inputs.
    """

    def run(inputs: Inputs) -> Watched:
        watcher = _Watcher(model, norms, inputs, keep_outputs)
        try:
            with evaluating(model), hooked(watcher.hooks()), _SeeDropout(watcher), watcher:
                watcher.outputs(model(**inputs.values))
        finally:  # each shadow refers to all others: large tensors would stay until the garbage collector comes
            watcher.shadows.clear()
        return watcher.seen

    return first_accepted(model, given, run, hidden_states=True)
