"""The options of a patch, each stated once: its default, its choices and what it is in a line.

The command line and the recipes take them from `patch_options`; the explicit signature of `patch_model` is held
against it by a test. What is particular to a norm is said by its class in modeling_adanorm.py. It is read off the
source text, so that this file needs neither torch nor the rest of the package: the recipes show help and find mistakes
before they import either.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path
from typing import Any, NamedTuple


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
    "on_unfoldable": ("keep", "approximate", "calibrate", "raise"),
    "on_tied": ("keep", "untie"),
}


@functools.cache
def norms() -> dict[str, Norm]:
    """Every norm that `patch_model` knows, by name."""
    tree = ast.parse(Path(__file__).with_name("modeling_adanorm.py").read_text(encoding="utf-8"))
    said = {node.name: _attributes(node) for node in tree.body if isinstance(node, ast.ClassDef)}
    shared = said["SwappedNorm"]
    kinds = [{**shared, **attributes} for attributes in said.values() if "norm" in attributes]
    return {
        ast.literal_eval(norm["norm"]): Norm(
            ast.literal_eval(norm["title"]),
            ast.literal_eval(norm["color"]),
            {
                ast.literal_eval(key): tuple(map(ast.literal_eval, call.args))
                for key, call in zip(norm["SETTINGS"].keys, norm["SETTINGS"].values, strict=True)
            },
        )
        for norm in kinds
    }


def _attributes(node: ast.ClassDef) -> dict[str, Any]:
    """The expressions that a class body gives to its names."""
    found: dict[str, Any] = {}
    for line in node.body:
        if not isinstance(line, (ast.Assign, ast.AnnAssign)) or line.value is None:
            continue
        for target in line.targets if isinstance(line, ast.Assign) else [line.target]:
            names, values = [target], [line.value]
            if isinstance(target, ast.Tuple) and isinstance(line.value, ast.Tuple):
                names, values = target.elts, line.value.elts
            found |= {name.id: value for name, value in zip(names, values, strict=True) if isinstance(name, ast.Name)}
    return found


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
        "on_unfoldable": Option(
            "keep",
            "with affine fold: what to do with a norm that something else reads too",
            CHOICES["on_unfoldable"],
        ),
        "on_tied": Option(
            "keep",
            "with affine fold: what to do with a norm whose head shares its weight with an embedding",
            CHOICES["on_tied"],
        ),
        "fold_inputs": Option(None, "with affine fold: a batch for the model to run on"),
    }
