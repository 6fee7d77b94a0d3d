"""The paper's eight rows beside those that were measured, from the `comparison.json` of finished comparisons.

`compare.py --gather` writes them. A comparison may have been made on another machine: its `comparison.json` is enough.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.options import OptionError, options_that_change, parse_options
from comparison.choices import OWN, choose_recipe
from comparison.claims import CLAIMS, judge
from comparison.contestants import in_order, title_of
from comparison.paper import COLUMNS, NEEDS, ROWS, SUBSTITUTES, paper_score, row_name
from comparison.report import gap_cells, our_score, to_latex, to_markdown
from hf_adanorm.saving import write_file

_CONFIGS = Path(__file__).parents[1] / "configs"
_OTHER_DATA = ("_file", "_split", "_column", "dataset_name", "dataset_config", "score_test")  # ends of options
_SHIPPED = {path.name for path in _CONFIGS.glob("*.yaml")}
_ELSEWHERE = ("model_config", "mixed_precision", "gradient_accumulation_steps", "checkpointing_steps")  # or nowhere


def read_summary(folder: Path) -> dict[str, Any]:
    """A comparison's `comparison.json`. Raises OptionError where there is none, or one that cannot be used."""
    path = folder / "comparison.json"
    if not path.is_file():
        raise OptionError(f"--gather {folder}: there is no {path.name}: let recipes/compare.py finish in that folder")
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OptionError(f"--gather {path} cannot be read ({error}): report again with --report_only") from error
    if "grid" not in summary:
        again = f"python {summary['command']} --report_only" if "command" in summary else "its command, --report_only"
        raise OptionError(f"--gather {path} is of an earlier version; report again: {again}")
    if not summary["options"]:
        raise OptionError(f"--gather {folder}: no run of this comparison has finished")
    if summary["column"] is None:
        raise OptionError(f"--gather {path} is of no row of the paper; report again with --paper {'|'.join(COLUMNS)}")
    return summary


def gather(folders: Sequence[Path], output_dir: Path) -> str:
    """Write `rows.md` and `rows.tex`; return the Markdown. Raises OptionError before anything is written."""
    summaries: dict[str, dict[str, Any]] = {}
    for folder in folders:
        summary = read_summary(folder)
        if summary["column"] in summaries:
            raise OptionError(f"--gather {folder}: another folder has the row {summary['column']}; give one of them")
        summaries[summary["column"]] = summary
    measured = [summaries[column] for column in COLUMNS if column in summaries]
    table = scores_table(summaries)
    parts = [to_markdown(table), _LEGEND]
    if measured:
        parts += ["The loss gap, and its difference from LayerNorm's:\n", to_markdown(gaps_table(measured))]
    parts.append("What the paper claims, and what these rows say:\n")
    parts.append("".join(f"- {judge(measured, claim)}\n" for claim in CLAIMS))
    if measured:
        parts.append(
            "Where the runs depart from the settings of the paper's row (in brackets), as far as these are known:\n"
        )
        parts.append("".join(f"- {departures(summary)}\n" for summary in measured))
        commands = "\n".join(shown_command(summary) for summary in measured)
        parts.append(f"The commands:\n\n```bash\n{commands}\n```\n")
    missing = {column: need for column, need in NEEDS.items() if not is_own(summaries.get(column))}
    if missing:
        parts.append("What the rows need that were not run on their own data:\n")
        lines = (
            f"- {name}: {n.data} (license, as far as known: {n.license}); {n.machine}." for name, n in missing.items()
        )
        commands = "\n".join(wrap(shlex.split(need.command)) for need in missing.values())
        parts.append("\n".join(lines) + f"\n\n```bash\n{commands}\n```\n")
    text = "\n".join(parts)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_file(output_dir / "rows.md", text)
    write_file(output_dir / "rows.tex", to_latex([[cell.replace("*", "") for cell in row] for row in table]))
    return text


_LEGEND = """Mean ± standard deviation over n seeds, on the test set where nothing else is said, by the checkpoint that
validation chose; in italics the paper's figures. Beside LayerNorm, at 5 %: † differs by a paired
t-test over the seeds, not corrected for the number of norms, ‡ by a paired bootstrap over the test
examples, corrected for it.
"""


def is_own(summary: Mapping[str, Any] | None) -> bool:
    """Whether a comparison is by the row's own config, and so of its own data as far as its options say, or by another
    on the same data set of the Hub."""
    if summary is None or summary["title"] == NEEDS[summary["column"]].config:
        return summary is not None
    path = str(_CONFIGS / f"{NEEDS[summary['column']].config}.yaml")
    had, meant = summary["options"], _options(choose_recipe(None, path)[1], "--config", path)
    names = ("dataset_name", "dataset_config", "train_file")
    return bool(meant.get("dataset_name")) and all(had.get(name) == meant.get(name) for name in names)


