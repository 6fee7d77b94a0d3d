"""Tiny runs of all recipes for the fault tests: dropout, accumulation, checkpoints inside epochs."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from common.endings import EXIT_RESUME
from tests.recipes.tiny_configs import TINY_CLASSIFIER, TINY_DECODER, TINY_PARSER, TINY_TRANSLATOR

# Layers are dropped at random, as by this type's default.
TRANSLATOR = {**TINY_TRANSLATOR, "encoder_layerdrop": 0.05, "decoder_layerdrop": 0.05}
STEPS = 30
EVERY = 4  # steps from checkpoint to checkpoint


def write_data(folder: Path) -> Path:
    """Data of all recipes: labeled texts, a language whose words have other names in reverse order, bytes."""
    draw = random.Random(0)
    for split, size in {"train": 90, "validation": 13}.items():
        texts, pairs, trees = [], [], []
        for _ in range(size):
            numbers = draw.choices(range(12), k=draw.randrange(1, 9))
            words = [f"wort{chr(97 + n)}" for n in numbers]
            texts.append({"text": " ".join(words), "label": numbers[0] % 2})
            pairs.append({"de": " ".join(words), "en": " ".join(f"{chr(97 + n)}word" for n in reversed(numbers))})
            lines = [f"{n}\t{word}\t_\t_\tX\t_\t{n - 1}\tdep" for n, word in enumerate(words, start=1)]
            trees.append("\n".join(lines) + "\n\n")
        (folder / f"trees-{split}.jsonl").write_text("".join(trees), encoding="utf-8")
        for name, rows in (("texts", texts), ("pairs", pairs)):
            (folder / f"{name}-{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
        (folder / f"bytes-{split}.jsonl").write_text("\n".join(row["text"] for row in texts), encoding="utf-8")
    return folder


def arguments(recipe: str, data: Path, output_dir: Path, **changes: object) -> list[str]:
    kind = {"classification": "texts", "translation": "pairs", "language_modeling": "bytes", "parsing": "trees"}[
        recipe
    ]
    options: dict[str, object] = {
        "train_file": data / f"{kind}-train.jsonl",
        "validation_file": data / f"{kind}-validation.jsonl",
        "max_steps": STEPS,
        "eval_steps": 11,
        "logging_steps": 7,
        "checkpointing_steps": EVERY,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.01,
        "output_dir": output_dir,
    }
    if recipe == "classification":
        options |= {"model_config": json.dumps(TINY_CLASSIFIER), "batch_size": 4, "min_frequency": 1, "max_length": 32}
    elif recipe == "parsing":
        options |= {"model_config": json.dumps(TINY_PARSER), "batch_size": 8, "eval_batch_size": 4}
    elif recipe == "language_modeling":
        options |= {"model_config": json.dumps(TINY_DECODER), "batch_size": 4, "test_characters": "null"}
        options |= {"sequence_length": 16, "eval_stride": 16, "max_validation_samples": 8}
    else:
        options |= {"model_config": json.dumps(TRANSLATOR), "dropout": 0.1, "vocab_size": 60, "max_tokens": 64}
        options |= {"max_source_length": 32, "max_target_length": 32, "num_beams": 1, "cache_dir": data / "cache"}
    return flags({**options, **changes})


def flags(options: Mapping[str, object]) -> list[str]:
    """Return options as words of a command line."""
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def assert_refused(main: Callable[[list[str]], Any], argv: list[str], said: str, capsys: Any) -> None:
    """Check that a run ends on bad input with code 2 and one line, before it trains."""
    with pytest.raises(SystemExit) as ended:
        main(argv)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert said in error
    assert "Traceback" not in error
    assert not list(Path(argv[argv.index("--output_dir") + 1]).glob("checkpoint-*"))


def norms_of(model: Any) -> list[tuple[str, dict[str, Any]]]:
    """Return the names and settings of the swapped norms of a model."""
    norms = [module for module in model.modules() if getattr(module, "is_adanorm_module", False)]
    return [(norm.norm_name, norm.settings()) for norm in norms]


def stopped_and_resumed(run: Callable[[], Any], folder: Path) -> Any:
    """Stop `run` after the first checkpoint in `folder`, and return the result of a second call."""

    def ask_to_stop() -> None:
        while not list(folder.glob("checkpoint-*")):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask_to_stop, daemon=True).start()
    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == EXIT_RESUME
    assert not (folder / "results.json").exists()
    return run()
