"""Norms as they are named with their settings: `adanorm`, `adanorm:C=2`, `detachnorm:detach_variance=false`.

`parse_norm` and `norm_name` are inverses. A name holds the settings that are to differ from those of the recipe's own
options; `canonical` drops the others, so that one contestant has one name and one folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from common.options import NORMS, OptionError, did_you_mean
from comparison.paper import TITLES

_BOOLEANS = {"true": True, "false": False}
_SETTINGS = frozenset(name for facts in NORMS.values() for name in facts.settings)


def parse_norm(text: str) -> tuple[str, dict[str, Any]]:
    """The norm that `text` names, and the settings that it gives to it.

    Raises OptionError for an unknown norm or setting, a doubled setting, or a value of another type. Whether a number
    is in range is for the norm's class to say.
    """
    norm, colon, rest = text.partition(":")
    if norm not in TITLES:
        raise OptionError(f"norm {text!r}: expected {', '.join(TITLES)}{did_you_mean(norm, TITLES)}")
    known = NORMS[norm].settings if norm in NORMS else {}
    settings: dict[str, Any] = {}
    for item in rest.split(",") if colon else []:
        name, _, value = item.partition("=")
        if name not in known:
            has = f"has the settings {', '.join(known)}" if known else "has no settings"
            raise OptionError(f"norm {text!r}: {norm} {has}, not {name!r}{did_you_mean(name, known)}")
        if name in settings:
            raise OptionError(f"norm {text!r}: {name} stands there twice")
        is_flag = isinstance(known[name][0], bool)
        try:
            settings[name] = _BOOLEANS[value.lower()] if is_flag else float(value)
        except (KeyError, ValueError):
            expected = "true or false" if is_flag else "a number"
            raise OptionError(f"norm {text!r}: expected {name}={expected}, got {item!r}") from None
    return norm, settings


def norm_name(norm: str, settings: Mapping[str, Any]) -> str:
    """Return the text that `parse_norm` reads as this norm with these settings."""
    return f"{norm}:{','.join(f'{name}={_value(value)}' for name, value in settings.items())}" if settings else norm


def canonical(text: str, options: Any, grid: Iterable[str] = ()) -> str:
    """The name of a contestant among runs with these options: without the settings that the options have anyway, but
    with all that the grid would vary."""
    norm, settings = parse_norm(text)
    order = NORMS[norm].settings if settings else ()
    said = {name: settings[name] for name in order if name in settings}
    usual = {name: options.norm_settings.get(name, NORMS[norm].settings[name][0]) for name in said}
    return norm_name(norm, {name: value for name, value in said.items() if value != usual[name] or name in grid})


def kind(name: str) -> str:
    """The norm of a contestant, without its settings."""
    return name.partition(":")[0]


def title_of(name: str) -> str:
    """A contestant's name for people."""
    norm, settings = parse_norm(name)
    if any(value is False for value in settings.values()):  # a part of what it does is switched off
        left = [name for name, (default, _) in NORMS[norm].settings.items() if settings.get(name, default)]
        return f"{TITLES[norm]} ({', '.join(name.rpartition('_')[2] for name in left)} only)"
    said = ", ".join(f"{part} = {_value(value)}" for part, value in settings.items())
    return f"{TITLES[norm]} ({said})" if said else TITLES[norm]


def trained_alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Tell whether two points of a grid differ in the norms' own settings at most."""
    return all(one.get(name) == other.get(name) for name in (one.keys() | other.keys()) - _SETTINGS)


def folder_name(name: str) -> str:
    """A contestant's name as that of a file: without the colon, which Windows refuses."""
    return name.replace(":", ",")


def in_order(names: Iterable[str]) -> list[str]:
    """The names, each once, in the paper's order; contestants of one norm as they were given."""
    order = list(TITLES)
    return sorted(dict.fromkeys(names), key=lambda name: order.index(kind(name)))


def _value(value: Any) -> str:
    short = str(value).lower() if isinstance(value, bool) else f"{value:g}"
    return short if isinstance(value, bool) or float(short) == value else repr(value)
