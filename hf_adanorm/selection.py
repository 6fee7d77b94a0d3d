"""Choose the norms that a call means: `targets`, `include`, `exclude` and `layers`.

- `targets="auto"` means the norms on the residual stream, LayerNorms and RMSNorms alike. Query, key, latent and other
  norms inside a branch of a layer are skipped with a reason (`detection.off_stream`). `"layernorm"`, `"rmsnorm"` and
  `"all"` mean every norm of that kind.
- A pattern is the ending of a name, split at dots. `*` stands for anything within one part of the name, and at the end
  of a pattern for everything below. `re:` starts a regular expression that must match the whole name. A pattern that
  matches nothing raises.
- `layers` counts within every stack of layers, negative from the end.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, cast

from torch import nn

from .detection import NormInfo, is_stack, iter_norms, off_stream, recognize
from .modeling_adanorm import is_swapped, short_repr
from .norms import did_you_mean
from .options import CHOICES
from .replaced import source_of
from .report import NormRow

Patterns = str | Sequence[str] | None


def check_choice(option: str, value: Any, choices: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        hint = did_you_mean(value, choices)
        raise ValueError(f"{option} must be one of {list(choices)}, got {short_repr(value)}{hint}")


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Options of `patch_model` that select norms by name, layer and kind.

    Raises:
        TypeError, ValueError: a wrong option.
    """

    include: Patterns = None
    exclude: Patterns = None
    layers: Iterable[int] | int | None = None
    """Stored as a tuple of integers, or None."""
    targets: str = "auto"

    def __post_init__(self) -> None:
        check_choice("targets", self.targets, CHOICES["targets"])
        _check_patterns("include", self.include)
        _check_patterns("exclude", self.exclude)
        object.__setattr__(self, "layers", _checked_layers(self.layers))


def choose_norms(model: nn.Module, selection: Selection) -> list[NormRow]:
    """Return every norm of the model, with the reason for those that are not chosen.

    Raises:
        ValueError: a pattern or a layer that matches no norm.
    """
    rows = [
        NormRow(name=name, module=module, info=info, kind=_kind(module, info))
        for name, module, info in iter_norms(model)
    ]
    for row in rows:
        if reason := _obstacle(row, selection.targets):
            row.cause, row.reason = "obstacle", reason
    in_reach = [row for row in rows if not row.cause]
    names = [row.name for row in in_reach]
    include, layers = selection.include, selection.layers
    try:
        included = match_names("include", include, names)
        excluded = match_names("exclude", selection.exclude, names)
    except ValueError as error:
        given = [*_each(include), *_each(selection.exclude)]
        beyond = [f" ({r.name}: {r.reason})" for p in given for r in rows if r.reason and _matches(p, r.name)]
        raise ValueError(f"{error}{beyond[0] if beyond else ''}") from None
    in_layers = names if layers is None else match_layers(model, cast(tuple[int, ...], layers), names)
    in_branch: dict[str, str] = {}
    if selection.targets == "auto" and include is None:
        in_branch = off_stream(model, [(row.name, row.module, row.info) for row in in_reach])
    for row in in_reach:
        inside = getattr(row.info, "inside", "")
        if row.name in excluded:
            row.cause, row.reason = "option", "exclude"
        elif include is not None and row.name not in included:
            row.cause, row.reason = "option", "not in include"
        elif row.name not in in_layers:
            row.cause, row.reason = "option", "not in layers"
        elif inside and row.name not in included:
            row.cause = "branch"
            row.reason = f"part of the conditioned norm {inside}; name it in include to swap it"
        elif row.name in in_branch:
            row.cause, row.reason = "branch", in_branch[row.name]
        else:
            row.cause = "chosen"
    return rows


def _obstacle(row: NormRow, targets: str) -> str:
    """Return the reason why no `include` can choose this norm, or an empty string."""
    if row.kind == "other":
        return row.info.reason
    if targets not in ("auto", "all", row.kind):
        return f"{'an RMSNorm' if row.kind == 'rmsnorm' else 'a LayerNorm'}, which targets={row.kind!r} swaps"
    if not row.name:
        return "it is the norm itself, and a swap replaces modules inside a model: make the new norm directly"
    return ""