def scores_table(summaries: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """For each row of the paper ours and the paper's figures, a column a norm."""
    names = in_order([*ROWS, *(row["norm"] for summary in summaries.values() for row in summary["rows"])])
    table = [["", *map(title_of, names)]]
    for column, (metric, _) in COLUMNS.items():
        summary = summaries.get(column)
        if summary is not None:
            rows = {row["norm"]: row for row in summary["rows"]}
            cells = [marked_score(rows[name], summary["decimals"]) if name in rows else "-" for name in names]
            split = "" if summary["split"] == "test" else f", {summary['split']}"
            table.append([f"**{row_name(column, summary['title'])}**, {summary['label']}{split}", *cells])
        said = [paper_score(column, name) for name in names]
        own = "" if summary is None else "paper's "
        table.append([f"*{own}{column}, {metric}*", *(f"*{score}*" if score != "-" else "" for score in said)])
    return table


def marked_score(row: Mapping[str, Any], decimals: int) -> str:
    """A norm's score, marked where it differs from LayerNorm's."""
    seeds, examples = row["over_seeds"], row["over_examples"]
    marks = ("†" if seeds and seeds["p"] < 0.05 else "") + ("‡" if examples and examples["p_holm"] < 0.05 else "")
    return f"{our_score(row, decimals)} {marks}".rstrip()


def gaps_table(measured: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """For each measured row the loss gap of every norm."""
    names = in_order(row["norm"] for summary in measured for row in summary["rows"])
    table = [["", *map(title_of, names)]]
    for summary in measured:
        rows = {row["norm"]: row for row in summary["rows"]}
        cells = []
        for name in names:
            gap, beside = gap_cells(rows[name]) if name in rows else ("-", "-")
            cells.append(gap if beside == "-" else f"{gap} ({beside})")
        table.append([row_name(summary["column"], summary["title"]), *cells])
    return table


def departures(summary: Mapping[str, Any]) -> str:
    """On what data the runs were, and where they are not as the config with the settings of the paper's row: options,
    what a grid chose, and how they were launched as far as it changes batches or precision."""
    column, need = summary["column"], NEEDS[summary["column"]]
    path = str(_CONFIGS / f"{need.config}.yaml")
    options_class = choose_recipe(None, path)[1]
    meant = _options(options_class, "--config", path)
    had = {**_options(options_class), **summary["options"]}  # what had no option yet was as it is by default
    by_grid = []
    for name in dict.fromkeys(name for row in summary["rows"] for name in row["choice"]):
        values = {row["norm"]: row["choice"][name] for row in summary["rows"] if name in row["choice"]}
        had[name] = meant[name]  # said here, or else below
        if len(summary["grid"].get(name, ())) > 1:
            chosen = ", ".join(f"{title_of(norm)} {value}" for norm, value in values.items())
            by_grid.append(f"{name} chosen on validation: {chosen} ({_said(meant[name])})")
        else:
            had[name] = _options(options_class, f"--{name}", next(iter(values.values())))[name]
    names = options_that_change(options_class, "results", "onward") - {*OWN, *_ELSEWHERE}
    pairs = {name: (had[name], meant[name]) for name in sorted(names) if not name.endswith(_OTHER_DATA)}
    ours, theirs = had.get("model_config") or {}, meant.get("model_config") or {}
    pairs |= {f"model {name}": (ours.get(name), theirs.get(name)) for name in [*ours, *(theirs.keys() - ours.keys())]}
    accumulation = "gradient_accumulation_steps"
    processes = summary["num_processes"] or 1
    pairs[f"processes x {accumulation}"] = (processes * had[accumulation], need.processes * meant[accumulation])
    precision = summary["mixed_precision"] or had["mixed_precision"] or "no"
    if len(summary["grid"].get("mixed_precision", ())) < 2:
        pairs["mixed_precision"] = (precision, meant["mixed_precision"] or "no")
    said = [f"{name} {_said(one)} ({_said(other)})" for name, (one, other) in pairs.items() if one != other]
    budget = f"{summary['steps']:,} updates a run, {summary['train_samples']:,} training examples"
    return f"{column}: {_data(summary, had, meant)}{budget}; {', '.join([*by_grid, *said]) or 'no other departure'}."


def _options(options_class: type[Any], *arguments: str) -> dict[str, Any]:
    """The options that these arguments set, as JSON has them."""
    options: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(parse_options(options_class, arguments))))
    return options


def _data(summary: Mapping[str, Any], had: Mapping[str, Any], meant: Mapping[str, Any]) -> str:
    """What the runs read, where it is not what the row's config names."""
    title = summary["title"]
    stands_in = SUBSTITUTES[title][1] if title in SUBSTITUTES else f"the data of {title}"
    files = [had.get(f"{split}_file") or [] for split in ("train", "validation", "test")]
    names = [Path(file).name for given in files for file in ([given] if isinstance(given, str) else given)]
    names = names or [had["dataset_name"]] * (had.get("dataset_name") != meant.get("dataset_name"))
    place = "" if is_own(summary) else f"{stands_in} in place of the row's data; "
    return place + (f"from {', '.join(names)}; " if names else "")


def _said(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def shown_command(summary: Mapping[str, Any]) -> str:
    """The command of a comparison as others would give it: files by name, without the folders of this machine."""
    words, value_of = [], ""
    for word in shlex.split(summary["command"]):
        name, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        value_of = name or value_of
        if value_of == "--output_dir" and value:
            value = f"outputs/{summary['title']}"
        elif value_of == "--config" and Path(value).name in _SHIPPED:
            value = f"recipes/configs/{Path(value).name}"
        elif value_of == "--launcher":
            value = " ".join(Path(part).name if part.startswith("/") else part for part in value.split(" "))
        elif Path(value).is_absolute():
            value = Path(value).name
        words.append(f"{name}{equals}{value}")
    return wrap(["python", *(word for word in words if word != "--report_only")])


def wrap(words: Sequence[str], width: int = 100) -> str:
    """A command over lines of about `width`, broken before options."""
    lines = [""]
    for word in map(shlex.quote, words):
        if len(lines[-1]) + len(word) > width - 2 and word.startswith("--"):
            lines.append("   ")
        lines[-1] += f" {word}"
    return " \\\n".join(lines).removeprefix(" ")
