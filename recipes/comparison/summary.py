"""The scores of a comparison by norm and seed, their differences, and the summary that the report shows."""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Mapping, Sequence
from os import cpu_count
from typing import Any

import numpy as np
import torch

from common.options import OptionError
from common.results import versions
from common.task import Task
from comparison import significance
from comparison.paper import BASELINE, margin
from comparison.records import Run, overfit_gap
from comparison.significance import Difference
from comparison.variants import trained_alike

# What a run's record says about its launch and its options do not.
LAUNCHED = ("num_processes", "mixed_precision")


class Scores:
    """The scores of the finished runs: of the test split, or of validation where a run was not tested."""

    def __init__(self, runs: Sequence[Run], task: type[Task], column: str | None):
        self.task, self.margin = task, margin(task.score, column)
        finished = [(run, run.record) for run in runs if run.status == "finished"]
        self.split = "test" if all(record.get("test") for _, record in finished) else "validation"
        self.by_norm: dict[str, dict[int, float]] = {}
        self.gaps: dict[str, dict[int, float]] = {}
        self.examples: dict[tuple[str, int], np.ndarray] = {}
        for run, record in finished:
            score = record[self.split][task.score]  # null: not finite
            self.by_norm.setdefault(run.norm, {})[run.seed] = math.nan if score is None else score
            self.gaps.setdefault(run.norm, {})[run.seed] = overfit_gap(record)
            if self.split == "test":
                self.examples[run.norm, run.seed] = significance.example_scores(run.outcomes(task), task.score_of)
        sizes = {len(values) for values in self.examples.values()}
        if len(sizes) > 1:
            raise OptionError(f"the runs were tested on different numbers of examples: {sorted(sizes)}")
        self.num_test_examples = max(sizes, default=None)

    def difference(self, norm: str, other: str = BASELINE) -> Difference | None:
        """Test the difference of two norms over the seeds that both finished, and over the test examples."""
        seeds = sorted(self.by_norm.get(norm, {}).keys() & self.by_norm.get(other, {}).keys())
        if self.split == "validation":
            return significance.difference_over_seeds(self.by_norm.get(norm, {}), self.by_norm.get(other, {}))
        if not seeds:
            return None
        ours, theirs = (np.stack([self.examples[name, seed] for seed in seeds]) for name in (norm, other))
        return significance.crossed_difference(ours, theirs)

    def gap_difference(self, norm: str, other: str = BASELINE) -> Difference | None:
        """Test the difference of the loss gaps of two norms over the seeds that both finished."""
        return significance.difference_over_seeds(self.gaps.get(norm, {}), self.gaps.get(other, {}))

    def relation(self, found: Difference | None) -> str:
        """Return `better`, `worse`, `level` or `open`: see `significance.relation`."""
        return significance.relation(found, self.margin, higher_is_better=self.task.higher_is_better)


def as_dict(found: Difference | None) -> dict[str, Any] | None:
    """Return a difference as JSON values, with its 90 % and 95 % intervals."""
    if found is None:
        return None
    intervals = {"interval_90": found.interval(0.9), "interval_95": found.interval(0.95)}
    return {"mean": found.mean, "p": found.p, "num_pairs": found.num_pairs, **intervals}


def _spread(values: Mapping[int, float]) -> dict[str, float | None]:
    """Return mean and standard deviation over seeds; NaN and none where a value is not finite."""
    if not all(map(math.isfinite, values.values())):
        return {"mean": math.nan, "sd": None}
    return {
        "mean": statistics.fmean(values.values()) if values else None,
        "sd": statistics.stdev(values.values()) if len(values) > 1 else None,
    }


def summarize(
    runs: Sequence[Run], search: Sequence[Run], task: type[Task], *, title: str, column: str | None, command: str
) -> dict[str, Any]:
    """Return everything that the report shows, as JSON values."""
    found = Scores(runs, task, column)
    choices = {run.norm: run.choice for run in runs}
    differences = {norm: found.difference(norm) for norm in choices if norm != BASELINE}
    p_holm = significance.holm({norm: one.p for norm, one in differences.items() if one})
    rows = []
    for norm in choices:
        ours = [run for run in runs if run.norm == norm]
        alike = norm != BASELINE and trained_alike(choices[norm], choices.get(BASELINE, {}))
        difference = differences.get(norm)
        rows.append(
            {
                "norm": norm,
                "scores": found.by_norm.get(norm, {}),
                **_spread(found.by_norm.get(norm, {})),
                "gaps": found.gaps.get(norm, {}),
                "gap": _spread(found.gaps.get(norm, {})),
                "diverged": {run.seed: run.record["step"] for run in ours if run.status == "diverged"},
                "unfinished": [run.seed for run in ours if run.status == "unfinished"],
                "parameters": next((run.record["parameters"] for run in ours if run.record), None),
                "choice": choices[norm],
                "tried": max(1, len({tuple(run.choice.items()) for run in search if run.norm == norm})),
                "tried_seeds": len({run.seed for run in search if run.norm == norm}),
                "difference": difference and {**(as_dict(difference) or {}), "p_holm": p_holm[norm]},
                "relation": found.relation(difference),
                "gap_difference": as_dict(found.gap_difference(norm)) if alike else None,
            }
        )
    tried = dict.fromkeys(name for run in search for name in run.choice)
    finished = [run for run in runs if run.status == "finished"]
    plain = min(finished, key=lambda run: run.norm != BASELINE).record if finished else {}
    return {
        "title": title,
        "column": column,
        "split": found.split,
        "score": task.score,
        "label": task.label,
        "decimals": task.decimals,
        "higher_is_better": task.higher_is_better,
        "margin": found.margin,
        "rows": rows,
        **{name: plain.get(name) for name in ("options", "steps", "train_samples", *LAUNCHED)},
        "grid": {
            name: list(dict.fromkeys(run.choice[name] for run in search if name in run.choice)) for name in tried
        },
        "num_test_examples": found.num_test_examples,
        "command": command,
        "versions": versions(),
        "machine": machine(),
    }


def machine() -> str:
    """Describe this machine in a few words."""
    count = torch.cuda.device_count()
    accelerators = f"{count} x {torch.cuda.get_device_name(0)}" if count else "no GPU"
    return f"{cpu_count()} CPU cores, {accelerators}, {platform.machine()}"
