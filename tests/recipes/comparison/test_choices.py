"""Which recipe a comparison is of, and which points of a grid a norm tries."""

import importlib
from pathlib import Path

import pytest

import compare
from common.options import OptionError
from comparison.choices import choose_recipe, grid_points, parse_grid, trained_alike

CONFIGS = Path(compare.__file__).with_name("configs")


@pytest.mark.parametrize("config", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_every_config_names_its_recipe(config):
    recipe, options_class = choose_recipe(None, str(CONFIGS / f"{config}.yaml"))
    expected = {"mnist": "classification", "demo": "classification", "rt": "classification", "sst5": "classification"}
    expected |= {"enwik8": "language_modeling", "enwik_sample": "language_modeling"}
    expected |= {"ptb": "parsing", "ud_ewt": "parsing"}
    assert recipe == expected.get(config, "translation")
    module = importlib.import_module(recipe)
    assert module.OPTIONS is options_class
    assert module.TASK.score


def test_options_that_say_nothing_to_a_norm_are_not_tried_for_it():
    grid = parse_grid(["learning_rate=1e-3,1e-4", "C=0.8,1,2"], {"learning_rate", "C"})
    assert len(grid_points(grid, "adanorm", {"C", "k"})) == 6
    assert grid_points(grid, "none", {}) == [{"learning_rate": "1e-3"}, {"learning_rate": "1e-4"}]
    assert grid_points({}, "none", {}) == [{}]
    assert len(grid_points(grid, "adanorm:C=2", {"C", "k"})) == 2  # its C is fixed


def test_without_config_or_recipe_there_is_nothing_to_run():
    with pytest.raises(OptionError, match="give --config, or --recipe"):
        choose_recipe(None, None)


def test_trainings_are_alike_if_they_differ_in_settings_of_norms_only():
    assert trained_alike({"C": "1", "alpha": "2"}, {"C": "2"})
    assert not trained_alike({"learning_rate": "1"}, {"learning_rate": "2"})
