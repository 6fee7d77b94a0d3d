"""Tables, curves and the HTML page of a comparison of norms."""

from __future__ import annotations

import base64
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

from comparison.paper import BASELINE, COLUMNS, paper_score
from comparison.records import Run, outcome
from comparison.significance import LOOK_P, LOOKS
from comparison.variants import in_order, kind, title_of
from hf_adanorm import plots
from hf_adanorm._tables import SORT, counted
from hf_adanorm.norms import BUILT_IN
from hf_adanorm.saving import write_file

# Every norm keeps its color and line in all pictures; the indices are those of plots.COLORS.
STYLE = {BASELINE: 6, **{norm: index for index, norm in enumerate(BUILT_IN)}}


def style_of(norm: str, offset: int = 0) -> dict[str, Any]:
    """Return color, line and marker of a norm; `offset` tells variants of one norm apart by line and marker."""
    color = STYLE.get(norm, sum(map(ord, norm)) % len(plots.COLORS))
    other = (color + offset) % len(plots.LINES)
    return {"color": plots.COLORS[color], "linestyle": plots.LINES[other], "marker": plots.MARKERS[other]}


# Numbers as text


def interval(ends: Sequence[float], decimals: int) -> str:
    """Return an interval as `[-0.10, +0.20]`."""
    return f"[{ends[0]:+.{decimals}f}, {ends[1]:+.{decimals}f}]"


def p_value(value: float) -> str:
    """Return a p-value with three decimals."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def our_score(row: Mapping[str, Any], decimals: int) -> str:
    """Return mean and standard deviation over seeds, and what became of seeds that did not finish."""
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


def gap_cells(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return the loss gap, and its difference from LayerNorm's."""
    mean, sd, found = row["gap"]["mean"], row["gap"]["sd"], row["gap_difference"]
    if mean is None or math.isnan(mean):
        return "-", "-"
    spread = f" ± {sd:.3f}" if sd is not None else ""
    beside = f"{found['mean']:+.3f} {interval(found['interval_95'], 3)}" if found else "-"
    return f"{mean:.3f}{spread}", beside


def speeds(runs: Sequence[Run]) -> dict[str, str]:
    """Return examples per second in training, the median over the seeds of each norm.

    The ratio to LayerNorm is added with its range over seeds, unless the seeds disagree on which norm is faster.
    """
    found: dict[str, dict[int, float]] = {}
    for run in runs:
        if speed := run.record.get("train_samples_per_second"):
            found.setdefault(run.norm, {})[run.seed] = speed
    said = {norm: f"{statistics.median(by_seed.values()):,.4g}" for norm, by_seed in found.items()}
    plain = found.get(BASELINE, {})
    for norm, by_seed in found.items():
        ratios = [by_seed[seed] / plain[seed] for seed in by_seed.keys() & plain.keys()]
        if norm != BASELINE and len(ratios) > 1 and (min(ratios) > 1) == (max(ratios) > 1):
            said[norm] += f" ({min(ratios):.2f}x to {max(ratios):.2f}x)"
    return said


def setting(summary: Mapping[str, Any], runs: Sequence[Run]) -> str:
    """Describe data, budget and size of the models in a line."""
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


def at_chance(summary: Mapping[str, Any], runs: Sequence[Run]) -> str:
    """Return a sentence where no norm scores above the share of the largest class, or ""."""
    shares = [run.record.get("chance") for run in runs if run.status == "finished"]
    if not shares or not all(shares) or not summary["num_test_examples"]:
        return ""
    share = max(shares)
    bound = share + 2 * math.sqrt(share * (1 - share) / summary["num_test_examples"])
    means = [row["mean"] for row in summary["rows"] if row["scores"]]
    if any(mean is None or not mean <= 100 * bound for mean in means):
        return ""
    return (
        f"No norm learned the task: all scores are at chance ({100 * share:.1f} %, the share of the largest class), "
        "so they do not compare norms. Train longer, or change the learning rate. "
    )


_VERDICTS = {
    "better": "scored better than LayerNorm",
    "worse": "scored worse than LayerNorm",
    "level": "is level with LayerNorm",
    "open": "cannot be told apart from LayerNorm",
}


