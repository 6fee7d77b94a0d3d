"""Runs and their records.

A record is one line of JSON with what tables, tests and reports need of a run that ended. It holds options, hashes of
the data, history, scores, and the outcome of each test example; no weights, no paths, and no texts or labels of the
data. `compare.py` writes `records.jsonl`, and accepts such files as finished runs on any machine.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.options import OptionError, PatchOptions, options_that_change
from common.task import Task
from comparison.choices import OWN
from comparison.paper import BASELINE
from comparison.variants import kind, public_name
from hf_adanorm.saving import write_file

FORMAT = 1
# What a run's record says about its launch and its options do not.
LAUNCHED = ("num_processes", "mixed_precision")
_COPIED = (
    *("validation", "test", "history", "steps", "steps_per_epoch", "best_step", "skipped_steps", "step", "parameters"),
    *("norm_modules", "train_samples", "train_tokens", "seconds_per_step", "train_samples_per_second"),
    *("peak_memory_mb", "chance", *LAUNCHED, "versions", "content"),
)
PATCH = frozenset(item.name for item in dataclasses.fields(PatchOptions))


@dataclass
class Run:
    """One run of a recipe: where it is and what its folder or its record says of it."""

    norm: str
    seed: int
    folder: Path
    choice: dict[str, Any] = dataclasses.field(default_factory=dict)  # the point of the grid
    adopted: dict[str, Any] | None = None  # the record of a run that was made elsewhere

    @property
    def status(self) -> str:
        """`finished`, `diverged`, or `unfinished`."""
        if self.adopted is not None:
            return str(self.adopted["status"])
        if (self.folder / "results.json").is_file():
            return "finished"
        return "diverged" if (self.folder / "diverged.json").is_file() else "unfinished"

    @property
    def record(self) -> dict[str, Any]:
        """What the recipe wrote at the end of the run; empty until it has ended.

        Raises OptionError if the file cannot be read.
        """
        if self.adopted is not None:
            return self.adopted
        name = {"finished": "results.json", "diverged": "diverged.json"}.get(self.status)
        if name is None:
            return {}
        path = self.folder / name
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            record["options"]
        except (ValueError, LookupError, TypeError) as error:
            raise OptionError(f"{path} is not a result of a recipe ({error}): delete {self.folder}") from error
        return record

    @property
    def progress(self) -> dict[str, Any]:
        """The histories of losses and scores, also those of a run that did not finish."""
        if "history" in (record := self.record):
            return record
        found = sorted(self.folder.glob("checkpoint-*/progress.json"), key=lambda path: path.stat().st_mtime)
        return json.loads(found[-1].read_text(encoding="utf-8")) if found else {"history": [], "train_history": []}

    def outcomes(self, task: type[Task]) -> np.ndarray:
        """Return what the score needs of each test example, (examples, values)."""
        if self.adopted is not None:
            return decode(self.adopted["outcomes"])
        return task.outcomes(self.folder, self.record)

    def __str__(self) -> str:
        """Return how the run ended."""
        return f"diverged at step {self.record['step']}" if self.status == "diverged" else self.status


def loss_gaps(record: Mapping[str, Any]) -> dict[int, float]:
    """Return the loss gap in nats at each evaluation, by its step: the validation loss less the mean training loss of
    the steps since the evaluation before it.

    Only the training loss contains dropout and label smoothing, and its model is on average half an interval younger.
    So the gap may be negative, and only differences between norms say which one over-fits more. The gap is NaN where a
    loss is not finite or missing.
    """
    gaps, start = {}, 0
    for evaluation in record["history"]:
        end, validation = evaluation["step"], evaluation.get("loss")
        total = num_steps = before = 0
        for entry in record["train_history"]:  # the mean loss of the steps (before, step]
            steps = min(entry["step"], end) - max(before, start)
            before = entry["step"]
            if steps > 0:
                total += steps * (math.nan if entry["loss"] is None else entry["loss"])
                num_steps += steps
        gaps[end] = math.nan if validation is None or not num_steps else validation - total / num_steps
        start = end
    return gaps


def overfit_gap(record: Mapping[str, Any]) -> float:
    """Return the loss gap at the last evaluation; NaN without one."""
    return next(reversed(loss_gaps(record).values()), math.nan)


def stated(options_class: type[Any], options: Mapping[str, Any], norm: str) -> dict[str, Any]:
    """Return the options that affect results and differ from their defaults; files by name, without their folder."""
    default = json.loads(json.dumps(dataclasses.asdict(options_class())))
    names = options_that_change(options_class, "results", "onward") - set(OWN)
    names -= PATCH if kind(norm) == BASELINE else {"norm"}
    found = {name: options[name] for name in sorted(names) if options.get(name, default[name]) != default[name]}
    return {name: _without_folder(value) if name.endswith("_file") else value for name, value in found.items()}


def launched_unlike(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Return the name of what two records of a comparison differ in though it must be the same, or ""."""
    return next((name for name in LAUNCHED if one.get(name) != other.get(name)), "")


