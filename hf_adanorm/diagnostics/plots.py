"""Pictures of what norms do. They need matplotlib, imported on the first call.

Every function draws into `ax` (a new figure by default) and returns the Axes; `ax.figure.savefig("name.svg")` writes
PNG, SVG or PDF. The colours are Okabe and Ito's, which colour-blind readers can tell apart; lines differ in style and
marker as well, so that they can be told apart in black and white.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .log import HISTOGRAM_BINS, HISTOGRAM_RANGE, NormLog

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
    "grad_norm_before": "gradient norm of the layer before (loss)",
    "grad_norm_after": "gradient norm of the layer after (loss)",
}
DEPTH = "norm, in the order of the forward pass"

Curve = Sequence[float] | Mapping[int, float] | Tensor
"""Values at steps 1, 2, ..., or by step."""


def _figure(ax: Axes | Sequence[Axes] | None, columns: int = 1, size: tuple[float, float] = (6.0, 3.6)) -> Any:
    """`ax`, or the Axes of a new figure."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install matplotlib") from error
    if ax is None:
        ax = plt.subplots(1, columns, figsize=(size[0] * columns * (0.85 if columns > 1 else 1), size[1]))[1]
        plt.gcf().set_layout_engine("constrained")
    return ax


def _finish(ax: Axes, xlabel: str, ylabel: str, legend: Any = None) -> Axes:
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel, fontsize=9 if len(ylabel) > 40 else None)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(visible=True, which="major", linewidth=0.5, alpha=0.35)
    if legend is not None and len(ax.get_legend_handles_labels()[0]) > 0:
        ax.legend(loc=legend, fontsize=9, frameon=True, framealpha=0.85, edgecolor="none")
    return ax


def _style(index: int, marked: bool = True) -> dict[str, Any]:
    style: dict[str, Any] = {
        "color": COLORS[index % len(COLORS)],
        "linestyle": LINES[index % len(LINES)],
        "linewidth": 1.6,
    }
    if marked:
        style |= {"marker": MARKERS[index % len(MARKERS)], "markersize": 4.5}
    return style


def _logs(logs: NormLog | Mapping[str, NormLog]) -> Mapping[str, NormLog]:
    logs = {"": logs} if isinstance(logs, NormLog) else logs
    if not isinstance(logs, Mapping) or not all(isinstance(log, NormLog) for log in logs.values()):
        raise TypeError(f"expected a NormLog, or a mapping of labels to NormLogs, got {type(logs).__name__}")
    for label, log in logs.items():
        if not log.records:
            raise ValueError(f"the log{f' {label!r}' if label else ''} holds no records: no step was recorded")
    if not logs:
        raise ValueError("no log was given")
    return logs


def _depth_ticks(ax: Axes, count: int) -> None:
    stride = max(1, math.ceil(count / 14))
    ax.set_xticks(range(1, count + 1, stride))