def conclusion(summary: Mapping[str, Any], runs: Sequence[Run] = ()) -> str:
    """Return one or two sentences: which norms differ from LayerNorm, or why nothing was tested."""
    rows = [row for row in summary["rows"] if row["norm"] != BASELINE]
    lost = [
        f"{title_of(row['norm'])} diverged with {counted(len(row['diverged']), 'seed')}"
        for row in summary["rows"]
        if row["diverged"]
    ]
    told = f" {'; '.join(lost)}." if lost else ""
    tested = [row for row in rows if row["difference"]]
    num_seeds = min((row["difference"]["num_pairs"] for row in tested), default=0)
    if not tested:
        return at_chance(summary, runs) + f"No difference was tested: {_why_not(summary)}.{told}"
    if num_seeds < LOOKS[0]:
        return at_chance(summary, runs) + (
            f"No verdict: {counted(num_seeds, 'seed')} per norm, and the first planned look is at {LOOKS[0]}. "
            f"The table shows differences with their intervals.{told}"
        )
    parts = []
    for said, verb in _VERDICTS.items():
        names = [title_of(row["norm"]) for row in tested if row["relation"] == said]
        if names:
            verb = verb.replace("is level", "are level") if len(names) > 1 else verb
            parts.append(f"{', '.join(names[:-1])}{' and ' if names[1:] else ''}{names[-1]} {verb}")
    return f"{at_chance(summary, runs)}{'; '.join(parts)}.{told}"


def _why_not(summary: Mapping[str, Any]) -> str:
    rows = {row["norm"]: row for row in summary["rows"]}
    if BASELINE not in rows:
        return f"{BASELINE} is not among the norms"
    if not rows[BASELINE]["scores"]:
        return "no run of LayerNorm has finished"
    if len(rows) == 1:
        return "LayerNorm is the only norm"
    ours = rows[BASELINE]["scores"].keys()
    if all(len(row["scores"].keys() & ours) < 2 for norm, row in rows.items() if norm != BASELINE):
        return "that takes at least two seeds that both LayerNorm and the other norm finished"
    return "the scores are not finite, or differ by the same amount with every seed"


# Markdown


def paper_table(summary: Mapping[str, Any]) -> list[list[str]]:
    """Return one row per norm: the paper's column, where there is one, and ours."""
    column, arrow = summary["column"], "higher" if summary["higher_is_better"] else "lower"
    paper = [f"{column} {COLUMNS[column][0]}, paper"] if column else []
    table = [["model", *paper, f"{summary['title']} {summary['label']}, ours, {summary['split']} ({arrow} is better)"]]
    rows = {row["norm"]: row for row in summary["rows"]}
    for norm in in_order(rows):
        paper = [paper_score(column, norm)] if column else []
        table.append([title_of(norm), *paper, our_score(rows[norm], summary["decimals"])])
    return table


def difference_table(summary: Mapping[str, Any]) -> list[list[str]]:
    """Return every norm's difference from LayerNorm, the loss gap and the size, without columns that say nothing."""
    table = [["model", "difference from LayerNorm [95 %]", "p", "p (Holm)", "relation", "loss gap"]]
    table[0] += ["gap less LayerNorm's [95 %]", "parameters"]
    rows = {row["norm"]: row for row in summary["rows"]}
    decimals = summary["decimals"]
    for norm in in_order(rows):
        row, cells = rows[norm], [""] * 4
        if found := row["difference"]:
            difference = f"{found['mean']:+.{decimals}f} {interval(found['interval_95'], decimals)}"
            cells = [difference, p_value(found["p"]), p_value(found["p_holm"]), row["relation"]]
        parameters = f"{row['parameters']:,}" if row["parameters"] else "-"
        table.append(
            [title_of(norm), *cells, *(gap_cells(row) if norm != BASELINE else (gap_cells(row)[0], "")), parameters]
        )
    kept = [column for column in range(len(table[0])) if column == 0 or any(_says(line[column]) for line in table[1:])]
    return [[line[column] for column in kept] for line in table]


def _says(cell: str) -> bool:
    """Tell whether a cell holds more than a dash or zeros."""
    return re.sub(r"[-+±0. \[\],]", "", cell) != ""


