"""The scores of a comparison by norm and seed, their differences, and the summary that the report shows."""

from __future__ import annotations

import dataclasses
import math
import platform
import statistics
from collections.abc import Mapping, Sequence
from os import cpu_count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.options import OptionError
from common.results import versions
from common.task import Task
from comparison import significance
from comparison.choices import trained_alike
from comparison.paper import BASELINE, margin
from comparison.records import LAUNCHED, Run, overfit_gap
from comparison.significance import LOOKS, Difference, paired_difference
from comparison.variants import in_order, title_of


class Scores:
    """The scores of runs: of the test split, or of validation where a finished run was not tested."""

    def __init__(self, runs: Sequence[Run], task: type[Task], column: str | None):
        self.task, self.margin = task, margin(task.score, column)
        self.choices = {run.norm: run.choice for run in runs}
        self.by_norm: dict[str, dict[int, float]] = {norm: {} for norm in self.choices}
        self.gaps: dict[str, dict[int, float]] = {norm: {} for norm in self.choices}
        self.diverged: dict[str, dict[int, int]] = {norm: {} for norm in self.choices}
        self.examples: dict[tuple[str, int], np.ndarray] = {}
        records = [(run, run.record) for run in runs if run.status != "unfinished"]
        finished = [record for run, record in records if run.status == "finished"]
        self.split = "test" if all(record.get("test") for record in finished) else "validation"
        for run, record in records:
            if run.status == "diverged":
                self.diverged[run.norm][run.seed] = record["step"]
                continue
            score = record[self.split][task.score]  # null: not finite
            self.by_norm[run.norm][run.seed] = math.nan if score is None else score
            self.gaps[run.norm][run.seed] = overfit_gap(record)
            if self.split == "test":
                self.examples[run.norm, run.seed] = significance.example_scores(run.outcomes(task), task.score_of)
        sizes = {len(values) for values in self.examples.values()}
        if len(sizes) > 1:
            raise OptionError(f"the runs were tested on different numbers of examples: {sorted(sizes)}")
        self.num_test_examples = max(sizes, default=None)

    def difference(self, norm: str, other: str = BASELINE, *, by_gap: bool = False) -> Difference | None:
        """Test the difference of two norms over the seeds that both finished, and over the test examples.

        With `by_gap`, test the loss gaps, unless the norms were trained with different options.
        """
        if norm == other or not {norm, other} <= self.choices.keys():
            return None
        if by_gap and not trained_alike(self.choices[norm], self.choices[other]):
            return None
        values = self.gaps if by_gap else self.by_norm
        seeds = sorted(values[norm].keys() & values[other].keys())
        if by_gap or self.split == "validation":
            table = np.asarray([[values[norm][seed] - values[other][seed]] for seed in seeds])
        else:
            table = np.asarray([self.examples[norm, seed] - self.examples[other, seed] for seed in seeds])
        return paired_difference(table) if seeds else None

    def relation(self, norm: str, other: str = BASELINE, *, by_gap: bool = False) -> str:
        """Return `better`, `worse`, `level` or `open`, or "-" if one of the norms is missing.

        A norm that diverged with every seed is worse than one that finished. One that diverged with some seeds is not
        called better or level because of the others. No margin was fixed for gaps, so they are never level.
        """
        if norm == other or not {norm, other} <= self.choices.keys():
            return "-"
        ours, theirs = len(self.diverged[norm]), len(self.diverged[other])
        found = self.difference(norm, other, by_gap=by_gap)
        if by_gap:
            return "-" if ours or theirs else significance.relation(found, 0.0, higher_is_better=False)
        ran = [self.by_norm[name].keys() | self.diverged[name].keys() for name in (norm, other)]
        num_seeds = len(ran[0] & ran[1])
        if num_seeds >= LOOKS[0] and num_seeds in (ours, theirs) and ours != theirs:
            return "worse" if ours > theirs else "better"
        said = significance.relation(found, self.margin, higher_is_better=self.task.higher_is_better)
        survived = (ours and said in ("better", "level")) or (theirs and said in ("worse", "level"))
        return "open" if survived else said


def _as_dict(found: Difference | None) -> dict[str, Any] | None:
    """Return a difference as JSON values, with its 90 % and 95 % intervals."""
    if found is None:
        return None
    intervals = {"interval_90": found.interval(0.9), "interval_95": found.interval(0.95)}
    return {**dataclasses.asdict(found), "p": found.p, **intervals}


