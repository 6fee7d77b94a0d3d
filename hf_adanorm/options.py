"""The options of a patch, each stated once: its default, its choices and what it is in a line.

Importing this file imports neither torch nor transformers.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from .norms import BUILT_IN, TITLES


class Norm(NamedTuple):
    """What its class says of a norm."""

    title: str
    color: int
    settings: dict[str, tuple[float | bool, str]]
    """Default and help of its arguments."""


class Option(NamedTuple):
    """An argument of `patch_model`."""

    default: Any
    help: str
    choices: tuple[str, ...] = ()


CHOICES = {
    "targets": ("auto", "layernorm", "rmsnorm", "all"),
    "affine": ("drop", "fold"),
    "unfoldable": ("keep", "approximate", "calibrate", "raise"),
    "tied": ("keep", "untie"),
}


_SETTINGS: dict[str, dict[str, tuple[float | bool, str]]] = {
    "adanorm": {
        "C": (1.0, "AdaNorm: the scale C > 0 in z = C (1 - k y) y"),
        "k": (0.1, "AdaNorm: the slope k >= 0 in z = C (1 - k y) y"),
    },
    "detachnorm": {
        "detach_mean": (True, "DetachNorm: let no gradient flow through the mean"),
        "detach_variance": (True, "DetachNorm: let no gradient flow through the standard deviation"),
    },
}


def norms() -> dict[str, Norm]:
    """Return every built-in norm, by name. To be replaced by `norms.settings_of` where it is still used."""
    return {name: Norm(TITLES[name], index, _SETTINGS.get(name, {})) for index, name in enumerate(BUILT_IN)}


@functools.cache
def patch_options() -> dict[str, Option]:
    """The options of `patch_model`, by name."""
    return {
        "norm": Option("adanorm", f"norm to swap in: {', '.join(norms())}", tuple(norms())),
        **{name: Option(*setting) for norm in norms().values() for name, setting in norm.settings.items()},
        "eps": Option(None, "added to the variance; by default what the replaced norm uses"),
        "centered": Option(None, "whether the mean is subtracted; by default as the replaced norm does"),
        "include": Option(
            None, "swap only norms whose name ends so; * is anything between dots, re: starts a regular expression"
        ),
        "exclude": Option(None, "leave these norms as they are; written like include"),
        "layers": Option(None, "swap only norms in these layers, counted from 0, negative from the end"),
        "targets": Option("auto", "kind of norm to swap; auto: those on the residual stream", CHOICES["targets"]),
        "affine": Option("drop", "what becomes of trained gains and biases", CHOICES["affine"]),
    }
