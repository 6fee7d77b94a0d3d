"""Packages that import none of their modules until one of their names is used."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any


def lazily(package: str, names: dict[str, Iterable[str]]) -> Callable[[str], Any]:
    """The `__getattr__` of a package, whose `names` are given by the module that has them; a module may be its own."""
    homes = {name: module for module, its_names in names.items() for name in its_names}

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(f"{package}.{homes[name]}")
        return module if name == homes[name] else getattr(module, name)

    return get