def _speed(ours: Sequence[Run], plain: Sequence[Run]) -> dict[str, Any]:
    """Return examples per second in training, the median over the seeds, and the range of its ratio to LayerNorm.

    The range is None where the seeds disagree on which norm is faster.
    """
    speeds, theirs = (
        {run.seed: speed for run in runs if (speed := run.record.get("train_samples_per_second"))}
        for runs in (ours, plain)
    )
    ratios = [speeds[seed] / theirs[seed] for seed in speeds.keys() & theirs.keys()] if ours != plain else []
    agreed = len(ratios) > 1 and (min(ratios) > 1) == (max(ratios) > 1)
    speed = statistics.median(speeds.values()) if speeds else None
    return {"speed": speed, "speed_ratios": (min(ratios), max(ratios)) if agreed else None}


def summarize(
    runs: Sequence[Run], search: Sequence[Run], task: type[Task], *, title: str, column: str | None, command: str
) -> dict[str, Any]:
    """Return everything that the report shows, as JSON values."""
    found = Scores(runs, task, column)
    plain = [run for run in runs if run.norm == BASELINE]
    differences = {norm: found.difference(norm) for norm in found.choices}
    p_holm = significance.holm({norm: one.p for norm, one in differences.items() if one})
    rows = []
    for norm in in_order(found.choices):
        ours, tried = ([run for run in group if run.norm == norm] for group in (runs, search))
        difference, scores = _as_dict(differences[norm]), found.by_norm[norm]
        rows.append(
            {
                "norm": norm,
                "title": title_of(norm),
                "scores": scores,
                "mean": statistics.fmean(scores.values()) if scores else None,
                "gaps": found.gaps[norm],
                "diverged": found.diverged[norm],
                "unfinished": [run.seed for run in ours if run.status == "unfinished"],
                "parameters": next((run.record["parameters"] for run in ours if run.record), None),
                "choice": found.choices[norm],
                "tried": max(1, len({tuple(run.choice.items()) for run in tried})),
                "tried_seeds": len({run.seed for run in tried}),
                "num_pairs": len(scores.keys() & found.by_norm.get(BASELINE, {}).keys()) if norm != BASELINE else 0,
                "difference": difference and {**difference, "p_holm": p_holm[norm]},
                "relation": found.relation(norm),
                "gap_difference": _as_dict(found.difference(norm, by_gap=True)),
                **_speed(ours, plain),
            }
        )
    finished = [run.record for run in [*plain, *runs] if run.status == "finished"]
    first = finished[0] if finished else {}
    shares, size = [record.get("chance") for record in finished], found.num_test_examples
    chance = max(shares) if shares and all(shares) else None
    bound = 100 * (chance + 2 * math.sqrt(chance * (1 - chance) / size)) if chance and size else -math.inf
    return {
        "title": title,
        "column": column,
        "split": found.split,
        **{name: getattr(task, name) for name in ("score", "label", "decimals", "higher_is_better")},
        "margin": found.margin,
        "rows": rows,
        **{name: first.get(name) for name in ("options", "steps", "steps_per_epoch", "train_samples", *LAUNCHED)},
        "data": _data_names(first.get("options", {})),
        "num_seeds": len({run.seed for run in runs}),
        "num_test_examples": size,
        "chance": chance,
        "at_chance": bool(finished) and all(row["mean"] <= bound for row in rows if row["scores"]),
        "command": command,
        "versions": versions(),
        "machine": machine(),
    }


def _data_names(options: Mapping[str, Any]) -> str:
    """Return the training files of a run with the folders that hold them, or the name of its data set."""
    files = options.get("train_file") or []
    names = ["/".join(Path(file).parts[-2:]) for file in ([files] if isinstance(files, str) else files)]
    return " ".join(names or [str(options[key]) for key in ("dataset_name", "dataset_config") if options.get(key)])


def machine() -> str:
    """Describe this machine in a few words."""
    count = torch.cuda.device_count()
    accelerators = f"{count} x {torch.cuda.get_device_name(0)}" if count else "no GPU"
    return f"{cpu_count()} CPU cores, {accelerators}, {platform.machine()}"