def _without_folder(files: Any) -> Any:
    return [Path(file).name for file in files] if isinstance(files, list) else Path(files).name


def to_record(
    run: Run, task: type[Task], options_class: type[Any], *, recipe: str, title: str, machine: str
) -> dict[str, Any]:
    """Return the record of a run that has ended."""
    if run.adopted is not None:
        return run.adopted
    result, progress = run.record, run.progress
    losses = [{**one, "loss": one["loss"] and float(f"{one['loss']:.7g}")} for one in progress["train_history"]]
    record = {
        "format": FORMAT,
        "recipe": recipe,
        "title": title,
        "norm": public_name(run.norm),
        "seed": run.seed,
        "status": run.status,
        "choice": run.choice,
        "options": stated(options_class, result["options"], run.norm),
        **{name: result[name] for name in _COPIED if name in result},
        "history": progress["history"],
        "train_history": losses,
        "machine": machine,
    }
    if run.status == "finished" and result.get("test"):
        record["outcomes"] = encode(run.outcomes(task))
    return record


def write_records(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write records as JSON lines, in the order of seeds and norms."""
    lines = []
    for record in sorted(records, key=lambda record: (record["seed"], record["norm"], str(record["choice"]))):
        steps = record["train_history"]
        compact = {**record, "train_history": [[one["step"] for one in steps], [one["loss"] for one in steps]]}
        lines.append(json.dumps(compact, ensure_ascii=False, allow_nan=False) + "\n")
    write_file(path, "".join(lines))


def read_records(path: Path) -> list[Run]:
    """Read the runs of a `records.jsonl`, or of the folder that holds one.

    Raises OptionError for a missing file, a line that is no record, or two records of the same run.
    """
    path = path / "records.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise OptionError(f"{path}: no such file; recipes/compare.py writes records.jsonl to its --output_dir")
    runs: dict[tuple[str, int], Run] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            steps, losses = record["train_history"]
            record["train_history"] = [{"step": s, "loss": v} for s, v in zip(steps, losses, strict=True)]
            if record["format"] != FORMAT or record["status"] not in ("finished", "diverged"):
                raise ValueError(f"format {record['format']}, status {record['status']}")
            run = Run(record["norm"], record["seed"], path.parent, record["choice"], record)
        except (ValueError, KeyError, TypeError) as error:
            raise OptionError(f"{path}, line {number}: not a run record of format {FORMAT} ({error})") from error
        if (run.norm, run.seed) in runs:
            raise OptionError(f"{path}, line {number}: a second record of {run.norm}, seed {run.seed}")
        runs[run.norm, run.seed] = run
    return list(runs.values())


def encode(outcomes: np.ndarray) -> list[Any]:
    """Encode each column of an array (examples, values) as a number where it is constant, as bits, as counts or as
    single-precision floats, the latter three as base64."""
    columns: list[Any] = []
    for column in np.asarray(outcomes).T:
        if (column == column[0]).all():
            columns.append(column[0].item() * 1)
            continue
        whole = np.isfinite(column).all() and (column == column.astype("<u2")).all()
        name = "bits" if whole and column.max() <= 1 else "<u2" if whole else "<f4"
        data = np.packbits(column.astype(bool)) if name == "bits" else column.astype(name)
        columns.append([name, len(column), base64.b64encode(zlib.compress(data.tobytes(), 9)).decode()])
    return [len(outcomes), *columns]


def decode(encoded: Sequence[Any]) -> np.ndarray:
    """Return the array that `encode` was given, in double precision."""
    columns = []
    for column in encoded[1:]:
        if not isinstance(column, list):
            columns.append(np.full(encoded[0], float(column)))
            continue
        name, size, text = column
        data = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8 if name == "bits" else name)
        columns.append((np.unpackbits(data, count=size) if name == "bits" else data).astype(float))
    return np.stack(columns, axis=1)
