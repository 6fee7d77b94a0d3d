"""Runs that share a machine: the same seed gives the same weights, whoever else runs, however batches are loaded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.recipes.fault_runs import STEPS, arguments, write_data
from tests.recipes.recipe_process import check_whole, same_weights, start, wait

pytestmark = pytest.mark.skipif(os.name != "posix", reason="forks")
LAST = f"checkpoint-{STEPS}"
TOKEN = "hf_a_secret_that_nobody_may_read"


@pytest.mark.parametrize("recipe", ["translation"])
def test_runs_at_the_same_time_share_caches_and_a_parent_folder(recipe: str, tmp_path: Path) -> None:
    data = write_data(tmp_path)
    runs = {
        "a": {},
        "workers": {"dataloader_workers": 2},  # the same
        "other": {"norm": "layernorm-simple", "seed": 2},
    }
    environment = {"HF_TOKEN": TOKEN, "HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    processes = {
        name: start(
            recipe,
            arguments(recipe, data, tmp_path / "runs" / name, **changes),
            tmp_path / f"{name}.log",
            environment=environment,
        )
        for name, changes in runs.items()
    }
    for name, process in processes.items():
        assert wait(process) == 0, (tmp_path / f"{name}.log").read_text()
        assert check_whole(tmp_path / "runs" / name) == STEPS
    one = tmp_path / "runs" / "a" / LAST
    assert same_weights(one, tmp_path / "runs" / "workers" / LAST)
    assert not same_weights(one, tmp_path / "runs" / "other" / LAST)
    # A token in the environment is neither printed nor written.
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
