"""The pictures: curves and scores of a comparison, and the forest plot of the paper's rows."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from comparison.paper import BASELINE, figure
from comparison.records import Run, loss_gaps
from comparison.variants import in_order, kind, title_of
from hf_adanorm import plots
from hf_adanorm.norms import BUILT_IN
from hf_adanorm.saving import write_file

# Every norm keeps its color in all pictures; the indices are those of plots.COLORS.
STYLE = {BASELINE: 6, **{norm: index for index, norm in enumerate(BUILT_IN)}}


def style_of(name: str, earlier: Sequence[str] = ()) -> dict[str, Any]:
    """Return color, line and marker of a variant; line and marker tell it from `earlier` ones of the same norm."""
    norm = kind(name)
    color = STYLE.get(norm, sum(map(ord, norm)) % len(plots.COLORS))
    other = (color + sum(kind(one) == norm for one in earlier)) % len(plots.LINES)
    return {"color": plots.COLORS[color], "linestyle": plots.LINES[other], "marker": plots.MARKERS[other]}


def save_figure(figure: Any, stem: Path, *, dpi: int, formats: Sequence[str] = ("svg", "png")) -> bytes:
    """Write a figure in each format; return the last one."""
    for suffix in formats:
        picture = io.BytesIO()
        figure.savefig(picture, format=suffix, dpi=dpi)
        write_file(stem.with_name(f"{stem.name}.{suffix}"), picture.getvalue())
    return picture.getvalue()


def draw_curves(summary: Mapping[str, Any], runs: Sequence[Run]) -> Any:
    """Return the figure of losses, their gap, validation score and final score, one color per norm."""
    picture = Figure(figsize=(15, 3.7), layout="constrained")
    left, gap, middle, right = picture.subplots(1, 4)
    norms = [row["norm"] for row in summary["rows"]]
    for position, norm in enumerate(norms):
        line = style_of(norm, norms[:position]) | {"linewidth": 1.6, "markersize": 4, "label": title_of(norm)}
        ours = [run for run in runs if run.norm == norm]
        finished = [run for run in ours if run.status == "finished"]
        histories = [run.progress for run in finished or ours]  # one that ended early would cut off the mean
        losses = [_series(history["train_history"], "loss") for history in histories]
        _curve(left, losses, {**line, "markevery": slice(-1, None)})  # at its end, or on a curve of one point
        validation = [_series(history["history"], "loss") for history in histories]
        _curve(left, validation, {**line, "linewidth": 0.8, "marker": "", "label": None})
        _curve(gap, [_finite(loss_gaps(history)) for history in histories], line)
        _curve(middle, [_series(history["history"], summary["score"]) for history in histories], line)
    for position, row in enumerate(reversed(summary["rows"])):
        color = style_of(row["norm"])["color"]
        values = list(row["scores"].values())
        if values:  # equal ones would hide each other on one line
            right.plot(values, position + np.linspace(-0.12, 0.12, len(values)), "o", color=color, alpha=0.45)
            right.plot(row["mean"], position, "|", color=color, markersize=22, markeredgewidth=2.5)
        elif row["diverged"]:
            right.text(0.5, position, "diverged", transform=right.get_yaxis_transform(), ha="center", color=color)
    right.set_yticks(range(len(norms)), [title_of(norm) for norm in reversed(norms)])
    right.set_ylim(-1.1, len(norms) - 0.4)
    arrow = "→ better" if summary["higher_is_better"] else "← better"
    left.set(xlabel="optimizer step", ylabel="loss (nats)", title="Training (thick) and validation (thin)")
    gap.set(xlabel="optimizer step", ylabel="validation less training loss (nats)", title="Loss gap")
    middle.set(xlabel="optimizer step", ylabel=summary["label"], title="Validation")
    right.set(xlabel=f"{summary['label']}  {arrow}", title=summary["split"].capitalize())
    right.text(0.5, 0.01, "dots: seeds, bars: means", transform=right.transAxes, ha="center", fontsize=8, alpha=0.7)
    if left.get_legend_handles_labels()[0]:
        left.legend(fontsize=8, frameon=False)
    for axes in (left, gap, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(visible=True, linewidth=0.5, alpha=0.35)
    return picture


def _series(entries: Sequence[Mapping[str, Any]], key: str) -> dict[int, float]:
    return {entry["step"]: entry[key] for entry in entries if entry.get(key) is not None}  # null: not finite


def _finite(values: Mapping[int, float]) -> dict[int, float]:
    return {step: value for step, value in values.items() if math.isfinite(value)}


def _curve(axes: Any, curves: Sequence[Mapping[int, float]], line: Mapping[str, Any]) -> None:
    """Draw the mean of the curves over the steps that all of them reached, with a bar from the lowest to the
    highest."""
    curves = [curve for curve in curves if curve]
    steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    if not steps:
        return
    values = np.asarray([[curve[step] for step in steps] for curve in curves])  # (seeds, steps)
    axes.plot(steps, values.mean(0), **line)
    axes.vlines(steps, values.min(0), values.max(0), color=line["color"], linewidth=1.2, alpha=0.3)


def draw_forest(rows: Sequence[Any]) -> Any:
    """Return the figure for rows of `comparison.gather`; differences that favor the norm lie to the right of zero."""
    norms = [norm for norm in in_order(norm for row in rows for norm in row.norms) if norm != BASELINE]
    columns = min(len(rows), 2)
    lines = -(-len(rows) // columns)
    picture = Figure(figsize=(4.6 * columns + 1, lines * (0.36 * len(norms) + 1.1)), layout="constrained")
    panels = list(picture.subplots(lines, columns, squeeze=False).flat)
    for axes, row in zip(panels, rows, strict=False):
        _panel(axes, row, norms)
    for axes in panels[len(rows) :]:
        axes.set_visible(False)
    return picture


def _panel(axes: Any, row: Any, norms: Sequence[str]) -> None:
    """Draw the differences of one row. One that would dwarf the others becomes an arrow with its value."""
    sign = 1 if row.task.higher_is_better else -1
    axes.axvspan(-row.scores.margin, row.scores.margin, color="0.9", zorder=0)
    axes.axvline(0, color="0.5", linewidth=0.8)
    differences = {norm: found for norm in norms if (found := row.scores.difference(norm))}
    reach = {norm: max(map(abs, found.interval(0.95))) for norm, found in differences.items()}
    edge = 4 * max(median(reach.values()), row.scores.margin) if reach else math.inf
    for place, norm in enumerate(reversed(norms)):
        color = style_of(norm)["color"]
        theirs, plain = figure(row.column, norm), figure(row.column, BASELINE)
        if theirs is not None and plain is not None:
            axes.plot(sign * (theirs - plain), place, "x", color="0.35", markersize=6)
        found = differences.get(norm)
        if found is None:
            continue
        if reach[norm] > edge:
            left = sign * found.mean < 0
            text = f"{'← ' * left}{found.mean:+.{row.task.decimals}f}{' →' * (not left)}"
            place_of = {"transform": axes.get_yaxis_transform(), "va": "center", "ha": "left" if left else "right"}
            axes.text(0.02 if left else 0.98, place, text, color=color, **place_of)
            continue
        for level, width in ((0.95, 1.2), (0.9, 3.5)):
            axes.hlines(place, *(sign * end for end in found.interval(level)), color=color, linewidth=width)
        axes.plot(sign * found.mean, place, "o", color=color, markersize=6)
    axes.set_yticks(range(len(norms)), [title_of(norm) for norm in reversed(norms)])
    axes.set_ylim(-0.7, len(norms) - 0.3)
    axes.set(
        title=f"{row.name}, {len(row.seeds)} seeds", xlabel=f"{row.task.label}, difference from LayerNorm → better"
    )
    axes.spines[["top", "right"]].set_visible(False)
