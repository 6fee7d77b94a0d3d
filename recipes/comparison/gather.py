"""The paper's eight rows beside those that were measured, from run records.

`compare.py --gather` writes them. This code writes tables and intervals; people write the sentences around them. In a
page, what stands between `<!-- gathered: NAME -->` and `<!-- end -->` is replaced by the section of that name.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from common.options import OptionError, PatchOptions, parse_options
from comparison.choices import choose_recipe
from comparison.forest import draw_forest
from comparison.paper import BASELINE, COLUMNS, CONFIGS, ROWS, paper_score, row_name
from comparison.records import Run, read_records, stated
from comparison.report import interval, p_value, save_figure, to_markdown
from comparison.significance import LOOK_P, LOOKS, Difference, holm, planned
from comparison.summary import Scores
from comparison.variants import in_order, title_of, trained_alike
from hf_adanorm.saving import write_file

_CONFIGS = Path(__file__).parents[1] / "configs"
_PATCH = {item.name for item in dataclasses.fields(PatchOptions)}
MARKS = {"better": " ▲", "worse": " ▼", "level": " ≈", "open": ""}


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
    Claim(
        "Gain and bias over-fit: without them (LayerNorm-simple) the loss gap is smaller on most rows",
        "layernorm-simple",
        BASELINE,
        by_gap=True,
    ),
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
        self.column, self.name = CONFIGS[self.title][0], row_name(self.title)
        self.stem = path.parent.name if path.stem == "records" else path.stem  # a comparison's folder, or a file
        if path.stem not in ("records", self.title):  # other settings of the same config
            self.name += f", {path.stem.removeprefix(self.title).strip('_-').replace('_', ' ')}"
        self.task, self.options_class = importlib.import_module(recipe).TASK, importlib.import_module(recipe).OPTIONS
        for run in everything:
            if differing := _unlike(self.first, run.record):
                raise OptionError(
                    f"--gather {path}: {run.norm}, seed {run.seed} has another {differing} than "
                    f"{everything[0].norm}, seed {everything[0].seed}; put them into different files"
                )
        norms = in_order(run.norm for run in everything)
        seeds = [{run.seed for run in everything if run.norm == norm} for norm in norms]
        self.seeds = planned(sorted(set.intersection(*seeds)))
        self.runs = [run for run in everything if run.seed in self.seeds]
        self.waiting = len(everything) - len(self.runs)
        self.norms = norms
        self.scores = Scores(self.runs, self.task, self.column)

    def difference(self, claim: Claim) -> Difference | None:
        """Return what the claim measures in this row, or None where it does not apply."""
        if not claim.by_gap:
            return self.scores.difference(claim.norm, claim.other)
        choices = [next((run.choice for run in self.runs if run.norm == n), {}) for n in (claim.norm, claim.other)]
        return self.scores.gap_difference(claim.norm, claim.other) if trained_alike(*choices) else None

    def diverged(self, norm: str) -> list[Run]:
        return [run for run in self.runs if run.norm == norm and run.status == "diverged"]

    def relation(self, claim: Claim) -> str:
        """Return `better`, `worse`, `level` or `open`, or "-" where the row lacks one of the norms.

        A norm that diverged with every seed is worse than one that finished. One that diverged with some seeds is not
        called better or level because of the others.
        """
        if not {claim.norm, claim.other} <= set(self.norms):
            return "-"
        ours, theirs = len(self.diverged(claim.norm)), len(self.diverged(claim.other))
        if claim.by_gap and (ours or theirs):
            return "-"
        enough = len(self.seeds) >= LOOKS[0]
        if enough and len(self.seeds) in (ours, theirs) and ours != theirs:
            return "worse" if ours > theirs else "better"
        found = self.difference(claim)
        if claim.by_gap:  # no margin was fixed for it; lower is better
            decided = found is not None and enough and found.p < LOOK_P
            return "open" if not decided or found is None else "better" if found.mean < 0 else "worse"
        said = self.scores.relation(found)
        survived = (ours and said in ("better", "level")) or (theirs and said in ("worse", "level"))
        return "open" if survived else said


def _unlike(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Return the name of what two records of one row may not differ in, or ""."""
    for name in ("recipe", "title", "num_processes", "mixed_precision", "content"):
        then, now = one.get(name), other.get(name)
        if name == "content":  # that of a norm's file differs from norm to norm
            then, now = (
                {key: value for key, value in (found or {}).items() if key != "norm"} for found in (then, now)
            )
        if then != now:
            return name
    names = (one["options"].keys() | other["options"].keys()) - _PATCH - one["choice"].keys() - other["choice"].keys()
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
        "claims": claims_text(rows),
        "gaps": to_markdown(gaps_table(rows)),
        "runs": to_markdown(runs_table(rows)),
        "commands": "```bash\n" + "\n".join(command(row) for row in rows) + "\n```\n",
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
    """Return, for each row of the paper, ours and the paper's figures, one column per norm."""
    names = in_order([*ROWS, *(norm for row in rows for norm in row.norms)])
    table = [["", *map(title_of, names)]]
    for column, (metric, _) in COLUMNS.items():
        ours = [row for row in rows if row.column == column]
        for row in ours:
            split = "" if row.scores.split == "test" else f", {row.scores.split}"
            cells = [marked_score(row, name) for name in names]
            table.append([f"**{row.name}**, {row.task.label}{split}", *cells])
        said = [paper_score(column, name) for name in names]
        own = "paper's " if ours else ""
        table.append([f"*{own}{column}, {metric}*", *(f"*{score}*" if score != "-" else "" for score in said)])
    return table


