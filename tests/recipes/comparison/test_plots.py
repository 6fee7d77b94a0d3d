"""The forest plot."""

import pytest

from comparison.gather import Row
from comparison.plots import draw_curves, draw_forest, style_of
from comparison.records import loss_gaps
from comparison.summary import summarize
from tests.recipes.comparison.comparison_runs import finish, write


@pytest.mark.parametrize(("higher", "sign"), [(True, 1), (False, -1)])
def test_each_norm_has_its_difference_and_interval_and_better_is_right(higher, sign, tmp_path, monkeypatch):
    runs = []
    for seed in range(1, 6):
        runs += [finish(tmp_path, "layernorm", seed, num_correct=550 + seed % 2)]
        runs += [finish(tmp_path, "adanorm", seed, num_correct=580 + seed % 3)]
    row = Row(write(tmp_path / "rt.jsonl", runs))
    monkeypatch.setattr(row.task, "higher_is_better", higher)
    [axes] = draw_forest([row]).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["AdaNorm"]
    found = row.scores.difference("adanorm")
    [point] = [line for line in axes.lines if line.get_marker() == "o"]
    assert point.get_xdata()[0] == pytest.approx(sign * found.mean)
    ends = sorted(sign * end for end in found.interval(0.95))
    assert sorted(axes.collections[0].get_segments()[0][:, 0]) == pytest.approx(ends)
    [paper] = [line for line in axes.lines if line.get_marker() == "x"]
    assert paper.get_xdata()[0] == pytest.approx(sign * (77.50 - 77.21))


def test_a_difference_that_would_dwarf_the_others_is_an_arrow_with_its_value(tmp_path):
    runs = []
    for seed in range(1, 6):
        for norm, move in {"layernorm": 0, "adanorm": 5, "layernorm-simple": -3, "none": -300}.items():
            runs.append(finish(tmp_path, norm, seed, num_correct=550 + move + (seed + len(norm)) % 3))
    row = Row(write(tmp_path / "rt.jsonl", runs))
    [axes] = draw_forest([row]).axes
    assert [text.get_text() for text in axes.texts] == [f"← {row.scores.difference('none').mean:+.2f}"]
    assert axes.get_xlim()[0] > -10


def test_curves_show_both_losses_and_their_gap(tmp_path):
    runs = [
        finish(tmp_path, norm, seed, num_correct=500 + seed) for norm in ("layernorm", "adanorm") for seed in (1, 2)
    ]
    task = Row(write(tmp_path / "rt.jsonl", runs)).task
    picture = draw_curves(summarize(runs, [], task, title="rt", column=None, command=""), runs)
    losses, gap, _, test = picture.axes
    assert [len(axes.lines) for axes in (losses, gap)] == [4, 2]
    expected = [sum(values) / 2 for values in zip(*(loss_gaps(run.record).values() for run in runs[:2]), strict=True)]
    assert gap.lines[0].get_ydata() == pytest.approx(expected)
    assert [label.get_text() for label in test.get_yticklabels()] == ["AdaNorm", "LayerNorm"]


def test_variants_of_one_norm_share_a_color_and_differ_in_line_and_marker():
    first, second = style_of("adanorm"), style_of("adanorm:C=2", ["layernorm", "adanorm"])
    assert first["color"] == second["color"] != style_of("layernorm")["color"]
    assert first["linestyle"] != second["linestyle"]
    assert first["marker"] != second["marker"]
