"""The recipe of a comparison, and the points of a grid that each norm tries."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from common.options import OptionError, read_config
from comparison.variants import split
from tasks.options import ClassificationOptions, LanguageModelingOptions, ParsingOptions, TranslationOptions

MOST_SEEDS = 1000
OWN = ("norm", "seed", "output_dir", "overwrite_output_dir")  # set by the comparison, not by the user


def recipe_options() -> dict[str, type[Any]]:
    """Return the names of the recipe scripts and the classes of their options."""
    return {
        "classification": ClassificationOptions,
        "language_modeling": LanguageModelingOptions,
        "parsing": ParsingOptions,
        "translation": TranslationOptions,
    }


# The options of all recipes: what else a grid varies is a setting of a norm.
OPTIONS = frozenset(item.name for cls in recipe_options().values() for item in dataclasses.fields(cls))


def choose_recipe(name: str | None, config: str | None) -> tuple[str, type[Any]]:
    """Return the recipe and its options' class: by name, or the only recipe that knows all options of the config.

    Raises OptionError if neither decides.
    """
    known = recipe_options()
    if name is not None:
        return name, known[name]
    if config is None:
        raise OptionError("give --config, or --recipe " + "|".join(known))
    keys = {str(key) for key in read_config(config)}
    fitting = [(one, cls) for one, cls in known.items() if keys <= {item.name for item in dataclasses.fields(cls)}]
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


def trained_alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Tell whether two points of a grid differ in the norms' own settings at most."""
    return all(one.get(name) == other.get(name) for name in (one.keys() | other.keys()) & OPTIONS)
