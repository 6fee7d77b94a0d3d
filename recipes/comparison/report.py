"""The table and the HTML page of a comparison. Their words are in `templates/`."""

from __future__ import annotations

import base64
import json
import math
import os
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2

from comparison.paper import BASELINE, COLUMNS, paper_score
from comparison.plots import draw_curves, save_figure
from comparison.records import Run
from comparison.significance import LOOK_P, LOOKS
from hf_adanorm._tables import SORT, counted
from hf_adanorm.saving import write_file

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=jinja2.select_autoescape(["html"]),
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.globals |= {"baseline": BASELINE, "counted": counted, "looks": LOOKS, "look_p": LOOK_P, "sort": SORT}


def interval(ends: Sequence[float], decimals: int) -> str:
    """Return an interval as `[-0.10, +0.20]`."""
    return f"[{ends[0]:+.{decimals}f}, {ends[1]:+.{decimals}f}]"


def p_value(value: float) -> str:
    """Return a p-value with three decimals."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def mean_text(values: Iterable[float], decimals: int) -> str:
    """Return mean ± standard deviation; "" without a value."""
    values = list(values)
    if not all(map(math.isfinite, values)):
        return "not finite"
    spread = f" ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{decimals}f}{spread}" if values else ""


def score_cell(scores: Mapping[int, float], num_diverged: int, decimals: int) -> str:
    """Return mean ± standard deviation with the number of seeds, and how many diverged; "-" where none ended."""
    parts = [f"{mean_text(scores.values(), decimals)} (n={len(scores)})"] if scores else []
    return "; ".join([*parts, *([f"{num_diverged} diverged"] if num_diverged else [])]) or "-"


def to_markdown(table: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the first column to the left, the others to the right."""
    lines = ["| " + " | ".join(row) + " |" for row in table]
    lines.insert(1, "|---|" + "---:|" * (len(table[0]) - 1))
    return "\n".join(lines) + "\n"


def conclusion(summary: Mapping[str, Any]) -> str:
    """Return in a few words which norms differ from LayerNorm, or why nothing was tested."""
    return TEMPLATES.get_template("conclusion.txt").render(summary).strip()


def notes(summary: Mapping[str, Any]) -> list[str]:
    """Return what a reader must know to read the numbers."""
    return TEMPLATES.get_template("notes.txt").render(summary).strip().splitlines()


def score_table(summary: Mapping[str, Any]) -> list[list[str]]:
    """Return one row per norm: scores, differences from LayerNorm, loss gap, size and speed; no empty columns."""
    column, decimals = summary["column"], summary["decimals"]
    arrow = "higher" if summary["higher_is_better"] else "lower"
    head = ["model", f"{column} {COLUMNS[column]['metric']}, paper" if column else ""]
    head += [f"{summary['title']} {summary['label']}, ours, {summary['split']} ({arrow} is better)"]
    head += [
        "difference from LayerNorm [95 %]",
        "p",
        "p (Holm)",
        "relation",
        "loss gap",
        "gap less LayerNorm's [95 %]",
    ]
    table = [[*head, "parameters", "examples/s in training"]]
    for row in summary["rows"]:
        score = score_cell(row["scores"], len(row["diverged"]), decimals)
        found, gap, speed, ratios = (row[key] for key in ("difference", "gap_difference", "speed", "speed_ratios"))
        cells = [f"{found['mean']:+.{decimals}f} {interval(found['interval_95'], decimals)}"] if found else [""]
        cells += [p_value(found["p"]), p_value(found["p_holm"]), row["relation"]] if found else [""] * 3
        cells += [mean_text(row["gaps"].values(), 3)]
        cells += [f"{gap['mean']:+.3f} {interval(gap['interval_95'], 3)}" if gap else ""]
        cells += [f"{row['parameters']:,}" if row["parameters"] else "-", f"{speed:,.4g}" if speed else ""]
        cells[-1] += " ({:.2f}x to {:.2f}x)".format(*ratios) if ratios else ""
        score = "not finished" if score == "-" and row["unfinished"] else score
        table.append([row["title"], paper_score(column, row["norm"]) if column else "", score, *cells])
    says = [any(re.sub(r"[-+±0. \[\],]", "", cell) for cell in cells) for cells in zip(*table[1:], strict=True)]
    return [[cell for cell, kept in zip(line, says, strict=True) if kept] for line in table]


def write_report(folder: Path, summary: Mapping[str, Any], runs: Sequence[Run]) -> None:
    """Write `table.md`, `report.html` and the pictures of a comparison."""
    values = {**summary, "conclusion": conclusion(summary), "table": score_table(summary), "notes": notes(summary)}
    bullets = "\n".join(f"- {line}" for line in values["notes"])
    text = [f"# {summary['title']}", values["conclusion"], to_markdown(values["table"]), bullets]
    write_file(folder / "table.md", "\n\n".join([*text, f"    {summary['command']}\n"]))
    picture = save_figure(draw_curves(summary, runs), folder / "curves", dpi=200)
    links = ["" if run.adopted else quote(Path(os.path.relpath(run.folder, folder)).as_posix()) + "/" for run in runs]
    values |= {"runs": runs, "links": links, "picture": base64.b64encode(picture).decode()}
    values["options_text"] = json.dumps(summary["options"], indent=2, ensure_ascii=False)
    write_file(folder / "report.html", TEMPLATES.get_template("report.html").render(values))
