"""The files of `hf-adanorm bench`: a CSV of every measurement, a table and a plot."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import io
import math
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_adanorm.diagnostics.plots import COLORS
from hf_adanorm.modeling_adanorm import NORM_CLASSES
from hf_adanorm.saving import write_file

from .timing import Measurement, clock_name

_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))


def check_installed() -> None:
    """Raise ImportError, naming the extra, before anything is measured."""
    for name in ("matplotlib", "rich"):
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"the benchmark needs {name}: pip install matplotlib rich")


def write(results: Sequence[Measurement], folder: Path, device: torch.device) -> None:
    """Write bench.csv, bench.txt and bench.png into `folder`, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    where = describe(device)
    write_file(folder / "bench.csv", to_csv(results, where).encode())
    write_file(folder / "bench.txt", to_text(results, where).encode())
    write_file(folder / "bench.png", to_png(results, where))


def describe(device: torch.device) -> dict[str, Any]:
    """What the figures hold for."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
        "clock": clock_name(device),
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }


def to_csv(results: Sequence[Measurement], where: dict[str, Any]) -> str:
    out = io.StringIO()
    rows = [{**dataclasses.asdict(result), **where} for result in results]
    writer = csv.DictWriter(out, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def to_text(results: Sequence[Measurement], where: dict[str, Any]) -> str:
    """The tables as plain text."""
    from rich.console import Console

    out = io.StringIO()
    console = Console(file=out, width=1000, color_system=None)
    for table in tables(results):
        console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in where.items() if value is not None))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def tables(results: Sequence[Measurement]) -> list[Any]:
    """One `rich` table for each level, mode, dtype and task: a row a norm, a column a case, in each cell the ratio to
    nn.LayerNorm, its quartiles and the median time. After those of a level and mode, one of the memory."""
    out = []
    for level, mode, dtype in dict.fromkeys((r.level, r.mode, r.dtype) for r in results):
        chosen = [r for r in results if (r.level, r.mode, r.dtype) == (level, mode, dtype)]
        to = {"patch": "the stock checkpoint, or per module to the smallest model"}.get(level, "nn.LayerNorm")
        for task in dict.fromkeys(r.task for r in chosen):
            title = f"{level}, {mode}, {dtype}, {task}: ratio to {to} (quartiles), median time"
            out.append(_table(title, [r for r in chosen if r.task == task], _cell))
        if any(r.bytes for r in chosen):
            out.append(_memory_table(chosen))
    return out


def _table(title: str, chosen: Sequence[Measurement], cell: Callable[[Measurement], str]) -> Any:
    from rich.table import Table

    table = Table("norm", title=title, title_justify="left")
    cases = list(dict.fromkeys(r.case for r in chosen))
    for case in cases:
        table.add_column(case, justify="right", no_wrap=True)
    cells = {(r.norm, r.case): cell(r) for r in chosen}
    for norm in dict.fromkeys(r.norm for r in chosen):
        table.add_row(norm, *(cells.get((norm, case), "") for case in cases))
    return table


def _memory_table(chosen: Sequence[Measurement]) -> Any:
    first = chosen[0]
    task = "forward" if first.level == "op" else "training step"
    what = "saved for the backward pass" if first.level == "op" else "peak beyond parameters and optimizer; parameters"
    chosen = [r for r in chosen if r.task == task]
    base = {r.case: r.bytes for r in chosen if r.norm == "layernorm"}

    def cell(result: Measurement) -> str:
        stock = base.get(result.case)
        if result.bytes is None or not stock:
            return ""
        text = f"{result.bytes / 1e6:.3f} ({result.bytes / stock:.3f})"
        return text if first.level == "op" else f"{text}; {result.parameters:,}"

    return _table(f"{first.level}, {first.mode}, {first.dtype}: MB {what} (ratio to nn.LayerNorm)", chosen, cell)


def _cell(result: Measurement) -> str:
    digits = 3 if result.level == "model" else 2  # where a hundredth matters
    ratio, low, high = (f"{value:.{digits}f}" for value in (result.ratio, result.ratio_low, result.ratio_high))
    text = f"{ratio} ({low}..{high}) {_time(result.seconds)}"
    return text if result.tokens_per_second is None else f"{text}, {result.tokens_per_second:,.0f} tok/s"


def _time(seconds: float) -> str:
    for unit, name in _UNITS:
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 1e-9:.3g} ns"


_TICKS = (0.1, 0.2, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50)


def draw(results: Sequence[Measurement], where: dict[str, Any]) -> Any:
    """Ratios to nn.LayerNorm, at most four panels: a line a norm, from the least to the most over the cases (shapes or
    models), with a mark at the median, in the norm's color of every picture. Quartiles of a case are in the table."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    drawn = [r for r in results if r.level != "patch"] or list(results)
    panels = list(dict.fromkeys((r.level, r.task) for r in drawn))[:4]
    variants = list(dict.fromkeys((r.mode, r.dtype) for r in drawn))
    names = [name for name in dict.fromkeys(r.norm for r in drawn) if name != "layernorm"]
    num_rows = math.ceil(len(panels) / 2)
    height = num_rows * (1.1 + 0.16 * len(names) * (1 + len(variants)))
    figure = Figure(figsize=(11, height), layout="constrained")
    axes = figure.subplots(num_rows, min(2, len(panels)), squeeze=False, sharey=True).flatten()
    for axis in axes[len(panels) :]:
        axis.remove()
    for axis, (level, task) in zip(axes, panels, strict=False):
        chosen = [r for r in drawn if (r.level, r.task) == (level, task)]
        for number, name in enumerate(names):
            for index, variant in enumerate(variants):
                ratios = sorted(r.ratio for r in chosen if r.norm == name and (r.mode, r.dtype) == variant)
                if not ratios:
                    continue
                y = number + (index - (len(variants) - 1) / 2) * 0.7 / len(variants)
                color = COLORS[list(NORM_CLASSES).index(name)] if name in NORM_CLASSES else "#777777"
                axis.plot([ratios[0], ratios[-1]], [y, y], color=color, linewidth=3, alpha=0.5, solid_capstyle="round")
                axis.plot(
                    statistics.median(ratios), y, "osD^"[index % 4], color=color, markersize=5,
                    markerfacecolor=color if variant[0] == "eager" else "white",
                )  # fmt: skip
        axis.axvline(1.0, color="#333333", linewidth=1)
        axis.set_xscale("log")
        low, high = axis.get_xlim()
        ticks = _TICKS if high > 2 * low else [n / 20 for n in range(1, 60)]
        axis.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.grid(axis="x", linewidth=0.4, alpha=0.6)
        over = "shapes" if level == "op" else "models"
        axis.set_title(f"{'operator' if level == 'op' else level}, {task}: range over {over}", fontsize=10)
        axis.set_xlabel("time relative to nn.LayerNorm", fontsize=9)
    for index, (mode, dtype) in enumerate(variants):
        fill = "#333333" if mode == "eager" else "white"
        axes[0].plot([], [], "osD^"[index % 4], color="#333333", markerfacecolor=fill, label=f"{mode}, {dtype}")
    axes[0].legend(fontsize=8)
    figure.supxlabel(", ".join(f"{key} {value}" for key, value in where.items() if value is not None), fontsize=8)
    return figure


def to_png(results: Sequence[Measurement], where: dict[str, Any]) -> bytes:
    out = io.BytesIO()
    draw(results, where).savefig(out, format="png", dpi=110)
    return out.getvalue()
