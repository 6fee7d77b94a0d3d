"""What every option of the recipes changes."""

import dataclasses
import importlib

import pytest

from common.options import options_that_change
from comparison.choices import recipe_options

# What another value changes nothing of what was or will be trained or scored, or only from then on.
NOTHING = {
    *("output_dir", "overwrite_output_dir", "save_total_limit", "logging_steps", "report_to", "watch_norms"),
    *("dataloader_workers", "preprocessing_workers", "cache_dir"),
    *("push_to_hub", "hub_model_id", "hub_private"),
}
ONWARD = {"checkpointing_steps", "on_nonfinite", "on_spike", "spike_sigmas"}


@pytest.mark.parametrize("recipe", recipe_options())
def test_every_option_is_classed_by_what_it_changes(recipe):
    options_class = importlib.import_module(recipe).OPTIONS
    names = {item.name for item in dataclasses.fields(options_class)}
    assert options_that_change(options_class, "nothing") == NOTHING & names
    assert options_that_change(options_class, "onward") == ONWARD
    assert options_that_change(options_class, "results") == names - NOTHING - ONWARD
    assert {"min_frequency", "max_length", "vocab_size", "seed", "norm_settings"} & names <= options_that_change(
        options_class, "results"
    )
