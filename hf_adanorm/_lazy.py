"""Packages that import none of their modules until one of their names is used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any


def lazily(package: str, names: dict[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the `__getattr__` and the `__dir__` of a package.

    Args:
        names: for each module the names that the package takes from it, separated by spaces. A module that is among
            its own names is imported as a whole.
    """
    homes = {name: module for module, its_names in names.items() for name in its_names.split()}

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(f"{package}.{homes[name]}")
        return module if name == homes[name] else getattr(module, name)

    return get, lambda: sorted({*vars(sys.modules[package]), *homes})