def marked_score(row: Row, norm: str) -> str:
    """Return mean ± standard deviation with the number of seeds, and a mark for the relation to LayerNorm."""
    scores, lost, decimals = list(row.scores.by_norm.get(norm, {}).values()), row.diverged(norm), row.task.decimals
    parts = [f"{len(lost)} diverged"] if lost else []
    if scores and all(map(math.isfinite, scores)):
        spread = f" ± {stdev(scores):.{decimals}f}" if len(scores) > 1 else ""
        mark = "" if norm == BASELINE else MARKS.get(row.relation(Claim("", norm, BASELINE)), "")
        parts.insert(0, f"{fmean(scores):.{decimals}f}{spread} (n={len(scores)}){mark}")
    elif scores:
        parts.insert(0, "not finite")
    return "; ".join(parts) or "-"


def differences_table(rows: Sequence[Row]) -> list[list[str]]:
    """Return every norm's difference from LayerNorm; p-values of one norm are also corrected over its rows."""
    head = ["row", "norm", "difference", "90 % interval", "95 % interval", "p", "p, Holm over rows"]
    table = [[*head, "found with power 0.8", "relation"]]
    found = {(row.path, norm): row.scores.difference(norm) for row in rows for norm in row.norms if norm != BASELINE}
    corrected: dict[tuple[Path, str], float] = {}
    for norm in dict.fromkeys(norm for _, norm in found):
        p_values = {str(path): one.p for (path, name), one in found.items() if name == norm and one}
        corrected |= {(Path(path), norm): p for path, p in holm(p_values).items()}
    for row in rows:
        decimals = row.task.decimals
        for norm in row.norms:
            one = found.get((row.path, norm))
            if norm == BASELINE or one is None:
                continue
            ends = [interval(one.interval(level), decimals) for level in (0.9, 0.95)]
            p_cells = [p_value(one.p), p_value(corrected[row.path, norm])]
            said = row.relation(Claim("", norm, BASELINE))
            cells = [f"{one.mean:+.{decimals}f}", *ends, *p_cells, f"{one.detectable:.{decimals}f}", said]
            table.append([f"{row.name} (n={one.num_pairs})", title_of(norm), *cells])
    return table


