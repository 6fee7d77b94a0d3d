"""Who reads a norm's output: found by watching one forward pass at the level of torch's dispatcher.

Watched tensors carry shadows through the operations (`shadows.py`), so when one reaches a linear layer they say which
column of its weight reads which channel, and whether the bias arrives unchanged. Anything else that reads a watched
tensor is recorded as a use that cannot be folded, with the operation's name.

Three kinds of tensors are watched: outputs of norms, outputs of linear layers (the branch that a residual connection
adds), and sums of the two (which must go into the next norm and nowhere else for a post-norm fold).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from hf_adanorm.running import evaluating, hooked, tensors_in
from hf_adanorm.swapping import unchanged

from .linear import channel_dim, is_linear_map, num_inputs
from .shadows import SHAPE_ONLY, Shadows, Source, Trace, aten, storage_of
from .uses import (
    AddUse,
    LinearUse,
    OtherUse,
    OutputUse,
    Use,
    Watched,
    is_side_output,
    named_outputs,
    reader_of,
)


class _Watcher(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, model: nn.Module, norms: Mapping[str, tuple[tuple[int, ...], bool]], follow_sums: bool):
        super().__init__()  # type: ignore[no-untyped-call]
        self.model, self.follow_sums = model, follow_sums
        self.norms = {name: shape for name, (shape, _) in norms.items()}
        self.channel_dims = {name: 1 if channels_first else -1 for name, (_, channels_first) in norms.items()}
        self.seen = Watched(uses={}, linear_calls={}, ran={})
        self.shadows = Shadows()
        self.muted = 0
        self.stack: list[str] = []
        self.num_sums = 0
        self.own_storage = {
            storage_of(parameter): name
            for name, module in model.named_modules()
            if is_linear_map(module)
            for parameter in module.parameters(recurse=False)
        }

    def start(self) -> None:
        """Before each forward pass."""
        self.shadows.clear()
        self.stack.clear()
        self.muted = 0
        self.seen.num_runs += 1

    # -- book-keeping ------------------------------------------------------------------------------------------------

    def use(self, source: Source, use: Use) -> None:
        kind, name = source
        what = use.operation if isinstance(use, OtherUse) else "output"
        if kind == "norm":
            self.seen.uses.setdefault(name, []).append(use)
        elif kind == "sum":
            self.seen.sum_readers.setdefault(int(name), []).append(f"!{what}")
        else:
            self.seen.linear_readers.setdefault(name, []).append(what)

    def lose(self, sources: Iterable[Source], operation: str) -> None:
        """Record a reader that cannot be folded into."""
        for source in sources:
            self.use(source, OtherUse(operation, self.stack[-1] if self.stack else ""))

    def spoil(self, tensors: Iterable[Tensor], operation: str) -> None:
        """Record a reader of whatever is in these tensors."""
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
        if name in self.norms:
            shape = self.norms[name]
            channel = torch.arange(torch.Size(shape).numel(), device=output.device).view(shape)
            if self.channel_dims[name] == 1 and len(shape) == 1:
                channel = channel.view(-1, *[1] * (output.ndim - 2))
            self.shadows.begin(output, ("norm", name), channel)
            self.seen.uses.setdefault(name, [])
        elif self.follow_sums and is_linear_map(module):
            dim = channel_dim(module, output.ndim)
            channel = torch.arange(output.shape[dim], device=output.device)
            channel = channel.view(-1, *[1] * (output.ndim - 1 - dim))
            self.shadows.begin(output, ("linear", name), channel)

    def enter_norm(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        read = -1
        for tensor in tensors_in((args, kwargs)):
            for source, trace in self.shadows.of(tensor).items():
                if source[0] == "sum" and trace.whole() and not trace.unsure:
                    self.seen.sum_readers.setdefault(int(source[1]), []).append(name)
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
                    facts = (trace.biases_arrive(), trace.dropout, trace.unsure, self.seen.num_runs - 1)
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
        may_be_residual = packet is aten.add and self.follow_sums and not kwargs and len(args) == len(inputs) == 2
        if not (may_be_residual and self.add(inputs, out)):
            self.spoil(inputs, packet.__name__)

    def add(self, inputs: list[Tensor], out: Tensor) -> bool:
        """norm's output + linear layer's output, channel by channel: the residual connection of a post-norm layer."""
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
        self.use(source, AddUse(other[1], self.num_sums, trace.dropout, branch_trace.dropout))
        self.use(other, OtherUse("residual", ""))
        self.seen.sum_readers[self.num_sums] = []
        self.shadows.add(out, {("sum", str(self.num_sums)): Trace(trace.channel, trace.factor)})
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
            for source in self.shadows.of(tensor):
                self.use(source, OutputUse(path, side))
            if not self.shadows.of(tensor):
                self.spoil([tensor], "the model's output")


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
    watcher.shadows.clear()
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
    watcher.shadows.clear()
    for name, calls in watcher.seen.linear_calls.items():
        if name in seen.linear_calls:
            seen.linear_calls[name] += calls
    seen.weight_readers = {**watcher.seen.weight_readers, **seen.weight_readers}
    for name, uses in watcher.seen.uses.items():
        known = {reader_of(use) for use in seen.uses.get(name, [])}
        for use in uses:
            if (reader := reader_of(use)) not in known and not (reader.startswith("add ") and "a sum" in known):
                seen.in_training.setdefault(name, reader)
