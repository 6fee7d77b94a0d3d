"""Scores by norm and seed and their differences."""

import math

import pytest
from scipy import stats

from classification import TASK
from common.checkpoints import write_json
from common.options import OptionError
from comparison.records import Run
from comparison.summary import Scores, summarize
from tasks.bytes import ByteTask
from tests.recipes.comparison.comparison_runs import diverge, finish

ABOUT = {"title": "rt", "column": "RT", "command": ""}


def test_a_difference_is_tested_over_the_seeds_that_both_finished(tmp_path):
    runs = [finish(tmp_path, "layernorm", seed, num_correct=700 + seed) for seed in (1, 2, 3, 4)]
    runs += [finish(tmp_path, "adanorm", seed, num_correct=720 - 3 * seed) for seed in (2, 3, 4)]
    runs += [diverge(tmp_path, "adanorm", 1), Run("adanorm", 9, tmp_path / "missing")]
    plain, ours = summarize(runs, [], TASK, **ABOUT)["rows"]
    assert plain["scores"] == pytest.approx({1: 70.1, 2: 70.2, 3: 70.3, 4: 70.4})
    assert (plain["difference"], ours["diverged"], ours["unfinished"]) == (None, {1: 5}, [9])
    found = ours["difference"]
    assert found["mean"] == pytest.approx(72 - 0.9 - 70.3)
    assert found["num_pairs"] == ours["num_pairs"] == 3
    assert found["interval_95"][0] < found["interval_90"][0] < found["mean"] < found["interval_90"][1]


def test_p_values_are_corrected_for_the_number_of_norms(tmp_path):
    runs = []
    for seed in range(1, 6):
        runs += [finish(tmp_path, "layernorm", seed, num_correct=700 + seed % 3)]
        runs += [finish(tmp_path, norm, seed, num_correct=690 + seed % 2) for norm in ("adanorm", "none")]
    none, _, ours = summarize(runs, [], TASK, **ABOUT)["rows"]
    for row in (ours, none):
        assert row["difference"]["p_holm"] == pytest.approx(min(1, 2 * row["difference"]["p"]))


def test_gaps_of_norms_trained_differently_are_not_compared(tmp_path):
    def gap(choice):
        runs = []
        for seed in (1, 2, 3):
            runs += [finish(tmp_path, "layernorm", seed, num_correct=700, losses=(0.5, 0.4), choice={"C": "1"})]
            losses = (0.5 + seed / 10, 0.4)
            runs += [finish(tmp_path, "adanorm", seed, num_correct=700, losses=losses, choice=choice)]
        return summarize(runs, [], TASK, **ABOUT)["rows"][1]["gap_difference"]

    assert gap({"learning_rate": "0.1"}) is None
    found = gap({"C": "2"})  # a setting of the norm itself
    expected = stats.ttest_rel([0.2, 0.3, 0.4], [0.1, 0.1, 0.1])
    assert (found["mean"], found["p"]) == pytest.approx((0.2, expected.pvalue))


def test_a_norm_that_diverged_is_worse_than_one_that_finished(tmp_path):
    def relation(num_seeds):
        runs = [finish(tmp_path, "none", seed, num_correct=500 + seed) for seed in range(1, num_seeds + 1)]
        runs += [diverge(tmp_path, "detachnorm", seed) for seed in range(1, num_seeds + 1)]
        scores = Scores(runs, TASK, "RT")
        return scores.relation("detachnorm", "none"), scores.relation("none", "detachnorm")

    assert (relation(5), relation(4)) == (("worse", "better"), ("open", "open"))


def test_a_norm_is_not_judged_by_the_runs_that_it_survived(tmp_path):
    runs = [finish(tmp_path, "layernorm", seed, num_correct=500 + seed % 2) for seed in range(1, 11)]
    runs += [finish(tmp_path, "adanorm", seed, num_correct=650 + seed % 3) for seed in range(1, 10)]
    runs += [finish(tmp_path, "layernorm-simple", seed, num_correct=350 + seed % 3) for seed in range(1, 10)]
    runs += [diverge(tmp_path, norm, 10) for norm in ("adanorm", "layernorm-simple")]
    scores = Scores(runs, TASK, "RT")
    assert [scores.relation(norm) for norm in ("adanorm", "layernorm-simple")] == ["open", "worse"]
    assert [scores.relation("layernorm", norm) for norm in ("adanorm", "layernorm-simple")] == ["open", "better"]
    assert [scores.relation(norm) for norm in ("layernorm", "none")] == ["-", "-"]
    assert scores.relation("adanorm", by_gap=True) == "-"


@pytest.mark.parametrize("tested", [True, False])
def test_scores_that_are_not_finite_leave_the_summary_whole(tested, tmp_path):
    runs = [Run(norm, seed, tmp_path / f"{norm}{seed}") for norm in ("layernorm", "adanorm") for seed in (1, 2, 3)]
    for run in runs:
        run.folder.mkdir()
        bits = None if (run.norm, run.seed) == ("adanorm", 2) else 1.0 + run.seed
        scores = {"bits_per_character": bits}
        result = {"options": {}, "test": scores if tested else None, "validation": scores, "parameters": 1}
        result |= {"history": [{"step": 1, "loss": 1.0}], "train_history": [{"step": 1, "loss": bits}]}
        write_json(run.folder / "results.json", result)
        values = [math.nan if bits is None else bits] * 2
        write_json(run.folder / "test_bits.json", {"bits": values, "characters": [1, 1]})
    summary = summarize(runs, [], ByteTask, title="enwik8", column="Enwiki8", command="")
    plain, ours = summary["rows"]
    assert (summary["split"], plain["mean"], math.isnan(ours["mean"])) == ("test" if tested else "validation", 3, True)
    assert plain["gaps"] == {1: -1.0, 2: -2.0, 3: -3.0}
    assert (ours["difference"], ours["gap_difference"]) == (None, None)


@pytest.mark.parametrize(
    ("ours", "expected"),
    [((110, 130), (120, (1.1, 1.3))), ((90, 120), (105, None)), ((50, None), (50, None)), ((None,) * 2, (None, None))],
)
def test_a_speed_ratio_is_shown_with_its_range_and_only_where_seeds_agree(ours, expected, tmp_path):
    runs = [
        finish(tmp_path, norm, seed, num_correct=5, record={"train_samples_per_second": speeds[seed]})
        for norm, speeds in {"layernorm": (100, 100), "adanorm": ours}.items()
        for seed in (0, 1)
    ]
    plain, row = summarize(runs, [], TASK, **ABOUT)["rows"]
    assert (row["speed"], row["speed_ratios"]) == (expected[0], expected[1] and pytest.approx(expected[1]))
    assert (plain["speed"], plain["speed_ratios"]) == (100, None)


def test_runs_on_different_test_sets_are_refused(tmp_path):
    runs = [finish(tmp_path, norm, 1, num_correct=700) for norm in ("layernorm", "adanorm")]
    write_json(runs[1].folder / "test_predictions.json", {"labels": [1], "predictions": [1]})
    with pytest.raises(OptionError, match=r"different numbers of examples: \[1, 1000\]"):
        Scores(runs, TASK, "RT")
