"""Tables, curves and the HTML page of a comparison of norms."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import math
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from matplotlib.figure import Figure

from common.options import NORMS
from comparison.contestants import in_order, kind, title_of
from comparison.paper import BASELINE, COLUMNS, paper_score
from comparison.runs import Run, outcome, overfit_gap
from hf_adanorm import plots
from hf_adanorm._tables import SORT, counted
from hf_adanorm.saving import write_file

# Every norm keeps its colour and line in all pictures; the indices are those of plots.COLORS.
STYLE = {BASELINE: 6, **{norm: facts.color for norm, facts in NORMS.items()}}


# Numbers as text


def our_score(row: Mapping[str, Any], decimals: int) -> str:
    """Mean and standard deviation over seeds, and what became of seeds that did not finish."""
    scores, mean, sd = row["scores"], row["mean"], row["sd"]
    parts = []
    if scores:
        finite = mean is not None and math.isfinite(mean)
        said = f"{mean:.{decimals}f}" if finite else "not finite"
        parts.append(f"{said}{f' ± {sd:.{decimals}f}' if finite and sd is not None else ''} (n={len(scores)})")
    if row["diverged"]:
        steps = ", ".join(str(step) for step in row["diverged"].values())
        parts.append(f"diverged at step {steps}" if not scores else f"{len(row['diverged'])} diverged at step {steps}")
    if not parts and row["unfinished"]:
        parts.append("not finished")
    return "; ".join(parts) or "-"


def difference_cells(row: Mapping[str, Any], decimals: int) -> tuple[str, str, str]:
    """Difference from LayerNorm with its interval over test examples, Holm's p, the interval over seeds."""
    examples = row["over_examples"]
    return (
        f"{examples['mean']:+.{decimals}f} {_interval(examples, decimals)}" if examples else "-",
        _p(examples["p_holm"]) if examples else "-",
        over_seeds(row["over_seeds"], decimals),
    )


def gap_cells(row: Mapping[str, Any]) -> tuple[str, str]:
    """By how much the validation loss is above that of training, and its difference from LayerNorm's over seeds."""
    mean, sd, found = row["gap"]["mean"], row["gap"]["sd"], row["gap_over_seeds"]
    if mean is None or math.isnan(mean):
        return "-", "-"
    spread = f" ± {sd:.3f}" if sd is not None else ""
    return f"{mean:.3f}{spread}", f"{found['mean']:+.3f} {over_seeds(found, 3)}" if found else "-"


def over_seeds(found: Mapping[str, Any] | None, decimals: int) -> str:
    """The interval and p of a difference over seeds."""
    return f"{_interval(found, decimals)}, p {_p(found['p'])}" if found else "-"


def _interval(found: Mapping[str, Any], decimals: int) -> str:
    return f"[{found['low']:+.{decimals}f}, {found['high']:+.{decimals}f}]"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def speeds(runs: Sequence[Run]) -> dict[str, str]:
    """Examples a second in training, the median over the runs of each norm, and as a multiple of LayerNorm's."""
    found: dict[str, list[float]] = {}
    for run in runs:
        if speed := run.record.get("train_samples_per_second"):
            found.setdefault(run.norm, []).append(speed)
    medians = {norm: statistics.median(values) for norm, values in found.items()}
    plain = medians.get(BASELINE)
    return {
        norm: f"{speed:,.4g}" + (f" ({speed / plain:.2f}x)" if plain and norm != BASELINE else "")
        for norm, speed in medians.items()
    }


def setting(summary: Mapping[str, Any], runs: Sequence[Run]) -> str:
    """Data, budget and size of the models in a line."""
    record = next((run.record for run in runs if run.status == "finished"), None)
    if record is None:
        return ""
    options, steps = record["options"], record["steps"]
    files = options.get("train_file") or []
    names = ["/".join(Path(file).parts[-2:]) for file in ([files] if isinstance(files, str) else files)]
    names = names or [str(options[key]) for key in ("dataset_name", "dataset_config") if options.get(key)]
    tested = f", {summary['num_test_examples']:,} to test on" if summary["num_test_examples"] else ""
    sizes = sorted({row["parameters"] for row in summary["rows"] if row["parameters"]})
    sizes = [f"{size:,}" for size in sizes[:: max(len(sizes) - 1, 1)]]  # the smallest and the largest
    return (
        f"Data: {' '.join(names)}, {record['train_samples']:,} examples to train on{tested}. "
        f"Budget: {counted(steps, 'update')} ({steps / record['steps_per_epoch']:.3g} epochs), "
        f"{counted(len({run.seed for run in runs}), 'seed')}. Model: {' to '.join(sizes)} parameters."
    )


