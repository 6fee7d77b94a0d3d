"""Tiny data and options for the recipes."""

import json
import random
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState

RECIPES = Path(__file__).resolve().parents[2] / "recipes"

TINY_MODEL = {
    "model_type": "bert",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
}


@pytest.fixture(autouse=True)
def _fresh_accelerate_state():
    """accelerate keeps its state in the process: a run must not see the settings of the one before."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> dict[str, Path]:
    """Texts of 3 to 20 words with a learnable label, one file a split."""
    folder = tmp_path_factory.mktemp("texts")
    draw = random.Random(0)
    good, bad, other = ["fine", "great", "lovely"], ["poor", "dull", "awful"], [f"word{n}" for n in range(30)]
    files = {}
    for split, size in {"train": 150, "validation": 41, "test": 23}.items():
        rows = []
        for _ in range(size):
            label = draw.randrange(2)
            words = draw.choices(other, k=draw.randrange(2, 20)) + [draw.choice((bad, good)[label])]
            draw.shuffle(words)
            rows.append({"text": " ".join(words), "label": label})
        files[split] = folder / f"{split}.jsonl"
        files[split].write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return files


@pytest.fixture
def tiny_arguments(texts, tmp_path):
    """Command line options of a run of a few seconds; `(output_dir, **changes)` -> argv."""

    def build(output_dir: Path | str = tmp_path / "run", **changes: object) -> list[str]:
        options = {
            "train_file": texts["train"],
            "validation_file": texts["validation"],
            "test_file": texts["test"],
            "model_config": json.dumps(TINY_MODEL),
            "tokenizer": "word",
            "min_frequency": 1,
            "max_length": 32,
            "batch_size": 8,
            "max_steps": 12,
            "learning_rate": 0.01,
            "output_dir": output_dir,
            **changes,
        }
        return [text for name, value in options.items() for text in (f"--{name}", str(value))]

    return build
