"""Plots of what norms do, drawn with matplotlib (`pip install matplotlib`).

Every function returns a matplotlib `Figure`: `plot_depth(log).savefig("depth.svg")`. A notebook shows it as the value
of a cell. Functions with one panel draw into `ax` if it is given. Lines differ in color (Okabe and Ito's palette, safe
for color-blind readers), style and marker.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from .log import HISTOGRAM_BINS, HISTOGRAM_RANGE, NormLog

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

# Activations have no unit, so a gradient has that of the loss (nats for a cross-entropy).
LABELS = {
    "input_mean": "mean of the input",
    "input_std": "standard deviation of the input, per row",
    "share_negative": "share of entries with y ≥ 1/k",
    "share_falling": "share of entries with y > 1/(2k)",
    "grad_output_mean": "|mean| of gradient at output, per row (loss)",
    "grad_output_var": "variance of gradient at output, per row (loss²)",
    "grad_detached_mean": "|mean| at input if detached, per row (loss)",
    "grad_detached_var": "variance at input if detached, per row (loss²)",
    "grad_input_mean": "|mean| of gradient at input, per row (loss)",
    "grad_input_var": "variance of gradient at input, per row (loss²)",
}
DEPTH = "norm, in the order of the forward pass"


def _figure(ax: Axes | None = None, columns: int = 1) -> tuple[Figure, Any]:
    """Return the figure and the Axes to draw into: `ax`, or those of a new figure (an array for several columns)."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install matplotlib") from error
    if ax is not None:
        return cast("Figure", ax.get_figure(root=True)), ax
    figure = plt.figure(figsize=(6.0, 3.6) if columns == 1 else (5.1 * columns, 3.6), layout="constrained")
    plt.close(figure)  # pyplot would show it in a notebook once more, beside the value of the cell
    return figure, figure.subplots(1, columns)


def _finish(ax: Axes, xlabel: str, ylabel: str, legend: Any = "best") -> None:
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel, fontsize=9 if len(ylabel) > 40 else None)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(visible=True, which="major", linewidth=0.5, alpha=0.35)
    if legend and ax.get_legend_handles_labels()[0]:
        ax.legend(loc=legend, fontsize=9, frameon=True, framealpha=0.85, edgecolor="none")


def _draw(ax: Axes, index: int, label: str, values: Tensor, band: bool = False) -> None:
    """Draw the median of (steps, norms) over the steps by depth, and the quartiles as a band."""
    depth = range(1, values.shape[1] + 1)
    low, middle, high = values.nanquantile(torch.tensor([0.25, 0.5, 0.75], dtype=values.dtype), dim=0)
    style = _style(index, marker=MARKERS[index % len(MARKERS)], markersize=4.5)
    ax.plot(depth, middle.numpy(), label=label or None, **style)
    if band:
        ax.fill_between(depth, low.numpy(), high.numpy(), color=style["color"], alpha=0.15, linewidth=0)
    ax.locator_params("x", integer=True)


def _style(index: int, **more: Any) -> dict[str, Any]:
    at = index % len(COLORS)
    return {"color": COLORS[at], "linestyle": LINES[at], "linewidth": 1.6, **more}


def _logs(logs: NormLog | Mapping[str, NormLog]) -> Mapping[str, NormLog]:
    """Return the logs by label, checked."""
    logs = {"": logs} if isinstance(logs, NormLog) else logs
    if not (isinstance(logs, Mapping) and logs and all(isinstance(log, NormLog) for log in logs.values())):
        raise TypeError(f"expected a NormLog, or a mapping of labels to NormLogs, got {logs!r:.80}")
    return logs


def _chosen(log: NormLog, field: str, steps: tuple[int, int] | None) -> Tensor:
    """Return the values (steps, norms) of the recorded steps between the two given ones, both included."""
    if not log.records:
        raise ValueError("the log is empty: no step was recorded")
    first, last = steps or (log.steps[0], log.steps[-1])
    kept = [i for i, step in enumerate(log.steps) if first <= step <= last]
    if not kept:
        raise ValueError(f"no step from {first} to {last} was recorded; there are {log.steps[0]} to {log.steps[-1]}")
    return log.values(field)[kept]


