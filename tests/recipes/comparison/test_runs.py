"""What is read off finished runs for a comparison."""

import math

import pytest

from comparison.runs import RecordError, Run, overfit_gap


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
