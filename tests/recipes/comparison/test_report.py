"""Words and tables of a comparison."""

from comparison.report import conclusion, our_score, to_latex, to_markdown


def row(**changes):
    blank = {"norm": "adanorm", "scores": {}, "mean": None, "sd": None, "diverged": {}, "unfinished": []}
    return {**blank, "over_examples": None, "over_seeds": None, **changes}


def test_scores_are_told_with_what_is_missing():
    assert our_score(row(scores={1: 77.0, 2: 78.0}, mean=77.5, sd=0.7071), 2) == "77.50 ± 0.71 (n=2)"
    assert our_score(row(scores={1: None, 2: 78.0}), 2) == "not finite (n=2)"
    assert our_score(row(diverged={1: 12, 2: 30}), 2) == "diverged at step 12, 30"
    partly = row(scores={1: 77.0}, mean=77.0, diverged={2: 30})
    assert our_score(partly, 2) == "77.00 (n=1); 1 diverged at step 30"


def test_the_conclusion_counts_a_lower_score_as_better_where_it_is():
    difference = {"mean": -0.1, "low": -0.2, "high": -0.05, "p_holm": 0.01}
    rows = [
        row(norm="layernorm", scores={1: 1.0}),
        row(scores={1: 0.9}, over_examples=difference),
        row(norm="detachnorm", scores={1: 1.0}, over_examples={**difference, "p_holm": 0.4}),
        row(norm="none", diverged={1: 5}),
    ]
    said = conclusion({"rows": rows, "higher_is_better": False})
    assert said.startswith(
        "AdaNorm scored better than LayerNorm; DetachNorm cannot be told apart from LayerNorm; w/o Norm diverged"
    )
    assert conclusion({"rows": rows, "higher_is_better": True}).startswith("DetachNorm") is False
    assert "AdaNorm scored worse" in conclusion({"rows": rows, "higher_is_better": True})


def test_tables_escape_what_their_language_reserves():
    table = [["model", "a_b (%)"], ["x & y", "1 ± 2"]]
    assert r"x \& y & 1 $\pm$ 2" in to_latex(table)
    assert r"a\_b (\%)" in to_latex(table)
    assert to_markdown(table).splitlines()[1] == "|---|---:|"
