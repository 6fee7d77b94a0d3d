"""The runs of a comparison of norms: what each recipe measures, what a run's folder tells, the summary of all runs."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import cpu_count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.results import versions
from common.task import Task
from comparison.contestants import trained_alike
from comparison.paper import BASELINE
from comparison.significance import Difference, bootstrap_scores, difference_over_seeds, holm, paired_difference

# What a run's record says of how it was launched, which its options do not.
LAUNCHED = ("num_processes", "mixed_precision")


class RecordError(ValueError):
    """The file in which a run wrote down its end is broken."""


@dataclass
class Run:
    """One run of a recipe: where it is and what its folder says of it."""

    norm: str
    seed: int
    folder: Path
    choice: dict[str, Any] = dataclasses.field(default_factory=dict)  # the point of the grid

    @property
    def status(self) -> str:
        """`finished`, `diverged`, or `unfinished`."""
        if (self.folder / "results.json").is_file():
            return "finished"
        return "diverged" if (self.folder / "diverged.json").is_file() else "unfinished"

    @property
    def record(self) -> dict[str, Any]:
        """What the recipe wrote at the end of the run; empty as long as it has not ended."""
        names = {"finished": "results.json", "diverged": "diverged.json"}
        name = names.get(self.status)
        if name is None:
            return {}
        path = self.folder / name
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RecordError(f"{path} cannot be read ({error}): delete {self.folder} to run it again") from error
        if not isinstance(record, dict) or "options" not in record:
            raise RecordError(f"{path} was not written by a recipe: delete {self.folder} to run it again")
        return record

    @property
    def progress(self) -> dict[str, Any]:
        """The histories of losses and scores, also those of a run that did not finish."""
        record = self.record
        if "history" in record:
            return record
        found = sorted(self.folder.glob("checkpoint-*/progress.json"), key=lambda path: path.stat().st_mtime)
        return json.loads(found[-1].read_text(encoding="utf-8")) if found else {}


def outcome(run: Run) -> str:
    """How a run ended, in words."""
    return f"diverged at step {run.record['step']}" if run.status == "diverged" else run.status


def overfit_gap(record: Mapping[str, Any]) -> float:
    """How much higher the loss is on validation data than in training, at the end of a run, in nats: the validation
    loss of the last evaluation less the mean training loss of the steps since the evaluation before it.

    Dropout and label smoothing are in the training loss alone, and the model of that mean is on average half an
    interval younger, so that the level says little: it may be negative. What differs between norms trained alike says
    which over-fits more. NaN where a loss is not finite or none was written down.
    """
    evaluations = [{"step": 0}, *record["history"]]
    start, end = (entry["step"] for entry in evaluations[-2:])
    total = num_steps = before = 0
    for entry in record["train_history"]:  # the mean loss of the steps (before, step]
        steps = min(entry["step"], end) - max(before, start)
        before = entry["step"]
        if steps > 0:
            total += steps * (math.nan if entry["loss"] is None else entry["loss"])
            num_steps += steps
    validation = evaluations[-1].get("loss")
    return math.nan if validation is None or not num_steps else validation - total / num_steps


def _spread(values: Mapping[int, float]) -> dict[str, float | None]:
    """Mean and standard deviation over seeds; where a value is not finite, NaN and none."""
    if not all(map(math.isfinite, values.values())):
        return {"mean": math.nan, "sd": None}
    return {
        "mean": statistics.fmean(values.values()) if values else None,
        "sd": statistics.stdev(values.values()) if len(values) > 1 else None,
    }


def summarize(
    runs: Sequence[Run],
    search: Sequence[Run],
    task: type[Task],
    *,
    title: str,
    column: str | None,
    command: str,
    num_resamples: int,
) -> dict[str, Any]:
    """Everything that the report shows, as JSON values. Scores are those of the test split, or without one of the
    validation split."""
    finished = [run for run in runs if run.status == "finished"]
    records = {id(run): run.record for run in finished}
    split = "test" if all(record["test"] for record in records.values()) else "validation"
    scores: dict[str, dict[int, float]] = {}
    for run in finished:
        score = records[id(run)][split][task.score]  # null: not finite
        scores.setdefault(run.norm, {})[run.seed] = (
            math.nan if score is None else score * run.record["metric"]["scale"]
        )
    over_examples = _over_examples(finished, scores, task, num_resamples) if split == "test" else {}
    gaps: dict[str, dict[int, float]] = {norm: {} for norm in scores}
    for run in finished:
        gaps[run.norm][run.seed] = overfit_gap(records[id(run)])
    choices = {run.norm: run.choice for run in runs}
    rows = [
        {
            "norm": norm,
            "scores": scores.get(norm, {}),
            **_spread(scores.get(norm, {})),
            "gaps": gaps.get(norm, {}),
            "gap": _spread(gaps.get(norm, {})),
            "diverged": {run.seed: run.record["step"] for run in runs if run.norm == norm and _diverged(run)},
            "unfinished": [run.seed for run in runs if run.norm == norm and run.status == "unfinished"],
            "parameters": next((run.record["parameters"] for run in runs if run.norm == norm and run.record), None),
            "choice": choices[norm],
            "tried": max(1, len({tuple(run.choice.items()) for run in search if run.norm == norm})),
            "tried_seeds": len({run.seed for run in search if run.norm == norm}),
            "over_examples": over_examples.get(norm),
            "over_seeds": _over_seeds(scores, norm),
            "gap_over_seeds": (
                _over_seeds(gaps, norm) if trained_alike(choices[norm], choices.get(BASELINE, {})) else None
            ),
        }
        for norm in choices
    ]
    tried = dict.fromkeys(name for run in search for name in run.choice)
    plain = records[id(min(finished, key=lambda run: run.norm != BASELINE))] if finished else {}
    return {
        "title": title,
        "column": column,
        "split": split,
        "score": task.score,
        "label": task.label,
        "scale": plain["metric"]["scale"] if plain else task.scale,
        "decimals": task.decimals,
        "higher_is_better": task.higher_is_better,
        "rows": rows,
        **{name: plain.get(name) for name in ("options", "steps", "train_samples", *LAUNCHED)},
        "grid": {
            name: list(dict.fromkeys(run.choice[name] for run in search if name in run.choice)) for name in tried
        },
        "num_resamples": num_resamples,
        "num_test_examples": _num_examples(finished, task, split),
        "command": command,
        "versions": versions(),
        "machine": f"{cpu_count()} CPU cores, {_accelerators()}, {platform.machine()}",
    }


def _diverged(run: Run) -> bool:
    return run.status == "diverged"


def _accelerators() -> str:
    count = torch.cuda.device_count()
    return f"{count} x {torch.cuda.get_device_name(0)}" if count else "no GPU"


def _num_examples(finished: Sequence[Run], task: type[Task], split: str) -> int | None:
    return len(task.per_example(finished[0].folder, finished[0].record)[0]) if finished and split == "test" else None


def _over_seeds(values: Mapping[str, Mapping[int, float]], norm: str) -> dict[str, Any] | None:
    """A norm's difference from LayerNorm over the seeds that both finished."""
    if norm == BASELINE or norm not in values or BASELINE not in values:
        return None
    found = difference_over_seeds(values[norm], values[BASELINE])
    return found and dataclasses.asdict(found)


def _over_examples(
    finished: Sequence[Run], scores: Mapping[str, Mapping[int, float]], task: type[Task], num_resamples: int
) -> dict[str, dict[str, Any]]:
    """Per norm its difference from LayerNorm over the test examples, with the seeds that both finished."""
    if not finished:
        return {}
    found = [task.per_example(run.folder, run.record) for run in finished]
    table = bootstrap_scores([rows for rows, _ in found], found[0][1], num_resamples=num_resamples)
    resampled = {(run.norm, run.seed): row for run, row in zip(finished, table, strict=True)}
    differences: dict[str, Difference] = {}
    for norm in scores.keys() - {BASELINE}:
        if seeds := sorted(scores[norm].keys() & scores.get(BASELINE, {}).keys()):
            ours, theirs = (np.stack([resampled[name, seed] for seed in seeds]) for name in (norm, BASELINE))
            difference = paired_difference(ours, theirs)
            if math.isfinite(difference.mean):  # a score that is not finite differs by no amount
                differences[norm] = difference
    adjusted = holm({norm: difference.p for norm, difference in differences.items()})
    return {norm: {**dataclasses.asdict(one), "p_holm": adjusted[norm]} for norm, one in differences.items()}