def claims_text(rows: Sequence[Row]) -> str:
    """Return one table per claim: what each row says, and how many say it."""
    parts = []
    for claim in CLAIMS:
        table = [["row", "difference", "90 % interval", "p", "relation"]]
        relations = []
        for row in rows:
            said = row.relation(claim)
            if said == "-":
                continue
            relations.append(said)
            one, decimals = row.difference(claim), 3 if claim.by_gap else row.task.decimals
            cells = ["-", "-", "-"]
            if one:
                cells = [f"{one.mean:+.{decimals}f}", interval(one.interval(0.9), decimals), p_value(one.p)]
            table.append([row.name, *cells, said])
        counts = ", ".join(f"{relations.count(name)} {name}" for name in ("better", "level", "worse", "open"))
        what = f"{title_of(claim.norm)} less {title_of(claim.other)}{', loss gap (nats)' if claim.by_gap else ''}"
        parts.append(f"**{claim.text}.** {what}: {counts}, of {len(relations)} rows.\n\n{to_markdown(table)}")
    return "\n".join(parts)


def gaps_table(rows: Sequence[Row]) -> list[list[str]]:
    """Return the loss gap of every norm and its difference from LayerNorm's."""
    names = in_order(norm for row in rows for norm in row.norms)
    table = [["", *map(title_of, names)]]
    for row in rows:
        cells = []
        for name in names:
            gaps = list(row.scores.gaps.get(name, {}).values())
            found = row.difference(Claim("", name, BASELINE, by_gap=True)) if name != BASELINE else None
            beside = f" ({found.mean:+.3f} {interval(found.interval(0.95), 3)})" if found else ""
            finite = gaps and all(map(math.isfinite, gaps))
            cells.append(f"{fmean(gaps):.3f}{beside}" if finite else "-")
        table.append([row.name, *cells])
    return table


def runs_table(rows: Sequence[Row]) -> list[list[str]]:
    """Return the number of runs of each row, their seeds, training time and machine."""
    table = [["row", "runs", "seeds", "waiting for the next look", "hours of training", "machine"]]
    for row in rows:
        ended = [run.record for run in row.runs]
        hours = sum((one.get("seconds_per_step") or 0) * (one.get("steps") or 0) for one in ended) / 3600
        machines = "; ".join(dict.fromkeys(one["machine"] for one in ended))
        waiting = str(row.waiting) if row.waiting else "none"
        table.append([row.name, str(len(ended)), ranges(row.seeds), waiting, f"{hours:.1f}", machines])
    return table


def ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers as `1-5, 8`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)


def _config_options(config: str) -> dict[str, Any]:
    """Return the options that a config sets apart from the defaults."""
    path = str(_CONFIGS / f"{config}.yaml")
    options_class = choose_recipe(None, path)[1]
    options = json.loads(json.dumps(dataclasses.asdict(parse_options(options_class, ["--config", path]))))
    return stated(options_class, options, options["norm"])


def _value(name: str, options: Mapping[str, Any], row: Row) -> Any:
    """Return an option, or its default where it is not stated."""
    return options[name] if name in options else getattr(row.options_class(), name, None)


def command(row: Row) -> str:
    """Return the command that makes the runs of a row; files by name."""
    words = ["python", "recipes/compare.py", "--config", f"recipes/configs/{row.title}.yaml"]
    if set(row.norms) != set(ROWS):
        words += ["--norms", *row.norms]
    seeds = [str(len(row.seeds))] if row.seeds == list(range(1, len(row.seeds) + 1)) else map(str, row.seeds)
    words += ["--seeds", *seeds, "--output_dir", f"outputs/{row.stem}"]
    meant, had = _config_options(row.title), row.first["options"]
    for name in sorted(had.keys() | meant.keys()):
        value = _value(name, had, row)
        if value != _value(name, meant, row) and name != "norm":
            words += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return wrap(words)


def wrap(words: Sequence[str], width: int = 100) -> str:
    """Return a command over lines of about `width`, broken before options."""
    lines = [""]
    for word in map(shlex.quote, words):
        if len(lines[-1]) + len(word) > width - 2 and word.startswith("--"):
            lines.append("   ")
        lines[-1] += f" {word}"
    return " \\\n".join(lines).removeprefix(" ")