def to_markdown(table: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the first column to the left, the others to the right."""
    lines = ["| " + " | ".join(row) + " |" for row in table]
    lines.insert(1, "|---|" + "---:|" * (len(table[0]) - 1))
    return "\n".join(lines) + "\n"


def notes(summary: Mapping[str, Any]) -> list[str]:
    """Return what a reader must know to read the numbers."""
    decimals, tested = summary["decimals"], any(row["difference"] for row in summary["rows"])
    score = f"Mean ± standard deviation over n seeds of the {summary['split']} {summary['label']}"
    lines = [f"{score}; the checkpoint of each run was chosen on validation."]
    if tested:
        over = f"seeds and {summary['num_test_examples']:,} test examples" if summary["num_test_examples"] else "seeds"
        lines += [
            f"Difference: the norm less LayerNorm, paired by seed. The interval covers other {over} (crossed random "
            "effects)."
            if summary["num_test_examples"]
            else "Difference: the norm less LayerNorm, paired by seed (t-test).",
            "p: how often chance alone gives a difference at least this large if the norms are equal. p (Holm): the "
            "same, corrected for testing several norms; below 0.05 at least one norm differs from LayerNorm.",
            f"Relation: better or worse if p is below {LOOK_P} (planned looks at {', '.join(map(str, LOOKS))} seeds); "
            f"level if the 90 % interval lies within ±{summary['margin']:.{decimals}f}, a margin fixed in advance; "
            f"otherwise open. Fewer than {LOOKS[0]} seeds decide nothing.",
        ]
    if any(row["gap"]["mean"] is not None for row in summary["rows"]):
        lines.append(
            "Loss gap: the validation loss at the last evaluation less the mean training loss since the one before, "
            "in nats. Only the training loss contains dropout and label smoothing, so the level says little; a norm "
            "with a larger gap than LayerNorm over-fits more."
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
        lines.append("All norms had the same hyper-parameters except for those in their names; none was tuned here.")
    if summary["column"]:
        lines.append(
            f"The paper's column is {summary['column']}; its models, budgets and data preparation are not ours in all "
            "respects, so compare differences between norms, not levels."
        )
    return lines


# Pictures


def draw(summary: Mapping[str, Any], runs: Sequence[Run]) -> Any:
    """Return the figure of training loss, validation score and final score, one color per norm."""
    figure = Figure(figsize=(12, 3.7), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    norms = [row["norm"] for row in summary["rows"]]
    for position, norm in enumerate(norms):
        line = style_of(kind(norm), sum(kind(norm) == kind(earlier) for earlier in norms[:position]))
        line |= {"linewidth": 1.6, "markersize": 4, "label": title_of(norm)}
        ours = [run for run in runs if run.norm == norm]
        finished = [run for run in ours if run.status == "finished"]
        histories = [run.progress for run in finished or ours]  # one that ended early would cut off the mean
        losses = [_series(history, "train_history", "loss") for history in histories]
        _curve(left, losses, {**line, "markevery": slice(-1, None)})  # at its end, or on a curve of one point
        _curve(middle, [_series(h, "history", summary["score"]) for h in histories], line)
    tested = False
    for position, row in enumerate(reversed(summary["rows"])):
        color = style_of(kind(row["norm"]))["color"]
        values = list(row["scores"].values())
        if found := row["difference"]:  # around the mean of this norm, as wide as the interval of the difference
            low, high = (row["mean"] + end - found["mean"] for end in found["interval_95"])
            right.hlines(position, low, high, color=color, linewidth=1.5, alpha=0.7)
            tested = True
        if values:
            beside = position + min(0.12, 0.6 / len(values)) * (
                np.arange(len(values)) - (len(values) - 1) / 2
            )  # or equal ones would hide
            right.plot(values, beside, "o", color=color, alpha=0.45, markersize=6, clip_on=False)
            right.plot(row["mean"], position, "|", color=color, markersize=22, markeredgewidth=2.5)
        elif row["diverged"]:
            right.text(0.5, position, "diverged", transform=right.get_yaxis_transform(), ha="center", color=color)
    right.set_yticks(range(len(norms)), [title_of(norm) for norm in reversed(norms)])
    right.set_ylim(-1.1, len(norms) - 0.4)
    arrow = "→ better" if summary["higher_is_better"] else "← better"
    left.set(xlabel="optimizer step", ylabel="training loss (nats)", title="Training")
    middle.set(xlabel="optimizer step", ylabel=summary["label"], title="Validation")
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


def _series(progress: Mapping[str, Any], history: str, key: str) -> dict[int, float]:
    entries = progress.get(history, [])
    return {entry["step"]: entry[key] for entry in entries if entry.get(key) is not None}  # null: not finite


def _curve(axes: Any, curves: Sequence[Mapping[int, float]], line: Mapping[str, Any]) -> None:
    """Draw the mean of the curves over the steps that all of them reached, with a band (or a bar at a single step)
    from the lowest to the highest."""
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


def save_figure(figure: Any, stem: Path, *, dpi: int, formats: Sequence[str] = ("png", "svg")) -> dict[str, bytes]:
    """Write a figure as `stem`.png and `stem`.svg; return both, by their format."""
    pictures = {}
    for suffix in formats:
        picture = io.BytesIO()
        figure.savefig(picture, format=suffix, dpi=dpi)
        pictures[suffix] = picture.getvalue()
        write_file(stem.with_name(f"{stem.name}.{suffix}"), pictures[suffix])
    return pictures


def run_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return one row per run: how it ended, its scores, its cost."""
    rows = []
    for run in runs:
        record = run.record
        row = {"norm": run.norm, "seed": run.seed, "outcome": outcome(run)}
        for split in ("validation", "test"):
            row |= {f"{split}_{name}": value for name, value in (record.get(split) or {}).items()}
        costs = ("best_step", "steps", "seconds_per_step", "peak_memory_mb")
        rows.append(row | {name: record.get(name) for name in costs})
    return rows


def write_report(folder: Path, summary: Mapping[str, Any], runs: Sequence[Run]) -> None:
    """Write all files of a comparison except `comparison.json`."""
    table, differences = paper_table(summary), difference_table(summary)
    bullets = "\n".join(f"- {line}" for line in notes(summary))
    text = f"# {summary['title']}\n\n{conclusion(summary, runs)}\n\n{to_markdown(table)}\n{to_markdown(differences)}\n"
    write_file(folder / "table.md", f"{text}{bullets}\n\n    {summary['command']}\n")
    figure = draw(summary, runs)
    pictures = save_figure(figure, folder / "curves", dpi=200)
    write_file(folder / "report.html", page(summary, runs, pictures["png"], folder))


_CSS = """
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.2rem auto; max-width: 1220px; padding: 0 1.2rem; }
h1 { font-size: 1.35rem; margin: 0 0 .2rem; } p.lead { margin: .2rem 0 .8rem; font-size: 1.02rem; }
p.note { font-size: .88rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .22rem .6rem; text-align: right; border-bottom: 1px solid #8884; }
th { cursor: pointer; border-bottom: 2px solid #888; vertical-align: bottom; font-weight: 600; max-width: 13rem; }
th:first-child, td:first-child { text-align: left; white-space: nowrap; }
@media (max-width: 700px) { th { min-width: 4.5rem; } th:nth-child(3) { min-width: 8.5rem; } }
.scroll img { min-width: 620px; }
img { width: 100%; height: auto; background: white; border-radius: 4px; margin: .8rem 0 .3rem; }
details { margin: .5rem 0; } summary { cursor: pointer; font-weight: 600; }
ul { margin: .3rem 0; padding-left: 1.2rem; font-size: .88rem; } .scroll { overflow-x: auto; }
pre, details { overflow-x: auto; font-size: .82rem; }
"""


def page(summary: Mapping[str, Any], runs: Sequence[Run], picture: bytes, folder: Path) -> str:
    """Return the HTML report, one file that needs no other. Links lead from `folder`, where the page goes, to the
    folders of the runs."""
    escape = html.escape
    source = base64.b64encode(picture).decode()
    rows = run_rows(runs)
    shown = ["norm", "seed", "outcome", "best_step", "steps", "seconds_per_step", "peak_memory_mb"]
    shown[3:3] = sorted({key for row in rows for key in row if key.startswith(("validation_", "test_"))})
    every = [[key.replace("_", " ") for key in shown], *([_cell(row.get(key)) for key in shown] for row in rows)]
    links = ["" if run.adopted else quote(Path(os.path.relpath(run.folder, folder)).as_posix()) + "/" for run in runs]
    options = next((run.record["options"] for run in runs if run.record), {})
    versions = ", ".join(f"{name} {value}" for name, value in summary["versions"].items())
    bullets = "".join(f"<li>{escape(line)}</li>" for line in notes(summary))
    speed = speeds(runs)
    norms = in_order(row["norm"] for row in summary["rows"])
    column = ["examples/s in training", *(speed.get(norm, "-") for norm in norms)]
    parts = zip(paper_table(summary), column, difference_table(summary), strict=True)
    table = [[*scores, *([pace] if speed else []), *differences[1:]] for scores, pace, differences in parts]
    title = escape(f"Norms compared: {summary['title']}")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>{_CSS}</style></head><body>
<h1>{title}</h1>
<p class="lead">{escape(conclusion(summary, runs))}</p>
<p>{escape(setting(summary, runs))}</p>
<div class="scroll">{_html_table(table)}</div>
<div class="scroll">
<img alt="Training loss, validation score and final score of every norm" src="data:image/png;base64,{source}"></div>
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
    """Return a table that a click on a heading sorts. `links`: where the first cell of each row leads, or ""."""
    head = "".join(f'<th onclick="{SORT}">{html.escape(cell)}</th>' for cell in table[0])
    whole = re.compile(r"\[[^]]*\]|p [\d.]+|± [\d.]+")  # an interval, a p, a deviation: not broken over lines
    rows = [
        [f"<td>{whole.sub(lambda m: m[0].replace(' ', '&nbsp;'), html.escape(cell))}</td>" for cell in row]
        for row in table[1:]
    ]
    for row, link in zip(rows, links, strict=False):
        if link:
            row[0] = f'<td><a href="{html.escape(link)}">{row[0][4:-5]}</a></td>'
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