def conclusion(summary: Mapping[str, Any]) -> str:
    """One sentence on which norms differ from LayerNorm beyond chance, in the direction of the metric."""
    better, worse, level = [], [], []
    for row in summary["rows"]:
        found = row["over_examples"]
        if row["norm"] == BASELINE or not found:
            continue
        gain = found["mean"] if summary["higher_is_better"] else -found["mean"]
        (level if found["p_holm"] >= 0.05 else better if gain > 0 else worse).append(title_of(row["norm"]))
    diverged = [title_of(row["norm"]) for row in summary["rows"] if row["diverged"] and not row["scores"]]
    lost = [
        f"{title_of(row['norm'])} diverged with {counted(len(row['diverged']), 'seed')}"
        for row in summary["rows"]
        if row["diverged"] and row["scores"]
    ]
    parts = [
        f"{', '.join(names[:-1])}{' and ' if names[1:] else ''}{names[-1]} {verb}"
        for names, verb in (
            (better, "scored better than LayerNorm"),
            (worse, "scored worse than LayerNorm"),
            (level, "cannot be told apart from LayerNorm"),
            (diverged, "diverged"),
        )
        if names
    ]
    if not better + worse + level:
        return "No difference from LayerNorm was tested." + (f" {', '.join(diverged)} diverged." if diverged else "")
    chance = "by a paired bootstrap over test examples at 5 %, corrected for the number of norms"
    partly = f" {', '.join(lost)}; the others alone were compared." if lost else ""
    return f"{'; '.join(parts)} ({chance}). The variation between seeds is not in this test.{partly}"


# Markdown and LaTeX


def paper_table(summary: Mapping[str, Any]) -> list[list[str]]:
    """A row a norm: the paper's column, where there is one, and ours."""
    column, arrow = summary["column"], "higher" if summary["higher_is_better"] else "lower"
    paper = [f"{column} {COLUMNS[column][0]}, paper"] if column else []
    table = [["model", *paper, f"{summary['title']} {summary['label']}, ours, {summary['split']} ({arrow} is better)"]]
    rows = {row["norm"]: row for row in summary["rows"]}
    for norm in in_order(rows):
        paper = [paper_score(column, norm)] if column else []
        table.append([title_of(norm), *paper, our_score(rows[norm], summary["decimals"])])
    return table


def difference_table(summary: Mapping[str, Any]) -> list[list[str]]:
    """Every norm's difference from LayerNorm."""
    table = [["model", "difference from LayerNorm [95 %]", "p (Holm)", "[95 %] over seeds"]]
    table[0] += ["loss gap", "gap less LayerNorm's [95 %] over seeds", "parameters"]
    rows = {row["norm"]: row for row in summary["rows"]}
    for norm in in_order(rows):
        row = rows[norm]
        cells = ("", "", "") if norm == BASELINE else difference_cells(row, summary["decimals"])
        gap, gap_difference = gap_cells(row)
        parameters = f"{row['parameters']:,}" if row["parameters"] else "-"
        table.append([title_of(norm), *cells, gap, "" if norm == BASELINE else gap_difference, parameters])
    return table


