"""Words and tables of a comparison."""

import re

import pytest

from classification import TASK
from comparison.report import (
    at_chance,
    conclusion,
    difference_table,
    notes,
    our_score,
    page,
    speeds,
)
from comparison.summary import summarize
from tests.recipes.comparison.comparison_runs import diverge, finish


def row(**changes):
    return {"norm": "adanorm", "scores": {}, "mean": None, "sd": None, "diverged": {}, "unfinished": [], **changes}


def compared(folder, moves, *, num_seeds=5, **changes):
    """The summary and the runs of LayerNorm and of other norms that are right on so many examples more."""
    runs = []
    for seed in range(1, num_seeds + 1):
        for norm, move in {"layernorm": 0, **moves}.items():
            num_correct = 550 + move + (seed * (1 + len(norm))) % 3
            runs.append(finish(folder, norm, seed, num_correct=num_correct, **changes))
    return summarize(runs, [], TASK, title="rt", column="RT", command="x"), runs


def test_scores_are_reported_with_what_is_missing():
    assert our_score(row(scores={1: 77.0, 2: 78.0}, mean=77.5, sd=0.7071), 2) == "77.50 ± 0.71 (n=2)"
    assert our_score(row(scores={1: None, 2: 78.0}), 2) == "not finite (n=2)"
    assert our_score(row(diverged={1: 12, 2: 30}), 2) == "diverged at step 12, 30"
    partly = row(scores={1: 77.0}, mean=77.0, diverged={2: 30})
    assert our_score(partly, 2) == "77.00 (n=1); 1 diverged at step 30"


def test_the_conclusion_names_every_relation(tmp_path):
    moves = {"adanorm": 90, "layernorm-simple": 0, "none": -90, "detachnorm": -9}
    summary, _ = compared(tmp_path, moves)
    relations = {row["norm"]: row["relation"] for row in summary["rows"]}
    assert (relations["adanorm"], relations["layernorm-simple"], relations["none"]) == ("better", "level", "worse")
    said = conclusion(summary)
    assert "AdaNorm scored better than LayerNorm" in said
    assert "LayerNorm-simple is level with LayerNorm" in said
    assert "w/o Norm scored worse than LayerNorm" in said or "w/o Norm and DetachNorm scored worse" in said


@pytest.mark.parametrize(
    ("moves", "num_seeds", "said"),
    [
        ({"adanorm": 90}, 3, "No verdict: 3 seeds per norm, and the first planned look is at 5."),
        ({"adanorm": 90}, 1, "No difference was tested: that takes at least two seeds that both LayerNorm and"),
        ({}, 5, "No difference was tested: LayerNorm is the only norm"),
    ],
)
def test_the_conclusion_says_why_there_is_no_verdict(moves, num_seeds, said, tmp_path):
    assert conclusion(compared(tmp_path, moves, num_seeds=num_seeds)[0]).startswith(said)


def test_without_layernorm_nothing_is_tested(tmp_path):
    runs = [finish(tmp_path, "adanorm", 1, num_correct=500)]
    summary = summarize(runs, [], TASK, title="rt", column="RT", command="")
    assert conclusion(summary) == "No difference was tested: layernorm is not among the norms."
    runs = [finish(tmp_path, "adanorm", 1, num_correct=500), diverge(tmp_path, "layernorm", 1)]
    summary = summarize(runs, [], TASK, title="rt", column="RT", command="")
    assert conclusion(summary).startswith("No difference was tested: no run of LayerNorm has finished.")
    assert conclusion(summary).endswith(" LayerNorm diverged with 1 seed.")


def test_runs_at_chance_are_pointed_out(tmp_path):
    summary, runs = compared(tmp_path, {"adanorm": 5}, num_seeds=2, record={"chance": 0.55})
    assert "all scores are at chance (55.0 %, the share of the largest class)" in at_chance(summary, runs)
    assert conclusion(summary, runs).startswith("No norm learned the task")
    summary, runs = compared(tmp_path, {"adanorm": 100}, num_seeds=2, record={"chance": 0.55})
    assert at_chance(summary, runs) == ""
    assert at_chance(*compared(tmp_path, {"adanorm": 5}, num_seeds=2)) == ""  # earlier runs did not record it


def test_a_speed_ratio_is_shown_with_its_range_and_only_where_seeds_agree(tmp_path):
    runs = []
    speed = {"layernorm": (100, 100), "adanorm": (110, 130), "none": (90, 120), "detachnorm": (50, None)}
    for norm, values in speed.items():
        for seed, value in enumerate(values):
            runs.append(finish(tmp_path, norm, seed, num_correct=5, record={"train_samples_per_second": value}))
    expected = {"layernorm": "100", "adanorm": "120 (1.10x to 1.30x)", "none": "105", "detachnorm": "50"}
    assert speeds(runs) == expected


def test_columns_that_say_nothing_are_left_out(tmp_path):
    def columns(losses, num_seeds):
        summary, _ = compared(tmp_path, {"adanorm": 20}, num_seeds=num_seeds, losses=losses)
        return difference_table(summary)[0]

    assert columns((0.4, 0.4), 1) == ["model", "parameters"]
    assert columns((0.5, 0.4), 1) == ["model", "loss gap", "parameters"]
    assert columns((0.5, 0.4), 2)[1:5] == ["difference from LayerNorm [95 %]", "p", "p (Holm)", "relation"]


def test_p_holm_relation_and_gap_are_explained_in_place(tmp_path):
    summary, runs = compared(tmp_path, {"adanorm": 20})
    text = page(summary, runs, b"", tmp_path)
    for term in ("Difference: the norm less", "p: how often", "p (Holm): the same, corrected", "Relation: better or"):
        assert term in text
    assert "crossed random effects" in text
    assert "lies within ±0.50, a margin fixed in advance" in text
    summary, _ = compared(tmp_path, {"adanorm": 20}, num_seeds=1)
    assert not any(re.match("p:|Relation", line) for line in notes(summary))
