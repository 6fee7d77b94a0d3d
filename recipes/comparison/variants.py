"""Variants of a comparison: norms named with their settings.

Examples are `adanorm`, `adanorm:C=2`, `detachnorm:detach_variance=false` and `my_norms.py:Derf:alpha=0.7`. Settings
are separated by `:` or `,`. `split` and `join` are inverses. `canonical` drops settings that do not change anything,
so that one variant has one name and one folder.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import PurePath
from typing import Any

from common.options import OptionError, did_you_mean
from comparison.paper import TITLES
from hf_adanorm.norms import NAME_CUTOFF, STOCK, check_settings, parse_value, resolve_norm, settings_of


def split(text: str) -> tuple[str, dict[str, Any]]:
    """Split the name of a variant into the norm and its settings, without importing the norm.

    Raises OptionError for an unknown name, a repeated setting, or text that is not SETTING=VALUE.
    """
    norm, *parts = re.split(r"[:,](?=\w+=)", text)
    name, colon, rest = norm.partition(":")
    if name in TITLES and colon:
        raise OptionError(f"norm {text!r}: expected {name}:SETTING=VALUE, got {rest!r} after {name}")
    if name not in TITLES and not colon:
        near = did_you_mean(norm, TITLES, cutoff=NAME_CUTOFF)
        raise OptionError(f"norm {text!r}: expected {', '.join(TITLES)}, FILE.py:CLASS{near}")
    pairs = [part.partition("=")[::2] for part in parts]
    settings = {key: parse_value(value) for key, value in pairs}
    if len(settings) < len(pairs):
        raise OptionError(f"norm {text!r}: a setting is given twice")
    return norm, settings


def join(norm: str, settings: Mapping[str, Any]) -> str:
    """Return the text that `split` reads as this norm with these settings."""
    return ":".join([norm, *(f"{name}={value_text(value)}" for name, value in settings.items())])


def value_text(value: Any) -> str:
    """Return a value as command lines take it."""
    if isinstance(value, bool) or value is None:
        return "null" if value is None else str(value).lower()
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def known_settings(text: str) -> dict[str, Any]:
    """Import the norm of a variant and return its settings with their defaults.

    Raises OptionError for a file, class or setting that does not exist.
    """
    norm, settings = split(text)
    if norm == STOCK:
        if settings:
            raise OptionError(f"norm {text!r}: {norm} has no settings")
        return {}
    try:
        cls, _ = resolve_norm(norm)
        check_settings(cls, settings)
    except (ValueError, TypeError, OSError) as error:
        raise OptionError(f"norm {text!r}: {error}") from error
    return settings_of(cls)


def canonical(text: str, usual: Mapping[str, Any], grid: Collection[str] = ()) -> str:
    """Return the name without the settings that runs of this norm have anyway (`usual`, in the norm's order), but with
    those that the grid would vary."""
    norm, settings = split(text)
    given = {name: settings[name] for name in usual if name in settings}
    return join(norm, {name: value for name, value in given.items() if value != usual[name] or name in grid})


def kind(name: str) -> str:
    """Return the norm of a variant, without its settings."""
    return split(name)[0]


def title_of(name: str) -> str:
    """Return a variant's name for tables and plots."""
    norm, settings = split(name)
    title = TITLES.get(norm) or norm.rpartition(":")[2]
    off = [part for part, value in settings.items() if value is False]
    if norm == "detachnorm" and len(off) == 1:
        return f"{title} ({'variance' if off == ['detach_mean'] else 'mean'} only)"
    said = ", ".join(f"{part} = {value_text(value)}" for part, value in settings.items())
    return f"{title} ({said})" if said else title


def public_name(name: str) -> str:
    """Return a variant's name without the folder of its file."""
    norm, settings = split(name)
    where, colon, cls = norm.rpartition(":")
    return join(f"{PurePath(where).name}{colon}{cls}" if colon else norm, settings)


def folder_name(name: str) -> str:
    """Return a variant's name as that of a folder on any system, such as `my_norms.Derf,alpha=0.7`."""
    return re.sub(r"[^\w.,=+-]", "_", public_name(name).replace(".py:", ".").replace(":", ","))


def in_order(names: Iterable[str]) -> list[str]:
    """Return the names, each once: the paper's norms in its order, then others; variants of one norm as given."""
    order = list(TITLES)
    return sorted(dict.fromkeys(names), key=lambda name: order.index(norm) if (norm := kind(name)) in order else 99)
