"""The state of a model, recorded before something is done with it and restored afterwards.

`State` records everything that the model's modules refer to: attributes, parameters, buffers, submodules and hooks,
and the lists, dicts, sets and plain objects (configs, hooks with attributes) that these hold. Nothing large is copied.
A tensor is copied right before something writes into it: callers announce that with `keep`, and a dispatch mode
notices it within `recording`.
"""

from __future__ import annotations

import contextlib
import logging
import random
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_MAX_DEPTH = 5  # of objects within objects, counted from the module that holds them
_MAX_LENGTH = 2000  # of a list whose entries are followed
_PLAIN = (str, bytes, int, float, complex, type(None))
_OPAQUE = (type, types.ModuleType, types.FunctionType, types.MethodType, logging.Logger, *weakref.ProxyTypes)


class State:
    """The state of `modules` and of all that is in them at this moment; `restore` brings it back."""

    def __init__(self, *modules: nn.Module) -> None:
        self._containers: list[tuple[Any, Any]] = []
        self._tensors: list[tuple[Tensor, Tensor, bool]] = []
        self._kept: list[tuple[Tensor, Tensor | None, Callable[[Tensor], Tensor] | None]] = []
        seen: dict[int, Any] = {}  # the values are kept, so that no id is used twice
        waiting: list[tuple[Any, int]] = [(module, 0) for module in modules]
        while waiting:
            value, depth = waiting.pop()
            if isinstance(value, _PLAIN) or id(value) in seen or depth > _MAX_DEPTH:
                continue
            seen[id(value)] = value
            if isinstance(value, Tensor):
                if type(value) in (Tensor, nn.Parameter, nn.Buffer):
                    self._tensors.append((value, value.data, value.requires_grad))
                continue
            if isinstance(value, (dict, list, set, deque)):
                kind = next(kind for kind in (dict, list, set, deque) if isinstance(value, kind))
                self._containers.append((value, kind(value)))
            depth = 0 if isinstance(value, nn.Module) else depth + 1
            waiting += [(inner, depth) for inner in _inside(value)]

    def keep(
        self, tensor: Tensor, new: Tensor | None = None, inverse: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """Remember the values of `tensor`, which is about to be overwritten. The first call counts.

        Args:
            tensor: any tensor, also a view of a larger one.
            new: the values that it will get.
            inverse: computes the old values from the new ones, within rounding. Where it does, nothing is copied.
        """
        if new is not None and inverse is not None and _recovers(tensor, inverse(new)):
            self._kept.append((tensor, None, inverse))
        elif not any(kept is tensor for kept, *_ in self._kept):
            self._kept.append((tensor, tensor.detach().clone(), None))

    @torch.no_grad()
    def restore(self) -> None:
        """Restore everything. A KeyboardInterrupt in between is raised at the end."""
        interrupt: KeyboardInterrupt | None = None
        while True:
            try:
                self._restore()
                break
            except KeyboardInterrupt as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt

    def _restore(self) -> None:
        while self._kept:
            tensor, old, inverse = self._kept[-1]
            if inverse is not None:
                old = inverse(tensor)
                self._kept[-1] = (tensor, old, None)  # it can be interrupted, and must not be applied twice
            tensor.copy_(old)  # type: ignore[arg-type]
            self._kept.pop()
        for tensor, data, requires_grad in self._tensors:
            if tensor.data_ptr() != data.data_ptr() or tensor.shape != data.shape or tensor.dtype != data.dtype:
                tensor.data = data
            if tensor.requires_grad is not requires_grad:
                tensor.requires_grad_(requires_grad)
        for container, old in self._containers:
            _put_back(container, old)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Keep the values of every tensor of the model that an operation in this block writes into."""
        owned: dict[int, list[Tensor]] = {}
        for tensor, *_ in self._tensors:
            owned.setdefault(storage_of(tensor), []).append(tensor)
        owned.pop(0, None)
        with _Recorder(self, owned):
            yield


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, state: State, owned: dict[int, list[Tensor]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.state, self.owned = state, owned
        self.written: dict[Any, list[tuple[int, str]]] = {}  # per operation: its arguments that it writes into

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in self.written:
            arguments = enumerate(func._schema.arguments)
            self.written[func] = [(i, a.name) for i, a in arguments if a.alias_info and a.alias_info.is_write]
        for index, name in self.written[func]:
            for target in tensors_in(args[index] if index < len(args) else kwargs.get(name)):
                for tensor in self.owned.get(storage_of(target), ()):
                    self.state.keep(tensor)
        return func(*args, **kwargs)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested arguments or outputs, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item)


def storage_of(tensor: Tensor) -> int:
    """Return the address of the tensor's memory, or 0 if it has none of its own."""
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0


@contextlib.contextmanager
def random_states(model: nn.Module) -> Iterator[None]:
    """Run the block with torch's generators at seed 0. Restore those of torch, numpy and Python afterwards."""
    devices = sorted({parameter.device.index for parameter in model.parameters() if parameter.is_cuda})
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=devices):
            for generator in (torch.default_generator, *(torch.cuda.default_generators[i] for i in devices)):
                generator.manual_seed(0)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002


def _inside(value: Any) -> Iterator[Any]:
    """Yield what an object holds; nothing for functions, classes and modules of Python."""
    if isinstance(value, (dict, list, tuple, set, deque)):
        if len(value) <= _MAX_LENGTH or isinstance(value, dict):  # a dict may be the table of a module's submodules
            yield from value.values() if isinstance(value, dict) else value
    elif not isinstance(value, _OPAQUE) and isinstance(getattr(value, "__dict__", None), dict):
        yield value.__dict__


def _put_back(container: Any, old: Any) -> None:
    """Give a container its earlier entries, in their order."""
    if isinstance(container, dict):
        pairs = zip(container.items(), old.items(), strict=False)
        if len(container) == len(old) and all(a is b and x is y for (a, x), (b, y) in pairs):
            return
        kind = OrderedDict if isinstance(container, OrderedDict) else dict  # subclasses may refuse to be changed
        kind.clear(container)
        kind.update(container, old)
    elif isinstance(container, list):
        container[:] = old
    else:
        container.clear()
        (container.update if isinstance(container, set) else container.extend)(old)


def _recovers(old: Tensor, back: Tensor) -> bool:
    """Return whether `back` equals `old` to within a few units in the last place."""
    old = old.detach()
    gap = (back - old).abs_().sub_(old.abs(), alpha=8 * torch.finfo(old.dtype).eps)
    return bool((gap <= 0).all())
