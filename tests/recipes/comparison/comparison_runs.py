"""Runs of classification that ended, written as a recipe writes them."""

import dataclasses
from pathlib import Path

import compare
from classification import TASK
from common.checkpoints import write_json
from common.options import parse_options
from comparison.records import Run, to_record, write_records
from tasks.options import ClassificationOptions

RECIPES = Path(compare.__file__).parent


def finish(folder, norm, seed, *, num_correct, losses=(0.5, 0.4), config="rt", choice=None, record=None, **changes):
    """Write a finished run with 1,000 test examples and its validation and training loss; return it."""
    options = parse_options(ClassificationOptions, ["--config", str(RECIPES / "configs" / f"{config}.yaml")])
    score = {"accuracy": num_correct / 10}
    result = {
        "options": {**dataclasses.asdict(options), "norm": norm, "seed": seed, **changes},
        "content": {"train_file": "abc"},
        "validation": score,
        "test": score,
        "parameters": 7,
        "steps": 20,
        "steps_per_epoch": 10,
        "seconds_per_step": 0.5,
        "train_samples": 8608,
        "history": [{"step": 20, "loss": losses[0]}],
        "train_history": [{"step": 20, "loss": losses[1]}],
        **(record or {}),
    }
    run = Run(norm, seed, folder / f"{norm}-{seed}".replace(":", ","), choice or {})
    run.folder.mkdir(parents=True, exist_ok=True)
    write_json(run.folder / "results.json", result)
    # The first num_correct examples are right, shifted a little from seed to seed.
    right = {(number + 7 * seed) % 1000 for number in range(num_correct)}
    answers = {"labels": [1] * 1000, "predictions": [int(number in right) for number in range(1000)]}
    write_json(run.folder / "test_predictions.json", answers)
    return run


def diverge(folder, norm, seed):
    """Write a run that diverged at step 5; return it."""
    run = finish(folder, norm, seed, num_correct=1)
    (run.folder / "results.json").rename(run.folder / "diverged.json")
    write_json(run.folder / "diverged.json", {**run.record, "step": 5, "test": None})
    return run


def write(path, runs, title="rt"):
    """Write the records of runs; return the path."""
    about = {"recipe": "classification", "title": title, "machine": "a test"}
    write_records(path, [to_record(run, TASK, ClassificationOptions, **about) for run in runs])
    return path
