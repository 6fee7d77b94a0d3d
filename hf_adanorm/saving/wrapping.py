"""Wrap methods of other libraries so that callers and other wrappers notice nothing.

A wrapper has the signature of the wrapped method and passes every argument on unchanged, by position or by name. It
calls the method that it found, so it composes with the wrappers of others. `unwrap_methods` removes it.
"""

from __future__ import annotations

import functools
import importlib.abc
import inspect
import sys
import warnings
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from typing import Any, ClassVar

# Where a wrapper was set: the wrapper, and what lay there before.
_ACTIVE: dict[tuple[Any, str], tuple[Callable[..., Any], Any]] = {}

# around(original, self, bound): `bound` holds the call's arguments by the wrapped method's own names, and
# `original(self, **more)` makes the call with what is in `bound` by then.
Around = Callable[[Callable[..., Any], Any, inspect.BoundArguments], Any]


def wrap_method(root: Any, path: str, around: Around, *reads: str) -> None:
    """Make the method at `path` ("Class.method") in the module `root` call `around`, which reads the arguments named
    in `reads`; nothing if it does already. Of a function, the first argument stands for `self`.

    A method that is missing, or does not take these arguments, is skipped with a warning. The others still work.
    """
    *parents, name = path.split(".")
    owner: Any = functools.reduce(lambda found, part: getattr(found, part, None), parents, root)
    if (owner, name) in _ACTIVE:
        return
    static = inspect.getattr_static(owner, name, None)
    method: Any = static.__func__ if isinstance(static, classmethod) else static
    signature = inspect.signature(method) if callable(method) else inspect.Signature()
    if not signature.parameters or not set(reads) <= signature.parameters.keys():
        found = f"takes {signature}" if callable(method) else "is not there"
        warnings.warn(
            f"{root.__name__}.{path} {found}: hf_adanorm expects it to take "
            f"({', '.join(('self', *reads))}, ...) and does without it. Saving or loading patched models may lack "
            f"something: use a version of {root.__name__.partition('.')[0]} that hf_adanorm supports",
            stacklevel=2,
        )
        return

    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            is_active = _ACTIVE.get((owner, name), (None,))[0] is wrapper
            bound = signature.bind(*args, **kwargs) if is_active else None
        except TypeError:  # wrong arguments: the method says so in its own words
            bound = None
        if bound is None:
            return method(*args, **kwargs)

        def original(receiver: Any, **more: Any) -> Any:
            return method(receiver, *bound.args[1:], **{**bound.kwargs, **more})

        return around(original, bound.args[0], bound)

    _ACTIVE[owner, name] = (wrapper, static)
    setattr(owner, name, classmethod(wrapper) if isinstance(static, classmethod) else wrapper)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds awaited modules with the other finders, and calls back once a module has run."""

    waiting: ClassVar[dict[str, Callable[[Any], None]]] = {}

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname not in self.waiting:
            return None
        finders = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in finders)), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                if (callback := self.waiting.pop(fullname, None)) is not None:
                    callback(module)
                if not self.waiting and self in sys.meta_path:
                    sys.meta_path.remove(self)

            loader.exec_module = exec_module
        return spec


_FINDER = _Finder()


def when_imported(name: str, callback: Callable[[Any], None]) -> None:
    """Call `callback` with the module called `name`: now if it is imported, else as soon as somebody imports it."""
    module = sys.modules.get(name)
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        callback(module)
        return
    _FINDER.waiting[name] = callback
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)


def unwrap_methods() -> None:
    """Remove all wrappers, and stop waiting for imports. One that another library has wrapped only passes calls on."""
    _FINDER.waiting.clear()
    if _FINDER in sys.meta_path:
        sys.meta_path.remove(_FINDER)
    while _ACTIVE:
        (owner, name), (wrapper, original) = _ACTIVE.popitem()
        if getattr(getattr(owner, name), "__func__", getattr(owner, name)) is wrapper:
            setattr(owner, name, original)
