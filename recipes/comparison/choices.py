"""The recipe of a comparison, and the points of a grid that each norm tries."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import re
from collections.abc import Collection, Sequence
from pathlib import Path

import tasks.options
from common.options import OptionError, read_config
from comparison.variants import OPTIONS, split

MOST_SEEDS = 1000
OWN = ("norm", "seed", "output_dir", "overwrite_output_dir")  # set by the comparison, not by the user


def recipe_options() -> dict[str, str]:
    """Return the recipe scripts and the names of their options' classes."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parents[1].glob("*.py"))}
    found = {name: re.search(r"^OPTIONS, TASK = (\w+),", text, re.MULTILINE) for name, text in texts.items()}
    return {name: match[1] for name, match in found.items() if match}


def choose_recipe(name: str | None, config: str | None) -> tuple[str, type]:
    """Return the recipe and its options' class: by name, or the only recipe that knows all options of the config.

    Raises OptionError if neither decides.
    """
    known = recipe_options()
    if name is None and config is None:
        raise OptionError("give --config, or --recipe " + "|".join(known))
    keys = set() if config is None or name is not None else {str(key) for key in read_config(config)}
    fitting = []
    for candidate in known if name is None else [name]:
        options_class = getattr(tasks.options, known[candidate], None) or importlib.import_module(candidate).OPTIONS
        if keys <= {item.name for item in dataclasses.fields(options_class)}:
            fitting.append((candidate, options_class))
    if len(fitting) != 1:
        raise OptionError(f"--config {config} fits {len(fitting)} recipes: name one with --recipe {'|'.join(known)}")
    return fitting[0]


def parse_grid(items: Sequence[str], names: Collection[str]) -> dict[str, list[str]]:
    """Return `["learning_rate=1e-4,5e-4"]` as a mapping. Raises OptionError for an unknown option or an empty list."""
    grid = {}
    for item in items:
        name, _, values = item.partition("=")
        if name not in names or name in OWN:
            raise OptionError(f"--grid {item}: {name!r} is no option of the recipe that a grid can vary")
        grid[name] = [value for value in values.split(",") if value]
        if not grid[name]:
            raise OptionError(f"--grid {item}: expected {name}=VALUE,VALUE")
    return grid


def grid_points(grid: dict[str, list[str]], variant: str, settings: Collection[str]) -> list[dict[str, str]]:
    """Return the points of the grid for a variant, whose norm has these settings.

    Settings of other norms are left out, and so are those that the variant's name fixes.
    """
    fixed = split(variant)[1]
    used = {
        name: values for name, values in grid.items() if (name in OPTIONS or name in settings) and name not in fixed
    }
    return [dict(zip(used, values, strict=True)) for values in itertools.product(*used.values())]
