"""Words and tables of a comparison."""

import math
import re

import pytest

from classification import TASK
from comparison.records import Run
from comparison.report import conclusion, notes, score_cell, score_table, write_report
from comparison.summary import summarize
from tests.recipes.comparison.comparison_runs import diverge, finish

ABOUT = {"title": "rt", "column": "RT", "command": "x"}


def compared(folder, moves, *, num_seeds=5, **changes):
    """Return the summary and the runs of LayerNorm and of other norms that are right on so many examples more."""
    runs = []
    for seed in range(1, num_seeds + 1):
        for norm, move in {"layernorm": 0, **moves}.items():
            num_correct = 550 + move + (seed * (1 + len(norm))) % 3
            runs.append(finish(folder, norm, seed, num_correct=num_correct, **changes))
    return summarize(runs, [], TASK, **ABOUT), runs


def test_scores_are_reported_with_what_is_missing():
    assert score_cell({1: 77.0, 2: 78.0}, 0, 2) == "77.50 ± 0.71 (n=2)"
    assert score_cell({1: math.nan, 2: 78.0}, 0, 2) == "not finite (n=2)"
    assert score_cell({}, 2, 2) == "2 diverged"
    assert score_cell({1: 77.0}, 1, 2) == "77.00 (n=1); 1 diverged"
    assert score_cell({}, 0, 2) == "-"


def test_the_conclusion_names_every_relation(tmp_path):
    _, runs = compared(tmp_path, {"adanorm": 90, "layernorm-simple": 0, "none": -90, "dyt": -85})
    for seed in range(1, 6):
        runs.append(finish(tmp_path, "detachnorm", seed, num_correct=550 + 40 * (-1) ** seed))
    assert conclusion(summarize(runs, [], TASK, **ABOUT)) == (
        "Better than LayerNorm: AdaNorm. Worse than LayerNorm: w/o Norm, DyT. Level with LayerNorm: LayerNorm-simple. "
        "Open: DetachNorm."
    )


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
    assert conclusion(summarize(runs, [], TASK, **ABOUT)) == (
        "No difference was tested: layernorm is not among the norms."
    )
    runs += [diverge(tmp_path, "layernorm", 1)]
    assert conclusion(summarize(runs, [], TASK, **ABOUT)) == (
        "No difference was tested: no run of LayerNorm has finished. LayerNorm diverged with 1 seed."
    )
    equal = [finish(tmp_path, norm, seed, num_correct=500) for norm in ("layernorm", "adanorm") for seed in (1, 2)]
    assert "differ by the same amount with every seed." in conclusion(summarize(equal, [], TASK, **ABOUT))


def test_a_comparison_of_which_no_run_finished_has_a_report(tmp_path):
    runs = [Run("layernorm", 1, tmp_path / "a"), diverge(tmp_path, "adanorm", 1)]
    summary = summarize(runs, [], TASK, **ABOUT)
    write_report(tmp_path, summary, runs)
    assert conclusion(summary).endswith("no run of LayerNorm has finished. AdaNorm diverged with 1 seed.")
    assert "| LayerNorm | 77.21 | not finished |" in (tmp_path / "table.md").read_text(encoding="utf-8")


def test_runs_at_chance_are_pointed_out(tmp_path):
    summary, _ = compared(tmp_path, {"adanorm": 5}, num_seeds=2, record={"chance": 0.55})
    assert conclusion(summary).startswith("No norm learned the task: no mean score is clearly above 55.0 %, the")
    summary, _ = compared(tmp_path, {"adanorm": 100}, num_seeds=2, record={"chance": 0.55})
    assert conclusion(summary).startswith("No verdict")
    summary, _ = compared(tmp_path, {"adanorm": 5}, num_seeds=2)  # earlier runs did not record it
    assert conclusion(summary).startswith("No verdict")


def test_columns_that_say_nothing_are_left_out(tmp_path):
    def columns(losses, num_seeds):
        summary, _ = compared(tmp_path, {"adanorm": 20}, num_seeds=num_seeds, losses=losses)
        return score_table(summary)[0]

    scores = ["model", "RT accuracy, paper", "rt accuracy (%), ours, test (higher is better)"]
    assert columns((0.4, 0.4), 1) == [*scores, "parameters"]
    assert columns((0.5, 0.4), 1) == [*scores, "loss gap", "parameters"]
    tested = ["difference from LayerNorm [95 %]", "p", "p (Holm)", "relation"]
    assert columns((0.5, 0.4), 2) == [*scores, *tested, "loss gap", "parameters"]


def test_a_row_has_scores_differences_gaps_and_speed(tmp_path):
    runs = []
    for seed, (ours, theirs) in enumerate([(110, 100), (130, 100)]):
        speed = "train_samples_per_second"
        runs += [finish(tmp_path, "layernorm", seed, num_correct=550 + seed, record={speed: theirs})]
        losses = (0.5 + seed / 10, 0.4)
        runs += [finish(tmp_path, "adanorm", seed, num_correct=560, record={speed: ours}, losses=losses)]
    plain, ours = score_table(summarize(runs, [], TASK, **ABOUT))[1:]
    assert plain == ["LayerNorm", "77.21", "55.05 ± 0.07 (n=2)", *[""] * 4, "0.100 ± 0.000", "", "7", "100"]
    assert ours[:3] == ["AdaNorm", "77.50", "56.00 ± 0.00 (n=2)"]
    assert re.fullmatch(r"\+0\.95 \[[+-]\d\.\d\d, \+\d\.\d\d\]", ours[3])
    assert ours[6:8] == ["open", "0.150 ± 0.071"]
    assert re.fullmatch(r"\+0\.050 \[-0\.585, \+0\.685\]", ours[8])
    assert ours[9:] == ["7", "120 (1.10x to 1.30x)"]


def test_p_holm_relation_and_gap_are_explained_in_place(tmp_path):
    summary, runs = compared(tmp_path, {"adanorm": 20})
    write_report(tmp_path, summary, runs)
    for name in ("report.html", "table.md"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        for term in ("Difference: the norm less", "p: how often", "p (Holm): the same", "Relation: better or"):
            assert term in text
        assert "other test examples (1,000 here) as crossed random effects" in text
        assert "lies within ±0.50, a margin fixed in advance" in text
        assert "Loss gap: the validation loss" in text
    summary, _ = compared(tmp_path, {"adanorm": 20}, num_seeds=1)
    assert not any(re.match("p:|Relation", line) for line in notes(summary))


def test_the_page_shows_every_run_and_quotes_what_it_is_given(tmp_path):
    runs = [finish(tmp_path, "layernorm", 1, num_correct=500), diverge(tmp_path, "adanorm", 1)]
    write_report(tmp_path, summarize(runs, [], TASK, title="a <b>", column=None, command="x"), runs)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert '<a href="layernorm-1/">layernorm</a>' in text
    assert "<td>diverged at step 5</td>" in text
    assert "<td>accuracy 50</td>" in text
    assert "Norms compared: a &lt;b&gt;" in text
    assert "8,608 examples to train on, 1,000 to test on" in text
    assert "20 updates (2 epochs), 1 seed" in " ".join(text.split())
