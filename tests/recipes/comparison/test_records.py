"""Runs and their records."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies

from classification import TASK
from common.options import OptionError
from comparison.records import Run, decode, encode, overfit_gap, read_records
from tests.recipes.comparison.comparison_runs import diverge, finish, write


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
    record = {
        "train_history": [{"step": step, "loss": loss} for step, loss in train],
        "history": [{"step": step, "loss": loss} for step, loss in evaluations],
    }
    assert overfit_gap(record) == pytest.approx(gap, nan_ok=True)


@pytest.mark.parametrize("text", ['{"half', "{}", "[]"])
def test_a_broken_result_of_a_run_is_named(text, tmp_path):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(OptionError, match=r"results\.json is not a result of a recipe .*: delete "):
        _ = Run("adanorm", 1, tmp_path).record


def test_a_record_stands_for_its_run(tmp_path):
    run = finish(tmp_path, "adanorm", 3, num_correct=700, choice={"C": "2"})
    [found] = read_records(write(tmp_path / "rt.jsonl", [run]))
    assert (found.norm, found.seed, found.status, found.choice) == ("adanorm", 3, "finished", {"C": "2"})
    assert np.array_equal(found.outcomes(TASK), run.outcomes(TASK))
    assert found.record["test"] == {"accuracy": 70.0}
    assert overfit_gap(found.record) == overfit_gap(run.record)
    again = write(tmp_path / "again.jsonl", [found])
    assert again.read_bytes() == (tmp_path / "rt.jsonl").read_bytes()
    assert found.record["content"] == {"train_file": "abc"}
    assert [found.record["options"][name] for name in ("split_sizes", "num_epochs")] == [[8608, 964, 1089], 5]


def test_a_record_holds_no_paths_labels_predictions_or_defaults(tmp_path):
    files = {"train_file": "/home/me/rt/train.jsonl", "output_dir": str(tmp_path)}
    run = finish(tmp_path, "adanorm", 3, num_correct=700, record={"command": "x --train_file /home/me/x"}, **files)
    text = write(tmp_path / "rt.jsonl", [run]).read_text(encoding="utf-8")
    assert json.loads(text)["options"]["train_file"] == "train.jsonl"
    for absent in ("/home", str(tmp_path), "labels", "predictions", '"seed": 3, "', "weight_decay"):
        assert absent not in text.replace('"seed": 3, "status"', "")
    assert len(text) < 3000


def test_the_record_of_a_run_that_diverged_says_when(tmp_path):
    [found] = read_records(write(tmp_path / "rt.jsonl", [diverge(tmp_path, "none", 1)]))
    assert (found.status, found.record["step"]) == ("diverged", 5)


def test_records_of_layernorm_do_not_depend_on_which_norms_would_be_swapped(tmp_path):
    runs = [finish(tmp_path, norm, 1, num_correct=1, include=["x"]) for norm in ("layernorm", "adanorm")]
    found = {run.norm: run.record["options"] for run in read_records(write(tmp_path / "rt.jsonl", runs))}
    assert found["adanorm"].pop("include") == ["x"]
    assert found["adanorm"] == found["layernorm"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no such file; recipes/compare.py writes records.jsonl"),
        ("{}\n", "line 1: not a run record of format 1"),
        ("{half", "line 1: not a run record"),
        ("twice", "line 2: a second record of adanorm, seed 3"),
        ("format", "line 1: not a run record of format 1 .format 2"),
    ],
)
def test_what_is_no_record_is_refused_with_its_line(text, said, tmp_path):
    path = tmp_path / "rt.jsonl"
    if text in ("twice", "format"):
        line = write(path, [finish(tmp_path, "adanorm", 3, num_correct=7)]).read_text()
        text = 2 * line if text == "twice" else line.replace('"format": 1', '"format": 2')
    if text is not None:
        path.write_text(text)
    with pytest.raises(OptionError, match=said):
        read_records(path)


_COLUMNS = st.one_of(
    numpy_strategies.arrays(np.float64, 9, elements=st.integers(0, 1).map(float)),
    numpy_strategies.arrays(np.float64, 9, elements=st.integers(0, 65535).map(float)),
    numpy_strategies.arrays(np.float64, 9, elements=st.floats(-1e6, 1e6, width=32)),
    numpy_strategies.arrays(np.float64, 9, elements=st.just(3.5)),
)


@given(st.lists(_COLUMNS, min_size=1, max_size=4))
def test_outcomes_are_decoded_as_they_were_encoded(columns):
    outcomes = np.stack(columns, axis=1)
    assert np.array_equal(decode(json.loads(json.dumps(encode(outcomes)))), outcomes)


def test_correct_answers_take_a_bit_each():
    correct = np.random.default_rng(0).integers(0, 2, 4000)
    assert len(json.dumps(encode(np.stack([correct, np.ones(4000)], 1)))) < 4000 / 8 * 4 / 3 + 60
