"""The paper's eight rows beside those that were measured, from run records.

`compare.py --gather` writes them. This code writes tables and intervals; people write the sentences around them. In a
page, what stands between `<!-- gathered: NAME -->` and `<!-- end -->` is replaced by the section of that name.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

from common.options import OptionError
from comparison.choices import recipe_options
from comparison.paper import BASELINE, COLUMNS, CONFIGS, ROWS, paper_score
from comparison.plots import draw_forest, save_figure
from comparison.records import PATCH, launched_unlike, read_records
from comparison.report import interval, p_value, score_cell, to_markdown
from comparison.significance import holm, planned
from comparison.summary import Scores
from comparison.variants import in_order, title_of
from hf_adanorm.saving import write_file

MARKS = {"better": " ▲", "worse": " ▼", "level": " ≈"}


class Claim(NamedTuple):
    """`norm` is compared with `other`, by scores or by the gap between validation and training loss."""

    text: str
    norm: str
    other: str
    by_gap: bool = False


CLAIMS = (
    Claim("LayerNorm-simple is at least as good as LayerNorm on most rows", "layernorm-simple", BASELINE),
    Claim("DetachNorm is worse than no norm on most rows", "detachnorm", "none"),
    Claim("AdaNorm is better than LayerNorm on all rows but one", "adanorm", BASELINE),
    Claim("Without gain and bias the loss gap is smaller on most rows", "layernorm-simple", BASELINE, by_gap=True),
)


class Row:
    """The runs of one file of records, up to the latest planned number of seeds."""

    def __init__(self, path: Path):
        everything = read_records(path)
        if not everything:
            raise OptionError(f"--gather {path}: no run has ended")
        self.path, self.first = path, everything[0].record
        self.title, recipe = self.first["title"], self.first["recipe"]
        if self.title not in CONFIGS:
            raise OptionError(f"--gather {path}: config {self.title!r} matches no row of the paper")
        self.column, data = CONFIGS[self.title]
        self.stem = path.parent.name if path.stem == "records" else path.stem  # a comparison's folder, or a file
        self.name = f"{self.column} ({data})" if data else self.column
        if path.stem not in ("records", self.title):  # other settings of the same config
            self.name += f", {path.stem.removeprefix(self.title).strip('_-').replace('_', ' ')}"
        if recipe not in recipe_options():
            raise OptionError(f"--gather {path}: there is no recipe {recipe!r}")
        self.task = importlib.import_module(recipe).TASK
        for run in everything:
            for other in (everything[0], next(one for one in everything if one.norm == run.norm)):
                if differing := _unlike(other.record, run.record):
                    raise OptionError(
                        f"--gather {path}: {run.norm}, seed {run.seed} has another {differing} than {other.norm}, "
                        f"seed {other.seed}; put them into different files"
                    )
        self.norms = in_order(run.norm for run in everything)
        seeds = [{run.seed for run in everything if run.norm == norm} for norm in self.norms]
        complete = set.intersection(*seeds)
        # In the order of the records: runs that are added later must not change an earlier look.
        self.seeds = planned(list(dict.fromkeys(run.seed for run in everything if run.seed in complete)))
        self.runs = [run for run in everything if run.seed in self.seeds]
        self.waiting = len(everything) - len(self.runs)
        self.scores = Scores(self.runs, self.task, self.column)


def _unlike(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Return the name of what two records of one row may not differ in, or ""."""
    if name := launched_unlike(one, other):
        return name
    own = {"norm"} if one["norm"] != other["norm"] else set()  # the hash of a norm's file
    hashes = one["content"].items() ^ other["content"].items()
    if {name for name, _ in hashes} - own:
        return "content"
    names = (one["options"].keys() | other["options"].keys()) - PATCH - one["choice"].keys() - other["choice"].keys()
    return next((name for name in sorted(names) if one["options"].get(name) != other["options"].get(name)), "")


def gather(paths: Sequence[Path], output_dir: Path, pages: Sequence[Path] = ()) -> str:
    """Write `rows.md` and the forest plot, and fill the pages; return the Markdown.

    Raises OptionError before anything is written.
    """
    files = [file for path in paths for file in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path])]
    if not files:
        raise OptionError(f"--gather {' '.join(map(str, paths))}: no records; give files or folders of *.jsonl")
    rows = sorted((Row(file) for file in files), key=lambda row: (list(COLUMNS).index(row.column), row.stem))
    sections = {
        "scores": to_markdown(scores_table(rows)),
        "differences": to_markdown(differences_table(rows)),
        "claims": to_markdown(claims_table(rows)),
        "gaps": to_markdown(gaps_table(rows)),
        "runs": to_markdown(runs_table(rows)),
    }
    filled = {page: fill(page, sections) for page in pages}
    text = "\n".join(f"## {name.capitalize()}\n\n{section}" for name, section in sections.items())
    output_dir.mkdir(parents=True, exist_ok=True)
    write_file(output_dir / "rows.md", text)
    save_figure(draw_forest(rows), output_dir / "forest", dpi=110, formats=("png",))
    for page, content in filled.items():
        write_file(page, content)
    return text