def plot_depth(
    logs: NormLog | Mapping[str, NormLog],
    field: str = "grad_input_var",
    *,
    steps: tuple[int, int] | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Plot one statistic by depth, one line per log: the median over steps, with the quartiles as a band.

    Args:
        logs: a log, or several by label, such as `{"AdaNorm": log_a, "LayerNorm": log_b}`.
        field: one of `log.FIELDS`.
        steps: the first and the last recorded step to use; None uses all.
        ax: the Axes to draw into; None makes a new figure.

    Raises:
        TypeError, ValueError: not a log, an empty log, an unknown field, or no recorded step in `steps`.
        ImportError: matplotlib is not installed.
    """
    logs = _logs(logs)
    figure, ax = _figure(ax)
    for index, (label, log) in enumerate(logs.items()):
        _draw(ax, index, label, _chosen(log, field, steps), band=True)
    if not field.startswith(("share", "input")):
        ax.set_yscale("log")
    _finish(ax, DEPTH, LABELS[field])
    return figure


def plot_gradients(logs: NormLog | Mapping[str, NormLog], *, steps: tuple[int, int] | None = None) -> Figure:
    """Plot the two quantities of the paper by depth: `|mean|` (left) and variance (right) of the gradient that each
    norm passes on. Arguments and errors as in `plot_depth`."""
    figure, (left, right) = _figure(columns=2)
    plot_depth(logs, "grad_input_mean", steps=steps, ax=left)
    plot_depth(logs, "grad_input_var", steps=steps, ax=right)
    if right.get_legend() is not None:
        right.get_legend().remove()
    return figure


def plot_theorem(log: NormLog, *, steps: tuple[int, int] | None = None) -> Figure:
    """Plot Theorem 1 for one model: `|mean|` (left) and variance (right) of the gradient at each norm's output, at its
    input, and at its input as it would be with mean and variance detached. Arguments and errors as in `plot_depth`."""
    if not isinstance(log, NormLog):
        raise TypeError(f"plot_theorem takes one log, such as logs['AdaNorm'], got {type(log).__name__}")
    figure, panels = _figure(columns=2)
    places = {"output": "at the output", "detached": "at the input, if detached", "input": "at the input"}
    for ax, kind, what in zip(panels, ("mean", "var"), ("|mean|", "variance"), strict=True):
        for index, (where, label) in enumerate(places.items()):
            _draw(ax, index, label, _chosen(log, f"grad_{where}_{kind}", steps))
        ax.set_yscale("log")
        unit, legend = ("loss", "best") if kind == "mean" else ("loss²", "")
        _finish(ax, DEPTH, f"{what} of gradient, per row ({unit})", legend)
    return figure


def plot_phi(
    activations: NormLog | Tensor | None = None, *, C: float = 1.0, k: float = 0.1, ax: Axes | None = None
) -> Figure:
    """Plot AdaNorm's phi(y) = C (1 - k y) and z = phi(y) y, with a histogram of real y on the right axis.

    Dotted lines mark y = 1/(2k), where z begins to fall, and y = 1/k, where phi changes its sign.

    Args:
        activations: a log recorded with `histogram=True` (all its norms together), or values of y; None: curves only.
        C, k: AdaNorm's settings; > 0.
        ax: the Axes to draw into; None makes a new figure.

    Raises:
        TypeError: `activations` is neither one log nor a tensor.
        ValueError: C or k is not > 0, or the log has no histograms.
        ImportError: matplotlib is not installed.
    """
    if not (C > 0 and k > 0):
        raise ValueError(f"C and k must be > 0, got C={C!r} and k={k!r}")
    counts = None
    if isinstance(activations, NormLog):
        if not activations.histograms:
            raise ValueError("the log has no histograms: record it with watch_norms(..., histogram=True)")
        counts = torch.stack(list(activations.histograms.values())).sum(0)
    elif isinstance(activations, Tensor):
        y = activations.detach().double().cpu().clamp(*HISTOGRAM_RANGE)
        counts = torch.histc(y, HISTOGRAM_BINS, *HISTOGRAM_RANGE)
    elif activations is not None:
        raise TypeError(f"plot_phi takes one log or a tensor of values of y, got {type(activations).__name__}")
    figure, ax = _figure(ax)
    low, high = HISTOGRAM_RANGE
    y = torch.linspace(low, high, 481)
    phi = C * (1 - k * y)
    if counts is not None:
        edges = torch.linspace(low, high, HISTOGRAM_BINS + 1)
        right = ax.twinx()
        right.stairs((counts / counts.sum()).numpy(), edges.numpy(), fill=True, color="#999999", alpha=0.45)
        right.set_yscale("log")
        right.set_ylabel(f"share of activations per {(high - low) / HISTOGRAM_BINS:g} of y")
        right.spines["top"].set_visible(False)
        ax.set_zorder(right.get_zorder() + 1)
        ax.patch.set_visible(False)
    ax.plot(y.numpy(), phi.numpy(), label="φ(y) = C (1 - k y)", **_style(0))
    ax.plot(y.numpy(), (phi * y).numpy(), label="z = φ(y) y", **_style(1))
    ax.axhline(0, color="#555555", linewidth=0.6)
    for value, text in ((0.5 / k, "1/(2k)"), (1 / k, "1/k")):
        if value < high:
            ax.axvline(value, color="#555555", linewidth=0.8, linestyle=":")
            ax.text(value, 0.02, f" y = {text}", transform=ax.get_xaxis_transform(), fontsize=9, color="#333333")
    xlabel = "normalized activation y = N(x), in standard deviations"
    _finish(ax, xlabel, f"value (C = {C:g}, k = {k:g})", "center right")
    ax.spines["right"].set_visible(counts is not None)
    return figure
