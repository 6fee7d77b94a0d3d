"""The files of `hf-adanorm bench`: a CSV of every measurement, a table and a plot."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_adanorm.saving.files import write_file

from .timing import Measurement, clock_name

_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))


def check_installed() -> None:
    """Raise ImportError, naming the extra, before anything is measured."""
    try:
        import matplotlib
        import rich
    except ImportError as error:
        raise ImportError(f"the benchmark needs {error.name}: pip install 'hf-adanorm[cli,plots]'") from error
    del matplotlib, rich


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
    text = f"{result.ratio:.2f} ({result.ratio_low:.2f}..{result.ratio_high:.2f}) {_time(result.seconds)}"
    if result.level == "model":  # where a hundredth matters
        text = f"{result.ratio:.3f} ({result.ratio_low:.3f}..{result.ratio_high:.3f}) {_time(result.seconds)}"
    return text if result.tokens_per_second is None else f"{text}, {result.tokens_per_second:,.0f} tok/s"


def _time(seconds: float) -> str:
    for unit, name in _UNITS:
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 1e-9:.3g} ns"


def to_png(results: Sequence[Measurement], where: dict[str, Any]) -> bytes:
    """Ratios to nn.LayerNorm, a panel for each level, mode and task; whiskers are quartiles."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((r.level, r.mode, r.task) for r in results))
    figure = Figure(figsize=(13, 3.2 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axis, panel in zip(axes, panels, strict=True):
        chosen = [r for r in results if (r.level, r.mode, r.task) == panel]
        cases = list(dict.fromkeys((r.case, r.dtype) for r in chosen))
        norms = list(dict.fromkeys(r.norm for r in chosen))
        width = 0.8 / len(norms)
        for number, norm in enumerate(norms):
            by_case = {(r.case, r.dtype): r for r in chosen if r.norm == norm}
            at = [(index, by_case[case]) for index, case in enumerate(cases) if case in by_case]
            ratios = [r.ratio for _, r in at]
            whiskers = [
                [max(0.0, r.ratio - r.ratio_low) for _, r in at],
                [max(0.0, r.ratio_high - r.ratio) for _, r in at],
            ]
            where_x = [index + (number - (len(norms) - 1) / 2) * width for index, _ in at]
            axis.bar(where_x, ratios, width, yerr=whiskers, error_kw={"linewidth": 0.7}, label=norm)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_yscale("log")
        axis.set_ylabel("ratio of time")
        axis.set_title(", ".join(panel), fontsize=10)
        axis.set_xticks(range(len(cases)))
        axis.set_xticklabels([case if dtype == "float32" else f"{case}\n{dtype}" for case, dtype in cases], fontsize=8)
        axis.legend(fontsize=7, ncols=min(5, len(norms)))
    figure.supxlabel(", ".join(f"{key} {value}" for key, value in where.items() if value is not None), fontsize=8)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()