def fill(page: Path, sections: Mapping[str, str]) -> str:
    """Return the text of a page with the sections between its marks. Raises OptionError for an unknown section."""

    def section(found: re.Match[str]) -> str:
        if found[2] not in sections:
            raise OptionError(f"{page}: no section {found[2]!r} is gathered; expected {', '.join(sections)}")
        return f"{found[1]}\n\n{sections[found[2]]}\n{found[3]}"

    pattern = r"(<!-- gathered: ([\w-]+) -->)\n.*?(<!-- end -->)"
    return re.sub(pattern, section, page.read_text(encoding="utf-8"), flags=re.DOTALL)


def scores_table(rows: Sequence[Row]) -> list[list[str]]:
    """Return, for each row of the paper, our and the paper's figures, one column per norm.

    A mark shows the relation to LayerNorm.
    """
    names = in_order([*ROWS, *(norm for row in rows for norm in row.norms)])
    table = [["", *map(title_of, names)]]
    for column, about in COLUMNS.items():
        ours = [row for row in rows if row.column == column]
        for row in ours:
            split = "" if row.scores.split == "test" else f", {row.scores.split}"
            table.append([f"**{row.name}**, {row.task.label}{split}"])
            for name in names:
                scores, lost = row.scores.by_norm.get(name, {}), row.scores.diverged.get(name, {})
                mark = MARKS.get(row.scores.relation(name), "")
                table[-1].append(score_cell(scores, len(lost), row.task.decimals) + mark)
        said = [paper_score(column, name) for name in names]
        own = "paper's " if ours else ""
        table.append(
            [f"*{own}{column}, {about['metric']}*", *(f"*{score}*" if score != "-" else "" for score in said)]
        )
    return table


def differences_table(rows: Sequence[Row]) -> list[list[str]]:
    """Return every norm's difference from LayerNorm; p-values of one norm are also corrected over its rows."""
    head = ["row", "norm", "difference", "90 % interval", "95 % interval", "p", "p, Holm over rows"]
    table = [[*head, "found with power 0.8", "relation"]]
    found = {(row, norm): one for row in rows for norm in row.norms if (one := row.scores.difference(norm))}
    for (row, norm), one in found.items():
        over_rows = {str(other.path): same.p for (other, name), same in found.items() if name == norm}
        decimals = row.task.decimals
        table.append(
            [
                f"{row.name} (n={one.num_pairs})",
                title_of(norm),
                f"{one.mean:+.{decimals}f}",
                *(interval(one.interval(level), decimals) for level in (0.9, 0.95)),
                *(p_value(one.p), p_value(holm(over_rows)[str(row.path)])),
                f"{one.detectable:.{decimals}f}",
                row.scores.relation(norm),
            ]
        )
    return table


def claims_table(rows: Sequence[Row]) -> list[list[str]]:
    """Return what each row says on each claim, and how many rows say it."""
    table = [["claim and rows", "difference", "90 % interval", "p", "relation"]]
    for text, *pair, by_gap in CLAIMS:
        said = {row: row.scores.relation(*pair, by_gap=by_gap) for row in rows}
        said = {row: relation for row, relation in said.items() if relation != "-"}
        counts = [f"{list(said.values()).count(name)} {name}" for name in ("better", "level", "worse", "open")]
        what = f"{title_of(pair[0])} less {title_of(pair[1])}{', loss gap (nats)' if by_gap else ''}"
        table.append([f"**{text}**: {what}", "", "", "", f"**{', '.join(counts)}**"])
        for row, relation in said.items():
            one, decimals = row.scores.difference(*pair, by_gap=by_gap), 3 if by_gap else row.task.decimals
            cells = ["-", "-", "-"]
            if one:
                cells = [f"{one.mean:+.{decimals}f}", interval(one.interval(0.9), decimals), p_value(one.p)]
            table.append([row.name, *cells, relation])
    return table


def gaps_table(rows: Sequence[Row]) -> list[list[str]]:
    """Return the loss gap of every norm and its difference from LayerNorm's."""
    names = in_order(norm for row in rows for norm in row.norms)
    table = [["", *map(title_of, names)]]
    for row in rows:
        cells = []
        for name in names:
            gaps = list(row.scores.gaps.get(name, {}).values())
            found = row.scores.difference(name, by_gap=True)
            beside = f" ({found.mean:+.3f} {interval(found.interval(0.95), 3)})" if found else ""
            cells.append(f"{fmean(gaps):.3f}{beside}" if gaps and all(map(math.isfinite, gaps)) else "-")
        table.append([row.name, *cells])
    return table


def runs_table(rows: Sequence[Row]) -> list[list[str]]:
    """Return the number of runs of each row, their seeds, training time and machine."""
    table = [["row", "runs", "seeds", "waiting for the next look", "hours of training", "machine"]]
    for row in rows:
        ended = [run.record for run in row.runs]
        # A run that was paused counts with the speed of the others.
        seconds = median([value for one in ended if (value := one.get("seconds_per_step"))] or [0])
        hours = seconds * sum(one.get("steps") or 0 for one in ended) / 3600
        machines = "; ".join(dict.fromkeys(one["machine"] for one in ended))
        table.append(
            [
                row.name,
                str(len(ended)),
                " ".join(map(str, sorted(row.seeds))),
                str(row.waiting),
                f"{hours:.1f}",
                machines,
            ]
        )
    return table
