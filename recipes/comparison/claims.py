"""The paper's claims, each held against the rows that were measured.

A row says how one norm does beside another, by the paired t-test over the seeds that both finished (95 %, not
corrected for the number of rows):

- better or worse: the interval of the difference lies on that side of zero. A norm whose every run diverged, of two or
  more, is worse than one that finished; one that diverged with a seed of the other's is neither better nor level.
- level: it is not, and the interval lies within what counts in this row, the difference that the paper reports between
  AdaNorm and LayerNorm in it (one last digit where it reports none).
- open: anything else; also one seed, both diverged, or one of which runs are still to come.

A claim names which of these speak for it and which against it, and how many rows it lets off. Supported: the rows that
speak for it are all measured rows but those let off. Not supported: more rows than are let off speak against it.
Otherwise it is undecided, as it is where fewer than four of the eight rows were measured. A claim on most rows lets
off as many as leave more than half.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from comparison.contestants import trained_alike
from comparison.paper import BASELINE, COLUMNS, ROWS, TITLES, row_name
from comparison.significance import difference_over_seeds

MIN_ROWS = 4


class Claim(NamedTuple):
    """`norm` is held against `other`: by scores, or by the gap between validation and training loss, where lower is
    better."""

    text: str
    norm: str
    other: str
    speaks_for: frozenset[str]
    speaks_against: frozenset[str]
    measure: str = "scores"
    lets_off: int | None = None  # None: less than half


CLAIMS = (
    Claim(
        "LayerNorm-simple is at least as good as LayerNorm on most rows",
        "layernorm-simple",
        BASELINE,
        frozenset({"better", "level"}),
        frozenset({"worse"}),
    ),
    Claim(
        "DetachNorm is worse than no norm on most rows",
        "detachnorm",
        "none",
        frozenset({"worse"}),
        frozenset({"better", "level"}),
    ),
    Claim(
        "AdaNorm is better than LayerNorm on all rows but one",
        "adanorm",
        BASELINE,
        frozenset({"better"}),
        frozenset({"worse", "level"}),
        lets_off=1,
    ),
    Claim(
        "Gain and bias over-fit: without them (LayerNorm-simple) the loss gap is smaller on most rows",
        "layernorm-simple",
        BASELINE,
        frozenset({"better"}),
        frozenset({"worse"}),
        measure="gaps",
    ),
)


def measured(summary: Mapping[str, Any], claim: Claim) -> tuple[dict[int, float], dict[int, float]]:
    """What the claim measures of its two norms, by seed."""
    rows = {row["norm"]: row[claim.measure] for row in summary["rows"]}
    ours, theirs = (
        {int(seed): math.nan if value is None else value for seed, value in rows[name].items()}
        for name in (claim.norm, claim.other)
    )
    return ours, theirs


def relation(summary: Mapping[str, Any], claim: Claim) -> str | None:
    """`better`, `worse`, `level` or `open`: see the module. None where the row does not have both norms to measure, or
    where a grid chose another training for the two and the claim is on the loss gap, which says nothing then."""
    rows = {row["norm"]: row for row in summary["rows"] if row["scores"] or row["diverged"]}
    if claim.norm not in rows or claim.other not in rows:
        return None
    both = [rows[name] for name in (claim.norm, claim.other)]
    lost = [not row["scores"] for row in both]
    if claim.measure == "gaps" and (any(lost) or not trained_alike(*(row["choice"] for row in both))):
        return None  # of a run that diverged there is none
    if any(lost):
        waits = any(row["unfinished"] or len(row["diverged"]) < 2 for row in both if not row["scores"])
        return "open" if all(lost) or waits else "worse" if lost[0] else "better"
    ours_lost, theirs_lost = ((one["diverged"].keys() & other["scores"].keys()) for one, other in (both, both[::-1]))
    found = _by_interval(summary, claim)
    left_out = (ours_lost and found in ("better", "level")) or (theirs_lost and found in ("worse", "level"))
    return "open" if left_out else found  # the survivors of a norm are not the norm


def _by_interval(summary: Mapping[str, Any], claim: Claim) -> str:
    """The relation by the seeds that both finished."""
    found = difference_over_seeds(*measured(summary, claim))
    if found is None:
        return "open"
    low, high = found.low, found.high
    if claim.measure == "gaps" or not summary["higher_is_better"]:
        low, high = -high, -low
    if low > 0:
        return "better"
    if high < 0:
        return "worse"
    counts = what_counts(summary["column"]) if claim.measure == "scores" else 0.0
    return "level" if -counts < low and high < counts else "open"


def what_counts(column: str) -> float:
    """The difference that the paper reports between AdaNorm and LayerNorm in a row, at least one last digit."""
    metric, scores = COLUMNS[column]
    ours, theirs = (scores[ROWS.index(norm)] for norm in ("adanorm", BASELINE))
    least = 0.1 if metric == "BLEU" else 0.01
    return least if ours is None or theirs is None else max(abs(ours - theirs), least)


def verdict(relations: Sequence[str], claim: Claim) -> str:
    """`supported`, `not supported` or `undecided here`, from the relations of the rows that were measured."""
    lets_off = (len(relations) - 1) // 2 if claim.lets_off is None else claim.lets_off
    if (
        len(relations) >= MIN_ROWS
        and sum(found in claim.speaks_for for found in relations) >= len(relations) - lets_off
    ):
        return "supported"
    if len(relations) >= MIN_ROWS and sum(found in claim.speaks_against for found in relations) > lets_off:
        return "not supported"
    return "undecided here"


def judge(summaries: Sequence[Mapping[str, Any]], claim: Claim) -> str:
    """The claim in a line: the verdict, how many rows say what, and each row's figure."""
    judged = [(summary, found) for summary in summaries if (found := relation(summary, claim))]
    relations = [found for _, found in judged]
    told = "; ".join(
        f"{row_name(summary['column'], summary['title'])} {figure(summary, claim)}, {found}"
        for summary, found in judged
    )
    counts = ", ".join(f"{relations.count(name)} {name}" for name in ("better", "level", "worse", "open"))
    of = f"{TITLES[claim.norm]} beside {TITLES[claim.other]}" + (", loss gap" if claim.measure == "gaps" else "")
    rows = f"{of}: {counts}, of {len(judged)} rows measured ({told})" if judged else "no row measured"
    return f"{claim.text}: **{verdict(relations, claim)}**; {rows}."


def figure(summary: Mapping[str, Any], claim: Claim) -> str:
    """The difference of a row with its interval, or where there is none with the number of seeds; and how many runs
    diverged."""
    ours, theirs = measured(summary, claim)
    decimals = summary["decimals"] if claim.measure == "scores" else 3
    pairs = [ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()]
    if found := difference_over_seeds(ours, theirs):
        said = f"{found.mean:+.{decimals}f} [{found.low:+.{decimals}f}, {found.high:+.{decimals}f}]"
    elif pairs:
        said = f"{fmean(pairs):+.{decimals}f}" if all(map(math.isfinite, pairs)) else "not finite"
        said += f" (n={len(pairs)})"
    else:
        said = "no seed that both finished"
    lost = {row["norm"]: len(row["diverged"]) for row in summary["rows"] if row["diverged"]}
    told = [f"{TITLES[name]} diverged with {lost[name]}" for name in (claim.norm, claim.other) if name in lost]
    return f"{said} ({', '.join(told)})" if told else said