def to_markdown(table: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    lines = ["| " + " | ".join(row) + " |" for row in table]
    lines.insert(1, "|---|" + "---:|" * (len(table[0]) - 1))
    return "\n".join(lines) + "\n"


def to_latex(table: Sequence[Sequence[str]]) -> str:
    """A tabular for the booktabs package."""
    replace = {"&": r"\&", "%": r"\%", "_": r"\_", "±": r"$\pm$", "<": "$<$", "#": r"\#", "$": r"\$"}
    rows = [" & ".join("".join(replace.get(letter, letter) for letter in cell) for cell in row) for row in table]
    body = " \\\\\n".join(rows[1:])
    columns = "l" + "r" * (len(table[0]) - 1)
    return (
        f"% needs \\usepackage{{booktabs}}\n\\begin{{tabular}}{{{columns}}}\n\\toprule\n{rows[0]} \\\\\n\\midrule\n"
        f"{body} \\\\\n\\bottomrule\n\\end{{tabular}}\n"
    )


def notes(summary: Mapping[str, Any]) -> list[str]:
    """What a reader must know to read the numbers."""
    score = f"Mean ± standard deviation over n seeds of the {summary['split']} {summary['label']}"
    lines = [f"{score}; the checkpoint of each run was chosen on validation."]
    if summary["num_test_examples"]:
        lines.append(
            f"Differences: paired bootstrap over {summary['num_test_examples']:,} test examples, "
            f"{summary['num_resamples']:,} resamples, seeds paired."
        )
    lines.append(
        "Over seeds: paired t-test, not corrected for the number of norms. Loss gap: validation loss at the last "
        "evaluation less the mean training loss since the one before, in nats; dropout and label smoothing are in the "
        "training loss alone, so only differences between norms say something: a larger gap is more over-fitting."
    )
    if any(row["tried"] > 1 for row in summary["rows"]):
        chosen = [
            f"{title_of(row['norm'])} {', '.join(f'{k} {v}' for k, v in row['choice'].items()) or 'as it is'} "
            f"(of {row['tried']} tried)"
            for row in summary["rows"]
        ]
        seeds = max(row["tried_seeds"] for row in summary["rows"])
        by = "with the first seed" if seeds == 1 else f"by the mean over {seeds} seeds"
        lines.append(f"Chosen on validation {by}: {'; '.join(chosen)}. All else was the same for all norms.")
    else:
        lines.append("All norms had the same hyper-parameters but those in their names; none was tuned here.")
    if summary["column"]:
        lines.append(
            f"The paper's column is {summary['column']}; its models, budgets and data preparation are not ours in all "
            "respects, so compare differences between norms, not levels."
        )
    return lines


# Pictures


def draw(summary: Mapping[str, Any], runs: Sequence[Run]) -> Any:
    """Training loss, validation score and final score, a colour a norm; returns the figure."""
    figure = Figure(figsize=(12, 3.7), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    norms = [row["norm"] for row in summary["rows"]]
    for position, norm in enumerate(norms):
        style = STYLE[kind(norm)]
        # Contestants of one norm share its colour, and differ in lines and markers.
        other = (style + sum(kind(norm) == kind(earlier) for earlier in norms[:position])) % len(plots.LINES)
        line = {"color": plots.COLORS[style], "linestyle": plots.LINES[other], "marker": plots.MARKERS[other]}
        line |= {"linewidth": 1.6, "markersize": 4, "label": title_of(norm)}
        ours = [run for run in runs if run.norm == norm]
        finished = [run for run in ours if run.status == "finished"]
        histories = [run.progress for run in finished or ours]  # one that ended early would cut off the mean
        losses = [_series(history, "train_history", "loss") for history in histories]
        _curve(left, losses, {**line, "markevery": slice(-1, None)})  # at its end, or on a curve of one point
        _curve(middle, [_series(h, "history", summary["score"], summary["scale"]) for h in histories], line)
    tested = False
    for position, row in enumerate(reversed(summary["rows"])):
        color = plots.COLORS[STYLE[kind(row["norm"])]]
        values = list(row["scores"].values())
        if row["over_examples"]:  # around the mean of this norm, as wide as the interval of the difference
            low, high = (
                row["mean"] + row["over_examples"][end] - row["over_examples"]["mean"] for end in ("low", "high")
            )
            right.hlines(position, low, high, color=color, linewidth=1.5, alpha=0.7)
            tested = True
        if values:
            beside = position + 0.12 * (np.arange(len(values)) - (len(values) - 1) / 2)  # or equal ones would hide
            right.plot(values, beside, "o", color=color, alpha=0.45, markersize=6, clip_on=False)
            right.plot(row["mean"], position, "|", color=color, markersize=22, markeredgewidth=2.5)
        elif row["diverged"]:
            right.text(0.5, position, "diverged", transform=right.get_yaxis_transform(), ha="center", color=color)
    right.set_yticks(range(len(norms)), [title_of(norm) for norm in reversed(norms)])
    right.set_ylim(-1.1, len(norms) - 0.4)
    arrow = "→ better" if summary["higher_is_better"] else "← better"
    left.set(xlabel="optimiser step", ylabel="training loss (nats)", title="Training")
    middle.set(xlabel="optimiser step", ylabel=summary["label"], title="Validation")
    right.set(xlabel=f"{summary['label']}  {arrow}", title=summary["split"].capitalize())
    about = "dots: seeds, bars: means" + (", lines: 95 % interval\nof the difference from LayerNorm" if tested else "")
    right.text(0.5, 0.01, about, transform=right.transAxes, ha="center", va="bottom", fontsize=8, alpha=0.7)
    handles = left.get_legend_handles_labels()
    if handles[0]:
        left.legend(*handles, fontsize=8, frameon=False)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(visible=True, linewidth=0.5, alpha=0.35)
    return figure


def _series(progress: Mapping[str, Any], history: str, key: str, scale: float = 1.0) -> dict[int, float]:
    entries = progress.get(history, [])
    return {entry["step"]: entry[key] * scale for entry in entries if entry.get(key) is not None}  # null: not finite


def _curve(axes: Any, curves: Sequence[Mapping[int, float]], line: Mapping[str, Any]) -> None:
    """The mean of the curves over the steps that all of them reached, with a band, or at a single step a bar, from the
    lowest to the highest."""
    curves = [curve for curve in curves if curve]
    if not curves:
        return
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    if not steps:
        return
    values = np.asarray([[curve[step] for step in steps] for curve in curves])  # (seeds, steps)
    axes.plot(steps, values.mean(0), **line)
    if len(curves) > 1:
        if len(steps) == 1:
            axes.vlines(steps, values.min(0), values.max(0), color=line["color"], linewidth=1.2)
        axes.fill_between(steps, values.min(0), values.max(0), color=line["color"], alpha=0.15, linewidth=0)


# Files


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows with any keys; a key that a row does not have stays empty."""
    text = io.StringIO()
    fields = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, text.getvalue())


def save_figure(figure: Any, stem: Path, *, dpi: int) -> dict[str, bytes]:
    """Write a figure as `stem`.png and `stem`.svg; returns both, by their format."""
    pictures = {}
    for suffix in ("png", "svg"):
        picture = io.BytesIO()
        figure.savefig(picture, format=suffix, dpi=dpi)
        pictures[suffix] = picture.getvalue()
        write_file(stem.with_name(f"{stem.name}.{suffix}"), pictures[suffix])
    return pictures


def run_rows(runs: Sequence[Run], search: Sequence[Run]) -> list[dict[str, Any]]:
    """A row a run: how it ended, its scores, what it cost."""
    rows = []
    for stage, group in (("search", search), ("run", runs)):
        for run in group:
            record = run.record
            row = {"stage": stage, "norm": run.norm, "seed": run.seed, "outcome": outcome(run), **run.choice}
            for split in ("validation", "test"):
                row |= {f"{split}_{name}": value for name, value in (record.get(split) or {}).items()}
            row["loss_gap"] = overfit_gap(record) if run.status == "finished" else None
            costs = ("best_step", "steps", "skipped_steps", "parameters", "num_processes", "seconds_per_step")
            costs += ("train_samples_per_second", "peak_memory_mb", "command")
            rows.append(row | {name: record.get(name) for name in costs})
    return rows


def curve_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Every logged loss and score in long form."""
    rows = []
    for run in runs:
        progress = run.progress
        for split, history in (("train", "train_history"), ("validation", "history")):
            for entry in progress.get(history, []):
                rows += [
                    {"norm": run.norm, "seed": run.seed, "split": split, "step": entry["step"], "name": k, "value": v}
                    for k, v in entry.items()
                    if k not in {"step", "epoch"}
                ]
    return rows


def write_report(folder: Path, summary: Mapping[str, Any], runs: Sequence[Run], search: Sequence[Run]) -> None:
    """All files of a comparison but `comparison.json`."""
    table, differences = paper_table(summary), difference_table(summary)
    bullets = "\n".join(f"- {line}" for line in notes(summary))
    text = f"# {summary['title']}\n\n{conclusion(summary)}\n\n{to_markdown(table)}\n{to_markdown(differences)}\n"
    write_file(folder / "table.md", f"{text}{bullets}\n\n    {summary['command']}\n")
    write_file(folder / "table.tex", f"{to_latex(table)}\n{to_latex(differences)}")
    write_csv(folder / "runs.csv", run_rows(runs, search))
    write_csv(folder / "curves.csv", curve_rows(runs))
    figure = draw(summary, runs)
    pictures = save_figure(figure, folder / "curves", dpi=200)
    write_file(folder / "report.html", page(summary, runs, pictures["png"], folder))


_CSS = """
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.2rem auto; max-width: 1220px; padding: 0 1.2rem; }
h1 { font-size: 1.35rem; margin: 0 0 .2rem; } p.lead { margin: .2rem 0 .8rem; font-size: 1.02rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .22rem .6rem; text-align: right; border-bottom: 1px solid #8884; }
th { cursor: pointer; border-bottom: 2px solid #888; vertical-align: bottom; font-weight: 600; max-width: 13rem; }
th:first-child, td:first-child { text-align: left; white-space: nowrap; }
img { width: 100%; height: auto; background: white; border-radius: 4px; margin: .8rem 0 .3rem; }
details { margin: .5rem 0; } summary { cursor: pointer; font-weight: 600; }
ul { margin: .3rem 0; padding-left: 1.2rem; font-size: .88rem; } .scroll { overflow-x: auto; }
pre, details { overflow-x: auto; font-size: .82rem; }
"""


def page(summary: Mapping[str, Any], runs: Sequence[Run], picture: bytes, folder: Path) -> str:
    """The HTML report, one file that needs no other: setting, conclusion, table, curves; below, how every run ended,
    with a link to its folder, as it lies beside `folder`, where the page goes."""
    escape = html.escape
    source = base64.b64encode(picture).decode()
    rows = run_rows(runs, [])
    shown = ["norm", "seed", "outcome", "best_step", "steps", "seconds_per_step", "peak_memory_mb"]
    shown[3:3] = sorted({key for row in rows for key in row if key.startswith(("validation_", "test_"))})
    every = [[key.replace("_", " ") for key in shown], *([_cell(row.get(key)) for key in shown] for row in rows)]
    links = [quote(Path(os.path.relpath(run.folder, folder)).as_posix()) + "/" for run in runs]
    options = next((run.record["options"] for run in runs if run.record), {})
    versions = ", ".join(f"{name} {value}" for name, value in summary["versions"].items())
    bullets = "".join(f"<li>{escape(line)}</li>" for line in notes(summary))
    speed = speeds(runs)
    column = [
        "examples/s in training",
        *(speed.get(norm, "-") for norm in in_order(row["norm"] for row in summary["rows"])),
    ]
    parts = zip(paper_table(summary), column, difference_table(summary), strict=True)
    table = [[*scores, pace, *differences[1:]] for scores, pace, differences in parts]  # the same norms in one order
    title = escape(f"Norms compared: {summary['title']}")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>{_CSS}</style></head><body>
<h1>{title}</h1>
<p class="lead">{escape(conclusion(summary))}</p>
<p>{escape(setting(summary, runs))}</p>
<div class="scroll">{_html_table(table)}</div>
<img alt="Training loss, validation score and final score of every norm" src="data:image/png;base64,{source}">
<ul>{bullets}</ul>
<details><summary>Every run</summary><div class="scroll">{_html_table(every, links)}</div></details>
<details><summary>Command, options, versions</summary>
<pre>{escape(summary["command"])}

{escape(json.dumps(options, indent=2, ensure_ascii=False))}

{escape(versions)}
{escape(summary["machine"])}</pre></details>
</body></html>
"""


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def _html_table(table: Sequence[Sequence[str]], links: Sequence[str] = ()) -> str:
    """A click on a heading sorts by it. `links`: where the first cell of each row leads."""
    head = "".join(f'<th onclick="{SORT}">{html.escape(cell)}</th>' for cell in table[0])
    whole = re.compile(r"\[[^]]*\]|p [\d.]+|± [\d.]+")  # an interval, a p, a deviation: not broken over lines
    rows = [
        [f"<td>{whole.sub(lambda m: m[0].replace(' ', '&nbsp;'), html.escape(cell))}</td>" for cell in row]
        for row in table[1:]
    ]
    for row, link in zip(rows, links, strict=False):
        row[0] = f'<td><a href="{html.escape(link)}">{row[0][4:-5]}</a></td>'
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
