"""Tiny data for the recipes, and a fresh state of accelerate for each test."""

import json
import random
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState

from tests.recipes.fault_runs import write_data
from tests.recipes.recipe_process import start, wait


@pytest.fixture(autouse=True)
def _fresh_accelerate_state():
    """Forget the state that accelerate keeps in the process, so that no run sees the settings of an earlier one."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> dict[str, Path]:
    """Write texts of 3 to 20 words with a learnable label, one file per split."""
    folder = tmp_path_factory.mktemp("texts")
    draw = random.Random(0)
    good, bad, other = ["fine", "great", "lovely"], ["poor", "dull", "awful"], [f"word{n}" for n in range(30)]
    files = {}
    for split, size in {"train": 150, "validation": 41, "test": 23}.items():
        rows = []
        for _ in range(size):
            label = draw.randrange(2)
            words = [*draw.choices(other, k=draw.randrange(2, 20)), draw.choice((bad, good)[label])]
            draw.shuffle(words)
            rows.append({"text": " ".join(words), "label": label})
        files[split] = folder / f"{split}.jsonl"
        files[split].write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return files


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Write data for all recipes, and wait until the server that forks processes has imported the recipes."""
    folder = tmp_path_factory.mktemp("data")
    assert wait(start("classification", ["--help"], folder / "log")) == 0
    return write_data(folder)