def _kind(module: nn.Module, info: NormInfo) -> str:
    """Return the kind of the norm; for a swapped one, the kind of the replaced norm."""
    source = source_of(module) if is_swapped(module) else None
    if source is not None and (found := recognize(source)) is not None and found.kind != "other":
        return found.kind
    return info.kind


# ------------------------------------------------------------------------------------------------------- patterns


def _check_patterns(option: str, patterns: Patterns) -> None:
    if patterns is None or isinstance(patterns, str):
        return
    if not isinstance(patterns, (list, tuple, set, frozenset)) or not all(isinstance(p, str) for p in patterns):
        raise TypeError(f"{option} must be the ending of a name or a list of them, got {short_repr(patterns)}")
    if not patterns or not all(patterns):
        raise ValueError(f"{option}={short_repr(patterns)} is empty; omit it to select every norm")


def _each(patterns: Patterns) -> Iterator[str]:
    yield from [patterns] if isinstance(patterns, str) else patterns or ()


def _regex(pattern: str) -> re.Pattern[str]:
    """Return the regular expression for a whole name. Raises `re.error` for a wrong `re:` pattern."""
    if pattern.startswith("re:"):
        return re.compile(pattern.removeprefix("re:"))
    head, last = (pattern[:-1], ".+") if pattern == "*" or pattern.endswith(".*") else (pattern, "")
    return re.compile(r"(?:.*\.)?" + re.escape(head).replace(r"\*", r"[^.]*") + last)


def _matches(pattern: str, name: str) -> bool:
    try:
        return _regex(pattern).fullmatch(name) is not None
    except (re.error, OverflowError):
        return False


def match_names(option: str, patterns: Patterns, names: Sequence[str]) -> set[str]:
    """Return the names that the patterns match. Raises ValueError for a pattern that matches none."""
    found: set[str] = set()
    for pattern in _each(patterns):
        try:
            regex = _regex(pattern)
        except (re.error, OverflowError) as error:
            raise ValueError(f"{option}: {short_repr(pattern)} is not a regular expression: {error}") from None
        matched = {name for name in names if regex.fullmatch(name)}
        if not matched:
            closest = _closest(pattern, names)
            raise ValueError(f"{option}: {short_repr(pattern)} matches the ending of no norm's name. {closest}")
        found |= matched
    return found


def _closest(pattern: str, names: Sequence[str]) -> str:
    if not names:
        return "The model has no norm that could be swapped."
    endings = {".".join(name.split(".")[-n:]) for name in names for n in (1, 2, 3)} | set(names)
    close = difflib.get_close_matches(pattern, sorted(endings), n=3, cutoff=0.3)
    return f"Closest: {', '.join(map(repr, close or sorted(names)[:3]))}"


# --------------------------------------------------------------------------------------------------------- layers


def _checked_layers(layers: Iterable[int] | int | None) -> tuple[int, ...] | None:
    if layers is None:
        return None
    given: tuple[Any, ...] = tuple(layers) if isinstance(layers, Iterable) else (layers,)
    # NumPy's integers are accepted.
    if not all(isinstance(n, Integral) and not isinstance(n, bool) for n in given):
        raise TypeError(f"layers must be integers, got {short_repr(layers)}")
    if not given:
        raise ValueError("layers is empty; omit it to select every layer")
    return tuple(int(n) for n in given)


def layer_positions(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Return, for every name inside a stack of layers, its layer's index and the number of layers in that stack.

    A stack is the outermost `nn.ModuleList`, or `nn.Sequential` of blocks of one class, that contains the module. It
    may be the model itself.
    """
    positions = {}
    for name in names:
        module: nn.Module = model
        for part in name.split("."):
            if part.isdigit() and is_stack(module):
                positions[name] = (list(module._modules).index(part), len(module._modules))
                break
            module = module._modules[part]  # type: ignore[assignment]
    return positions


def match_layers(model: nn.Module, layers: tuple[int, ...], names: Sequence[str]) -> set[str]:
    """Return the names within the given layers. Raises ValueError for an index that no stack has."""
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
