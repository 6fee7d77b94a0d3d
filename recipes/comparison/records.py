"""Runs and their records.

A record is what tables, tests and reports need of a finished or diverged run, on one line of JSON: options, hashes of
the data, history, scores, and the outcome of each test example. It holds no weights, no texts or labels of the data,
and no paths. `compare.py` writes `records.jsonl` beside its tables, and accepts such files as
finished runs on any machine.
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
_COPIED = (
    *("validation", "test", "history", "steps", "steps_per_epoch", "best_step", "skipped_steps", "step", "parameters"),
    *("norm_modules", "train_samples", "train_tokens", "seconds_per_step", "train_samples_per_second"),
    *("peak_memory_mb", "chance", "num_processes", "mixed_precision", "versions", "content"),
)
_PATCH = frozenset(item.name for item in dataclasses.fields(PatchOptions))


class RecordError(ValueError):
    """The file in which a run recorded its end is broken."""


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

        Raises RecordError if the file cannot be read.
        """
        if self.adopted is not None:
            return self.adopted
        name = {"finished": "results.json", "diverged": "diverged.json"}.get(self.status)
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
        if "history" in (record := self.record):
            return record
        found = sorted(self.folder.glob("checkpoint-*/progress.json"), key=lambda path: path.stat().st_mtime)
        return json.loads(found[-1].read_text(encoding="utf-8")) if found else {}

    def outcomes(self, task: type[Task]) -> np.ndarray:
        """Return what the score needs of each test example, (examples, values)."""
        if self.adopted is not None:
            return decode(self.adopted["outcomes"])
        return task.outcomes(self.folder, self.record)


def outcome(run: Run) -> str:
    """Describe how a run ended."""
    return f"diverged at step {run.record['step']}" if run.status == "diverged" else run.status


def overfit_gap(record: Mapping[str, Any]) -> float:
    """Return the loss gap in nats: the validation loss at the last evaluation less the mean training loss of the steps
    since the evaluation before it.

    Only the training loss contains dropout and label smoothing, and its model is on average half an interval younger.
    So the gap may be negative, and only differences between norms say which one over-fits more. The gap is NaN where a
    loss is not finite or missing.
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


def stated(options_class: type[Any], options: Mapping[str, Any], norm: str) -> dict[str, Any]:
    """Return the options that affect results and differ from their defaults; files by name, without their folder."""
    default = json.loads(json.dumps(dataclasses.asdict(options_class())))
    names = options_that_change(options_class, "results", "onward") - set(OWN)
    names -= _PATCH if kind(norm) == BASELINE else {"norm"}
    found = {name: options[name] for name in sorted(names) if options.get(name, default[name]) != default[name]}
    return {name: _without_folder(value) if name.endswith("_file") else value for name, value in found.items()}


def _without_folder(files: Any) -> Any:
    return [Path(file).name for file in files] if isinstance(files, list) else Path(files).name


def to_record(
    run: Run, task: type[Task], options_class: type[Any], *, recipe: str, title: str, machine: str
) -> dict[str, Any]:
    """Return the record of a run that has ended."""
    if run.adopted is not None:
        return run.adopted
    result = run.record
    progress = {"history": [], "train_history": [], **run.progress}
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
        "train_history": [{"step": one["step"], "loss": _round(one["loss"])} for one in progress["train_history"]],
        "machine": machine,
    }
    if run.status == "finished" and result.get("test"):
        record["outcomes"] = encode(run.outcomes(task))
    return record


def _round(loss: float | None) -> float | None:
    return None if loss is None else float(f"{loss:.7g}")


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
        elif np.isin(column, (0, 1)).all():
            columns.append(["bits", len(column), _pack(np.packbits(column.astype(bool)))])
        else:
            whole = np.isfinite(column).all() and (column == column.astype("<u2")).all()
            kind_of = "<u2" if whole else "<f4"
            columns.append([kind_of, len(column), _pack(column.astype(kind_of))])
    return [len(outcomes), *columns]


def decode(encoded: Sequence[Any]) -> np.ndarray:
    """Return the array that `encode` was given, in double precision."""
    columns = []
    for column in encoded[1:]:
        if not isinstance(column, list):
            columns.append(np.full(encoded[0], float(column)))
            continue
        kind_of, size, text = column
        data = zlib.decompress(base64.b64decode(text))
        if kind_of == "bits":
            columns.append(np.unpackbits(np.frombuffer(data, np.uint8), count=size).astype(float))
        else:
            columns.append(np.frombuffer(data, kind_of).astype(float))
    return np.stack(columns, axis=1)


def _pack(values: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(values.tobytes(), 9)).decode()
