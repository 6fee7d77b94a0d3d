"""Which of a model's norms a call means: `include`, `exclude`, `layers`.

A pattern is read alike wherever it stands (`patch_model`, a command line, a config; alone or in a list): as the ending
of names, in which `*` stands for any number, as in the lines of a report; where no norm has that ending, as a regular
expression that must match the whole name. A `$` at its end says that it is one. `layers` counts within every stack of
layers. Whatever matches nothing raises.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

from torch import nn

from .modeling_adanorm import short_repr

Patterns = str | Sequence[str] | None


def check_patterns(option: str, patterns: Patterns) -> None:
    """Raise TypeError or ValueError unless `patterns` is a string, a list of strings or None."""
    if patterns is None or isinstance(patterns, str):
        return
    if not isinstance(patterns, (list, tuple, set, frozenset)) or not all(isinstance(p, str) for p in patterns):
        raise TypeError(
            f"{option} must be a name's ending, a regular expression or a list of them, got {short_repr(patterns)}"
        )
    if not patterns or not all(patterns):
        raise ValueError(f"{option}={short_repr(patterns)} holds no name: leave it out to mean every norm")


def match_names(option: str, patterns: Patterns, names: Sequence[str]) -> set[str]:
    """The names that the patterns match; ValueError for a pattern that matches none, with the closest names."""
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns or ():
        ending = re.compile(r"(?:.*\.)?" + re.escape(pattern).replace(r"\*", r"\d+"))
        ended = {name for name in names if ending.fullmatch(name)}
        why = "as a regular expression for the whole name it matches none"
        try:
            matched = {name for name in names if re.fullmatch(pattern, name)}
        except (re.error, OverflowError) as error:
            matched, why = set(), f"it is not a regular expression: {error}"
        if not ended and not matched:
            raise ValueError(
                f"{option}: {short_repr(pattern)} is the ending of no norm's name, and {why}. "
                f"{_closest(pattern, names)}"
            )
        if isinstance(patterns, str) and ended and matched and ended != matched:  # in a list, it never was the other
            warnings.warn(
                f"{option}={short_repr(pattern)} is read as the ending of a name and means {len(ended)} norms; as a "
                f"regular expression, {short_repr(pattern + '$')}, it would mean {len(matched)}",
                stacklevel=5,
            )
        found |= ended or matched
    return found


def _closest(pattern: str, names: Sequence[str]) -> str:
    if not names:
        return "The model has no norm that could be swapped."
    endings = {".".join(name.split(".")[-n:]) for name in names for n in (1, 2, 3)} | set(names)
    close = difflib.get_close_matches(pattern, sorted(endings), n=3, cutoff=0.3)
    return f"Closest: {', '.join(map(repr, close or sorted(names)[:3]))}"


def check_layers(layers: Iterable[int] | int | None) -> tuple[int, ...] | None:
    """`layers` as a tuple of integers; TypeError or ValueError for anything else."""
    if layers is None:
        return None
    given: tuple[Any, ...] = (
        tuple(layers) if isinstance(layers, Iterable) and not isinstance(layers, (str, bytes)) else (layers,)
    )
    # NumPy's integers are integers, too.
    if not all(isinstance(n, Integral) and not isinstance(n, bool) for n in given):
        raise TypeError(f"layers must be integers, got {short_repr(layers)}")
    if not given:
        raise ValueError("layers is empty: leave it out to mean every layer")
    return tuple(int(n) for n in given)


def layer_positions(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """For every name inside a stack of layers: its layer's index and the number of layers in that stack.

    A stack is the outermost `nn.ModuleList` (or `nn.Sequential` of blocks of one class) on the way to the module, be
    it the model itself.
    """
    positions = {}
    for name in names:
        module: nn.Module = model
        for part in name.split("."):
            if part.isdigit() and _is_stack(module):
                positions[name] = (list(module._modules).index(part), len(module._modules))
                break
            module = module._modules[part]  # type: ignore[assignment]
    return positions


def _is_stack(module: nn.Module) -> bool:
    if isinstance(module, nn.ModuleList):
        return True
    children = list(module.children())
    one_class = len({type(child) for child in children}) == 1
    return isinstance(module, nn.Sequential) and one_class and any(True for _ in children[0].children())


def match_layers(model: nn.Module, layers: tuple[int, ...], names: Sequence[str]) -> set[str]:
    """The names within the given layers; ValueError for an index that no stack has."""
    positions = layer_positions(model, names)
    if not positions:
        raise ValueError(f"layers={list(layers)}: none of the norms is inside a stack of layers")
    found: set[str] = set()
    for layer in layers:
        matched = {n for n, (i, size) in positions.items() if i == layer or (layer < 0 and i == layer + size)}
        if not matched:
            sizes = sorted({size for _, size in positions.values()})
            raise ValueError(f"layers: no norm is in layer {layer}; the stacks have {sizes} layers, counted from 0")
        found |= matched
    return found