def plot_depth(
    logs: NormLog | Mapping[str, NormLog],
    field: str = "grad_input_var",
    *,
    steps: tuple[int, int] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """One statistic by depth, a line for each log: the median over steps, the quartiles as a band.

    Args:
        logs: a log, or several by label, such as `{"AdaNorm": log_a, "LayerNorm": log_b}`.
        field: one of `log.FIELDS`.
        steps: only recorded steps from the first to the second number, both included.
        ax: where to draw.

    Raises:
        TypeError, ValueError: not a log, an empty one, no such field, or no recorded step in `steps`.
    """
    logs = _logs(logs)
    ax = _figure(ax)
    most = 0
    for index, (label, log) in enumerate(logs.items()):
        values = _chosen(log, field, steps)
        most = max(most, values.shape[1])
        depth = range(1, values.shape[1] + 1)
        low, middle, high = values.nanquantile(torch.tensor([0.25, 0.5, 0.75], dtype=values.dtype), dim=0)
        ax.plot(depth, middle.numpy(), label=label or None, **_style(index))
        ax.fill_between(depth, low.numpy(), high.numpy(), color=COLORS[index % len(COLORS)], alpha=0.15, linewidth=0)
    if not field.startswith(("share", "input")):
        ax.set_yscale("log")
    _depth_ticks(ax, most)
    return _finish(ax, DEPTH, LABELS[field], "best")


def plot_gradients(
    logs: NormLog | Mapping[str, NormLog], *, steps: tuple[int, int] | None = None, ax: Sequence[Axes] | None = None
) -> tuple[Axes, Axes]:
    """The paper's two quantities by depth, for several norms in one picture: `|mean|` (left) and variance (right) of
    the gradient that each norm passes on. `ax`: a pair of Axes; the rest as in `plot_depth`."""
    logs = _logs(logs)
    left, right = _figure(ax, columns=2)
    plot_depth(logs, "grad_input_mean", steps=steps, ax=left)
    plot_depth(logs, "grad_input_var", steps=steps, ax=right)
    if right.get_legend() is not None:
        right.get_legend().remove()
    return left, right


def plot_theorem(
    log: NormLog, *, steps: tuple[int, int] | None = None, ax: Sequence[Axes] | None = None
) -> tuple[Axes, Axes]:
    """Theorem 1 in one model: `|mean|` and variance of the gradient at each norm's output, at its input as it is, and
    at its input as it would be with mean and variance detached. Arguments as in `plot_gradients`."""
    logs = _logs(log)
    left, right = _figure(ax, columns=2)
    for axes, kind in ((left, "mean"), (right, "var")):
        for index, (where, label) in enumerate(
            (("output", "at the output"), ("detached", "at the input, if detached"), ("input", "at the input"))
        ):
            values = _chosen(logs[""], f"grad_{where}_{kind}", steps).nanmedian(dim=0).values
            axes.plot(range(1, len(values) + 1), values.numpy(), label=label, **_style(index))
        axes.set_yscale("log")
        _depth_ticks(axes, len(values))
        what = "|mean| of gradient, per row (loss)" if kind == "mean" else "variance of gradient, per row (loss²)"
        _finish(axes, DEPTH, what, "best" if kind == "mean" else None)
    return left, right


def _chosen(log: NormLog, field: str, steps: tuple[int, int] | None) -> Tensor:
    values = log.values(field)
    if steps is None:
        return values
    first, last = steps
    kept = [i for i, step in enumerate(log.steps) if first <= step <= last]
    if not kept:
        raise ValueError(f"no step from {first} to {last} was recorded; there are {log.steps[0]} to {log.steps[-1]}")
    return values[kept]


def plot_heatmap(log: NormLog, field: str = "grad_input_var", *, ax: Axes | None = None) -> Axes:
    """One statistic over steps (to the right) and depth (upwards), brighter is larger. Arguments: see `plot_depth`."""
    log = _logs(log)[""]
    ax = _figure(ax)
    from matplotlib.colors import LogNorm

    values = log.values(field).T
    positive = values[values > 0]
    scale = None
    if len(positive) and not field.startswith(("share", "input")):
        scale = LogNorm(float(positive.min()), float(positive.max()) * (1 + 1e-9))
    edges = (_edges(log.steps), _edges(range(1, len(values) + 1)))
    mesh = ax.pcolormesh(*edges, values.numpy(), norm=scale, cmap="cividis")
    ax.figure.colorbar(mesh, ax=ax).set_label(LABELS[field], fontsize=9)
    _finish(ax, "training step", DEPTH)
    ax.grid(visible=False)
    return ax


def _edges(centers: Sequence[int]) -> list[float]:
    """Borders of cells around `centers`: half-way between neighbours, as far beyond the first and the last."""
    middle = [(a + b) / 2 for a, b in itertools.pairwise(centers)] or [centers[0] + 0.5]
    first = 2 * centers[0] - middle[0]
    return [first, *middle, 2 * centers[-1] - middle[-1]] if len(centers) > 1 else [first, *middle]


def plot_losses(
    curves: Mapping[str, Curve],
    *,
    reference: float | None = None,
    smooth: int = 1,
    ylabel: str = "training loss (nats)",
    ax: Axes | None = None,
) -> Axes:
    """Losses over training steps, a line for each label.

    Args:
        curves: per label, the losses of steps 1, 2, ... or a mapping from step to loss.
        reference: a level to compare with, such as the loss before the patch, shown as a thin line.
        smooth: average over this many neighbouring values (fewer at the ends); 1 draws them as they are.
        ylabel: what is drawn, with its unit.
        ax: where to draw.

    Raises:
        ValueError: no curve, an empty one, or `smooth` below 1.
    """
    if smooth < 1:
        raise ValueError(f"smooth must be at least 1, got {smooth}")
    if not curves:
        raise ValueError("no curve was given")
    ax = _figure(ax)
    for index, (label, curve) in enumerate(curves.items()):
        pairs = list(curve.items() if isinstance(curve, Mapping) else enumerate(map(float, curve), start=1))
        if not pairs:
            raise ValueError(f"the curve {label!r} is empty")
        steps, values = zip(*pairs, strict=True)
        few = len(values) <= 25
        ax.plot(steps, _smoothed(values, smooth), label=label, **_style(index, marked=few))
    if reference is not None:
        ax.axhline(reference, color="#555555", linewidth=0.8, linestyle=":", label="before the patch")
    return _finish(ax, "training step", ylabel, "best")


def _smoothed(values: Sequence[float], window: int) -> list[float]:
    half = window // 2
    near = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in near]


def plot_phi(
    activations: NormLog | Tensor | None = None, *, C: float = 1.0, k: float = 0.1, ax: Axes | None = None
) -> Axes:
    """AdaNorm's phi(y) = C (1 - k y) and z = phi(y) y, with the histogram of real y on the right axis.

    Marked are y = 1/(2k), from where z falls, and y = 1/k, where phi changes its sign.

    Args:
        activations: a log recorded with `histogram=True` (all its norms together), or values of y; None: curves only.
        C, k: AdaNorm's constants; > 0.
        ax: where to draw.

    Raises:
        ValueError: C or k not > 0, or a log without histograms.
    """
    if not (C > 0 and k > 0):
        raise ValueError(f"C and k must be > 0, got C={C!r} and k={k!r}")
    counts = None
    if isinstance(activations, NormLog):
        if not activations.histograms:
            raise ValueError("the log holds no histograms: record it with watch_norms(..., histogram=True)")
        counts = torch.stack(list(activations.histograms.values())).sum(0)
    elif activations is not None:
        counts = torch.histc(
            activations.detach().double().cpu().clamp(*HISTOGRAM_RANGE), HISTOGRAM_BINS, *HISTOGRAM_RANGE
        )
    ax = _figure(ax)
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
    ax.plot(y.numpy(), phi.numpy(), label="φ(y) = C (1 - k y)", **_style(0, marked=False))
    ax.plot(y.numpy(), (phi * y).numpy(), label="z = φ(y) y", **_style(1, marked=False))
    ax.axhline(0, color="#555555", linewidth=0.6)
    for value, text in ((0.5 / k, "1/(2k)"), (1 / k, "1/k")):
        if value < high:
            ax.axvline(value, color="#555555", linewidth=0.8, linestyle=":")
            ax.text(value, 0.02, f" y = {text}", transform=ax.get_xaxis_transform(), fontsize=9, color="#333333")
    _finish(
        ax, "normalised activation y = N(x), in standard deviations", f"value (C = {C:g}, k = {k:g})", "center right"
    )
    if counts is not None:
        ax.spines["right"].set_visible(True)
    return ax
