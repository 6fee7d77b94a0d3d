"""The forest plot: every norm's difference from LayerNorm with its intervals, one panel per row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from matplotlib.figure import Figure

from comparison.paper import BASELINE, COLUMNS, ROWS
from comparison.report import style_of
from comparison.variants import in_order, kind, title_of


def draw_forest(rows: Sequence[Any]) -> Any:
    """Return the figure for rows of `comparison.gather`; differences that favor the norm lie to the right of zero."""
    norms = [norm for norm in in_order(norm for row in rows for norm in row.norms) if norm != BASELINE]
    columns = min(len(rows), 2)
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(4.6 * columns + 1, lines * (0.36 * len(norms) + 1.1)), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes, row in zip(panels, rows, strict=False):
        _panel(axes, row, norms)
    for axes in panels[len(rows) :]:
        axes.set_visible(False)
    return figure


def _panel(axes: Any, row: Any, norms: Sequence[str]) -> None:
    """Draw the differences of one row. One that would dwarf the others becomes an arrow with its value."""
    sign = 1 if row.task.higher_is_better else -1
    axes.axvspan(-row.scores.margin, row.scores.margin, color="0.9", zorder=0)
    axes.axvline(0, color="0.5", linewidth=0.8)
    differences = {norm: found for norm in norms if (found := row.scores.difference(norm))}
    reach = {norm: max(map(abs, found.interval(0.95))) for norm, found in differences.items()}
    edge = 4 * max(median(reach.values()), row.scores.margin) if reach else math.inf
    paper = dict(zip(ROWS, COLUMNS[row.column][1], strict=True))
    for place, norm in enumerate(reversed(norms)):
        color = style_of(kind(norm))["color"]
        theirs, plain = paper.get(norm), paper[BASELINE]
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
