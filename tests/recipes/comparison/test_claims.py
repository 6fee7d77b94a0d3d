"""What becomes of the paper's claims."""

import pytest

from comparison.claims import CLAIMS, judge, relation, verdict, what_counts
from comparison.paper import COLUMNS

SIMPLE, DETACH, ADANORM, OVER_FIT = CLAIMS


def summary(differences, *, norm="adanorm", other="layernorm", column="RT", measure="scores", higher=True, lost=None):
    """A comparison in which `norm` differs from `other` by these, one a seed; `lost` diverged with every seed."""
    rows = []
    for name, moves in ((norm, differences), (other, [0.0] * len(differences))):
        values = {str(seed): 70.0 + move for seed, move in enumerate(moves)}
        diverged = dict.fromkeys(values, 5) if name == lost else {}
        values = {} if name == lost else values
        row = {"norm": name, "scores": values, "gaps": {}, "diverged": diverged, "unfinished": [], "choice": {}}
        rows.append({**row, measure: values})
    return {"rows": rows, "column": column, "title": column.lower(), "higher_is_better": higher, "decimals": 2}


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([0.9, 1.0, 1.1], "better"),
        ([-0.9, -1.0, -1.1], "worse"),
        ([0.02, -0.02, 0.01], "level"),  # within 0.29, which the paper reports for RT
        ([1.0, -1.0, 0.1], "open"),
        ([1.0], "open"),
    ],
)
def test_a_row_is_judged_by_the_interval_over_seeds(differences, expected):
    assert relation(summary(differences), ADANORM) == expected


def test_where_lower_is_better_so_it_is_judged():
    assert relation(summary([0.9, 1.0, 1.1], column="Enwiki8", higher=False), ADANORM) == "worse"
    gaps = summary([-0.9, -1.0, -1.1], norm="layernorm-simple", measure="gaps")
    assert relation(gaps, OVER_FIT) == "better"


def test_a_norm_that_diverged_is_worse_than_one_that_finished():
    def found(lost):
        return relation(summary([1.0, 1.1], norm="detachnorm", other="none", lost=lost), DETACH)

    assert (found("detachnorm"), found("none")) == ("worse", "better")


def test_one_run_that_diverged_decides_nothing():
    assert relation(summary([1.0], norm="detachnorm", other="none", lost="detachnorm"), DETACH) == "open"


@pytest.mark.parametrize("move", [1.0, 0.0, -1.0])
@pytest.mark.parametrize("which", [0, 1])
def test_a_norm_is_not_judged_by_the_runs_that_it_survived(move, which):
    rows = summary([move + 0.01, move, move - 0.01])
    del rows["rows"][which]["scores"]["2"]
    rows["rows"][which]["diverged"] = {"2": 5}
    assert relation(rows, ADANORM) == {(1.0, 1): "better", (-1.0, 0): "worse"}.get((move, which), "open")
    assert f"({('AdaNorm', 'LayerNorm')[which]} diverged with 1), " in judge([rows], ADANORM)


def test_loss_gaps_of_norms_trained_differently_are_not_compared():
    rows = summary([-0.9, -1.0, -1.1], norm="layernorm-simple", measure="gaps")
    rows["rows"][0]["choice"] = {"hidden_dropout_prob": "0.1"}
    assert relation(rows, OVER_FIT) is None
    rows["rows"][0]["choice"] = {"C": "2"}  # the norm itself
    assert relation(rows, OVER_FIT) == "better"


def test_a_norm_that_diverged_is_not_judged_while_runs_of_it_are_to_come():
    rows = summary([1.0, 1.1], norm="detachnorm", other="none", lost="detachnorm")
    rows["rows"][0]["unfinished"] = [1]
    assert relation(rows, DETACH) == "open"


def test_a_row_without_one_of_the_norms_says_nothing():
    assert relation(summary([1.0, 1.1]), DETACH) is None
    assert relation(summary([]), ADANORM) is None  # no run has finished


def test_a_run_that_diverged_has_no_loss_gap():
    rows = summary([1.0, 1.1], norm="layernorm-simple", measure="gaps", lost="layernorm-simple")
    rows["rows"][0]["scores"] = {}
    assert relation(rows, OVER_FIT) is None


def test_what_counts_in_a_row_is_what_the_paper_reports_there():
    assert what_counts("RT") == pytest.approx(0.29)
    assert what_counts("Enwiki8") == 0.01  # it reports none
    assert all(what_counts(column) > 0 for column in COLUMNS)


@pytest.mark.parametrize(
    ("claim", "relations", "expected"),
    [
        (SIMPLE, "better level better open", "supported"),
        (SIMPLE, "better level open open", "undecided here"),
        (SIMPLE, "worse worse better level", "not supported"),
        (SIMPLE, "worse better level", "undecided here"),  # three of eight rows are too few
        (DETACH, "worse worse worse better open", "supported"),
        (DETACH, "better level better worse worse", "not supported"),
        (ADANORM, "better better better open", "supported"),
        (ADANORM, "better better open open", "undecided here"),
        (ADANORM, "better better level worse", "not supported"),
        (OVER_FIT, "open open open open", "undecided here"),
        (OVER_FIT, "better better better worse", "supported"),
    ],
)
def test_a_claim_is_judged_by_how_many_rows_say_what(claim, relations, expected):
    assert verdict(relations.split(), claim) == expected


def test_a_claim_is_told_with_each_rows_figure():
    rows = [summary([0.9, 1.0, 1.1], column=column) for column in ("RT", "SST5", "MNIST")]
    said = judge([*rows, summary([1.0, -1.0], column="PTB")], ADANORM)
    assert said.startswith(
        f"{ADANORM.text}: **supported**; AdaNorm beside LayerNorm: 3 better, 0 level, 0 worse, 1 open,"
    )
    assert "of 4 rows measured (RT +1.00 [+0.75, +1.25], better; " in said
    assert "PTB +1.00 (n=1), open" in judge([summary([1.0], column="PTB")], ADANORM)
    assert judge(rows, DETACH).endswith("**undecided here**; no row measured.")
    rows[0]["rows"][0]["scores"] = {"7": 70.0}
    assert "RT no seed that both finished, open" in judge(rows, ADANORM)
