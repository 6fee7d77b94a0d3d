"""Reads `results.json` of finished runs, and prints a table of several.

python recipes/common/results.py outputs/demo/*          one line per run
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    packages = ("hf-adanorm", "torch", "transformers", "accelerate", "datasets")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def format_results(results: Sequence[dict[str, Any]]) -> str:
    """Return a plain table of runs of one recipe, one line per run."""
    metric = results[0]["metric"]

    def score(scores: dict[str, float] | None) -> str:
        value = (scores or {}).get(metric["score"])
        return "-" if value is None else f"{metric['scale'] * value:.{metric['decimals']}f}"

    columns = ("norm", "seed", "norms swapped", "parameters", "steps", "samples/s")
    rows = [(*columns[:5], f"validation {metric['label']}", f"test {metric['label']}", columns[5])]
    for run in results:
        speed = run["train_samples_per_second"]
        rows.append(
            (
                run["norm"],
                str(run["seed"]),
                str(run["norm_modules"] if run["norm"] != "layernorm" else 0),
                f"{run['parameters']:,}",
                str(run["steps"]),
                score(run["validation"]),
                score(run["test"]),
                "-" if speed is None else f"{speed:,.0f}",
            )
        )
    return align(rows)


def align(rows: Sequence[Sequence[str]]) -> str:
    """Return a plain table with a rule under its first row."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def main() -> None:
    paths = [Path(folder) / "results.json" for folder in sys.argv[1:]]
    if not paths:
        sys.exit(__doc__)
    if missing := [path for path in paths if not path.is_file()]:
        sys.exit(f"error: {missing[0]}: the run in this folder has not finished")
    print(format_results([json.loads(path.read_text(encoding="utf-8")) for path in paths]))


if __name__ == "__main__":
    main()
