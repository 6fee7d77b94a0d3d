"""What is read off finished runs for a comparison."""

import math

import pytest

from common.checkpoints import write_json
from comparison.runs import RecordError, Run, overfit_gap, summarize
from tasks.bytes import ByteTask


def record(train, evaluations):
    return {
        "train_history": [{"step": step, "loss": loss} for step, loss in train],
        "history": [{"step": step, "loss": loss} for step, loss in evaluations],
    }


@pytest.mark.parametrize(
    ("train", "evaluations", "gap"),
    [
        # The mean of the steps after the evaluation before: of 15 steps 5 at 0.4, 10 at 0.1.
        ([(10, 0.9), (20, 0.4), (30, 0.1)], [(15, 0.7), (30, 0.5)], 0.5 - 3.0 / 15),
        # One evaluation: all steps, of which the last entry holds four.
        ([(10, 0.9), (14, 0.2)], [(14, 0.5)], 0.5 - 9.8 / 14),
        # Training went on after the last evaluation.
        ([(10, 0.9), (20, 0.4)], [(10, 0.7), (15, 0.5)], 0.5 - 0.4),
        ([(10, None)], [(10, 0.5)], math.nan),
        ([(10, 0.9)], [(10, None)], math.nan),
        ([], [(10, 0.5)], math.nan),
    ],
)
def test_the_gap_is_the_last_validation_loss_less_the_training_loss_since_the_evaluation_before(
    train, evaluations, gap
):
    assert overfit_gap(record(train, evaluations)) == pytest.approx(gap, nan_ok=True)


@pytest.mark.parametrize(("text", "said"), [('{"half', "cannot be read"), ("{}", "was not written by a recipe")])
def test_a_broken_record_of_a_run_is_named(text, said, tmp_path):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(RecordError, match=rf"results\.json {said}"):
        _ = Run("adanorm", 1, tmp_path).record


def test_a_score_or_loss_that_is_not_finite_leaves_the_summary_whole(tmp_path):
    runs = [Run(norm, seed, tmp_path / f"{norm}{seed}") for norm in ("layernorm", "adanorm") for seed in (1, 2, 3)]
    for run in runs:
        run.folder.mkdir()
        bits = None if (run.norm, run.seed) == ("adanorm", 2) else 1.0 + run.seed
        scores = {"bits_per_character": bits}
        losses = record([(1, bits)], [(1, 1.0)])
        write_json(
            run.folder / "results.json", {"options": {}, "test": None, "validation": scores, "parameters": 1, **losses}
        )
    about = {"title": "enwik8", "column": "Enwiki8", "command": "", "num_resamples": 100}
    plain, ours = summarize(runs, [], ByteTask, **about)["rows"]
    assert (plain["mean"], plain["sd"], plain["gap"]["mean"]) == (3.0, 1.0, -2.0)
    assert [math.isnan(value) for value in (ours["mean"], ours["gap"]["mean"])] == [True, True]
    assert (ours["sd"], ours["gap"]["sd"], ours["over_seeds"], ours["gap_over_seeds"]) == (None,) * 4


def test_a_score_that_is_not_finite_is_no_significant_difference(tmp_path):
    runs = [Run(norm, 1, tmp_path / norm) for norm in ("layernorm", "adanorm", "none")]
    for run, bits in zip(runs, ([4.0, 6.0], [3.0, 5.0], [4.0, math.nan]), strict=True):
        run.folder.mkdir()
        scores = {"bits_per_character": sum(bits) / 4}
        record = {"options": {}, "test": scores, "validation": scores, "parameters": 1}
        write_json(run.folder / "results.json", {**record, "history": [{"step": 1}], "train_history": []})
        write_json(run.folder / "test_bits.json", {"bits": bits, "characters": [2, 2]})
    about = {"title": "enwik8", "column": "Enwiki8", "command": "", "num_resamples": 100}
    _, ours, lost = summarize(runs, [], ByteTask, **about)["rows"]
    assert ours["over_examples"]["mean"] == -0.5
    assert lost["over_examples"] is None
