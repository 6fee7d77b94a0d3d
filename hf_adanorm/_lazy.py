"""Packages that import none of their modules until one of their names is used."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def lazily(package: str, names: dict[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package: for each of its modules the names that it takes from there, with spaces between
    them; a module that is handed out itself stands among its names."""
    homes = {name: module for module, its_names in names.items() for name in its_names.split()}

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(f"{package}.{homes[name]}")
        return module if name == homes[name] else getattr(module, name)

    return get
