"""The forest plot: every norm's difference from LayerNorm with its intervals, one panel per row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from comparison.paper import BASELINE, COLUMNS, ROWS
from comparison.report import style_of
from comparison.variants import in_order, kind, title_of

if TYPE_CHECKING:
    from comparison.gather import Row


def draw_forest(rows: Sequence[Row]) -> Any:
    """Return the figure; differences that favor the norm lie to the right of zero."""
    norms = [norm for norm in in_order(norm for row in rows for norm in row.norms) if norm != BASELINE]
    columns = min(len(rows), 2)
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(4.6 * columns + 1, lines * (0.36 * len(norms) + 1.1)), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes, row in zip(panels, rows, strict=False):
        sign = 1 if row.task.higher_is_better else -1
        axes.axvspan(-row.scores.margin, row.scores.margin, color="0.9", zorder=0)
        axes.axvline(0, color="0.5", linewidth=0.8)
        for place, norm in enumerate(reversed(norms)):
            color = style_of(kind(norm))["color"]
            paper = dict(zip(ROWS, COLUMNS[row.column][1], strict=True))
            if paper.get(norm) is not None and paper[BASELINE] is not None:
                axes.plot(sign * (paper[norm] - paper[BASELINE]), place, "x", color="0.35", markersize=6)
            found = row.scores.difference(norm)
            if found is None:
                continue
            for level, width in ((0.95, 1.2), (0.9, 3.5)):
                low, high = (sign * end for end in found.interval(level))
                axes.hlines(place, low, high, color=color, linewidth=width)
            axes.plot(sign * found.mean, place, "o", color=color, markersize=6)
        axes.set_yticks(range(len(norms)), [title_of(norm) for norm in reversed(norms)])
        axes.set_ylim(-0.7, len(norms) - 0.3)
        seeds = f"{len(row.seeds)} seeds"
        axes.set(title=f"{row.name}, {seeds}", xlabel=f"{row.task.label}, difference from LayerNorm → better")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(rows) :]:
        axes.set_visible(False)
    return figure
