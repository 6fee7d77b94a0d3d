"""The comparison of batches, at toy size."""

import json

from studies import translation_speed
from tests.recipes.fault_runs import arguments


def test_both_kinds_of_batches_take_turns_and_a_token_budget_pads_less(data, tmp_path):
    argv = arguments("translation", data, tmp_path / "run", gradient_accumulation_steps=1)
    translation_speed.main([*argv, "--blocks", "2", "--block_steps", "3"])
    found = json.loads((tmp_path / "run" / "speed.json").read_text())
    budget, fixed = (found["padding_source_target"][kind] for kind in ("token budget", "fixed sentences"))
    assert all(0 <= ours < theirs < 1 for ours, theirs in zip(budget, fixed, strict=True))
    assert all(speed > 0 for speed in found["target_tokens_per_second"].values())
    low, high = found["ratio_quartiles"]
    assert low <= found["ratio"] <= high
    assert found["blocks"] == 2
