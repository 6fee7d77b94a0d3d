"""The classification recipe as users run it: tiny models, real data files, real processes."""

import hashlib
import json
import re

import pytest
from transformers import AutoModelForSequenceClassification, pipeline

import classification
import hf_adanorm
from common.endings import EXIT_DIVERGED
from tests.recipes.fault_runs import assert_refused, flags, norms_of, stopped_and_resumed
from tests.recipes.recipe_process import read_results, same_weights, weights
from tests.recipes.tiny_configs import TINY_CLASSIFIER


@pytest.fixture(scope="module")
def finished(texts, tmp_path_factory):
    """A finished run tested on its own validation file: both accuracies must agree."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    classification.main(arguments_for(texts, folder, C=1.3, k=0.07, test_file=texts["validation"]))
    return folder


def arguments_for(texts, folder, **changes):
    options = {
        "train_file": texts["train"],
        "validation_file": texts["validation"],
        "model_config": json.dumps(TINY_CLASSIFIER),
        "min_frequency": 1,
        "max_length": 32,
        "batch_size": 8,
        "max_steps": 60,
        "learning_rate": 0.01,
        "output_dir": folder,
        **changes,
    }
    return flags(options)


def load(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder / "best")


def test_a_compiled_model_is_saved_as_what_it_is(texts, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")  # traced as by --compile true, without a C++ compiler
    classification.main(arguments_for(texts, tmp_path, max_steps=1, max_validation_samples=8))
    loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "best", output_loading_info=True)
    assert not any(info.values())
    trained = weights(tmp_path, 1)
    assert all(value.equal(trained.pop(name)) for name, value in loaded.state_dict().items())
    assert not trained


def test_results_hold_what_others_script_against(finished):
    results = read_results(finished)
    assert (results["norm"], results["settings"], results["norm_modules"]) == ("adanorm", {"C": 1.3, "k": 0.07}, 3)
    assert (results["seed"], results["steps"], results["num_processes"]) == (1, 60, 1)
    assert results["parameters"] == sum(p.numel() for p in load(finished).parameters())
    assert results["train_samples_per_second"] > 0
    assert results["command"].startswith("recipes/classification.py --train_file")
    assert results["versions"]["hf-adanorm"] == hf_adanorm.__version__
    assert results["validation"]["accuracy"] > 80
    assert results["test"]["accuracy"] == results["validation"]["accuracy"]  # in a fresh process


def test_the_best_model_works_in_a_stock_pipeline_with_its_norms(finished):
    classify = pipeline("text-classification", str(finished / "best"))
    assert norms_of(classify.model) == [("adanorm", {"C": 1.3, "k": 0.07})] * 3
    assert [answer["label"] for answer in classify(["word1 great word2", "word5 dull word3"])] == ["1", "0"]


def test_the_papers_encoder_in_batches_by_tokens(texts, tmp_path):
    model = {**TINY_CLASSIFIER, "model_type": "roberta-prelayernorm", "max_position_embeddings": 33}
    changes = {"model_config": json.dumps(model), "max_tokens": 64, "num_epochs": 2, "max_steps": "null"}
    classification.main(arguments_for(texts, tmp_path, norm="adanorm", **changes))
    results = read_results(tmp_path)
    assert results["norm_modules"] == 4  # before attention and feed-forward, of the embeddings, after the last layer
    fewest = results["train_tokens"] / 64
    assert fewest <= results["steps_per_epoch"] <= 1.3 * fewest
    assert results["history"][-1]["epoch"] == 2


def test_a_finished_run_is_not_repeated(finished, texts, capsys):
    before = (finished / "results.json").stat().st_mtime_ns
    classification.main(arguments_for(texts, finished, C=1.3, k=0.07, test_file=texts["validation"]))
    first, second = capsys.readouterr().out.splitlines()
    assert first == "1 process on cpu (two: torchrun --nproc_per_node 2 recipes/classification.py ...)"
    assert "nothing to do" in second
    assert (finished / "results.json").stat().st_mtime_ns == before


MY_NORM = """
import torch
from torch import nn


class Derf(nn.Module):
    def __init__(self, normalized_shape, eps=1e-5, *, alpha=0.5):
        super().__init__()
        self.alpha = nn.Parameter(torch.full((), float(alpha)))
        self.gain = nn.Parameter(torch.ones(normalized_shape))

    def forward(self, x):
        return self.gain * torch.erf(self.alpha * x)
"""


def test_a_norm_of_the_users_own_is_trained_tested_and_trained_further(texts, tmp_path, capsys):
    file = tmp_path / "my_norms.py"
    file.write_text(MY_NORM)
    changes = {"norm": f"{file}:Derf", "alpha": 0.7, "max_steps": 8, "test_file": texts["validation"]}
    classification.main(arguments_for(texts, tmp_path / "run", **changes))
    results = read_results(tmp_path / "run")
    assert (results["norm"], results["settings"], results["norm_modules"]) == (f"{file}:Derf", {"alpha": 0.7}, 3)
    assert results["norm_files"] == {"my_norms.py": hashlib.sha256(MY_NORM.encode()).hexdigest()}
    assert results["test"]["accuracy"] == results["validation"]["accuracy"]  # in a fresh process
    assert "trust_remote_code=True)" in capsys.readouterr().out
    start = {"model_config": "{}", "model_name_or_path": tmp_path / "run" / "best", "learning_rate": 1e-9}
    start |= {"norm": f"{file}:Derf", "alpha": 0.7, "max_steps": 1}
    classification.main(arguments_for(texts, tmp_path / "more", **start))
    assert read_results(tmp_path / "more")["validation"] == pytest.approx(results["validation"], rel=1e-5)
    file.write_text(MY_NORM.replace("0.5", "0.4"))
    with pytest.raises(SystemExit) as ended:
        classification.main(arguments_for(texts, tmp_path / "run", **changes))
    assert ended.value.code == 2
    assert "what --norm names has changed since" in capsys.readouterr().err


def test_a_setting_changes_over_steps_also_in_the_best_model_and_after_a_stop(texts, tmp_path):
    changes = {"norm_schedule": "k:linear:0:0.1:0.5", "max_steps": 24, "eval_steps": 6, "checkpointing_steps": 3}
    classification.main(arguments_for(texts, tmp_path / "whole", **changes))
    whole = read_results(tmp_path / "whole")
    expected = min(whole["best_step"] / 12, 1) * 0.1
    ks = [settings["k"] for _, settings in norms_of(load(tmp_path / "whole"))]
    assert ks == pytest.approx([expected] * 3)
    again = tmp_path / "again"
    resumed = stopped_and_resumed(lambda: classification.main(arguments_for(texts, again, **changes)), again)
    assert resumed is None
    assert read_results(again)["history"] == whole["history"]
    assert same_weights(again / "checkpoint-24", tmp_path / "whole" / "checkpoint-24")
    classification.main(arguments_for(texts, tmp_path / "fixed", k=0.1, max_steps=24, eval_steps=6))
    assert read_results(tmp_path / "fixed")["history"][0]["loss"] != whole["history"][0]["loss"]


def test_options_that_change_nothing_change_nothing(texts, tmp_path, capsys):
    """Set all options that decide where a run writes and how it is watched."""
    changes = {"save_total_limit": 2, "logging_steps": 3, "report_to": "tensorboard", "watch_norms": 2}
    changes |= {"dataloader_workers": 1, "preprocessing_workers": 2, "checkpointing_steps": 5}
    plain, changed = tmp_path / "plain", tmp_path / "changed"
    classification.main(arguments_for(texts, plain, max_steps=12, eval_steps=6))
    capsys.readouterr()
    classification.main(arguments_for(texts, changed, max_steps=12, eval_steps=6, **changes))
    assert re.search(r"step 3/12: loss \d", capsys.readouterr().out)
    assert same_weights(plain / "checkpoint-12", changed / "checkpoint-12")
    assert read_results(plain)["history"] == read_results(changed)["history"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train_file": "absent.csv"}, "--train_file absent.csv: no such file"),
        ({"max_length": 64}, "--max_length 64 is beyond the model's 32 positions"),
        ({"include": "encoder.nothing"}, "--norm adanorm: "),
        ({"C": 0}, "--norm adanorm: "),
        ({"norm_schedule": "k:0:0.1"}, "--norm_schedule k:0:0.1: expected SETTING:SHAPE:FROM:TO[:OVER], such as"),
        ({"norm_schedule": "k:linear:0.1:-1"}, "--norm_schedule k:linear:0.1:-1: k must be a finite number >= 0"),
        ({"norm_schedule": "alpha:linear:0:1"}, "(adanorm) has no setting 'alpha'; it has ['C', 'k']"),
        ({"report_to": "[tensorbord]"}, "--report_to tensorbord: expected all, aim, "),
        ({"output_dir": "/proc/run"}, "--output_dir /proc/run: cannot be written: "),
        ({"batch_size": 0}, "--batch_size must be positive, got 0"),
        ({"seed": -1}, "--seed must be in [0, 4294967295], got -1"),
        ({"model_name_or_path": "no/such/model", "model_config": "{}"}, "--model_name_or_path no/such/model: "),
        ({"model_config": '{"model_type": "bert", "hidden_act": "nosuch"}'}, "no bert can be built from it: KeyError"),
    ],
)
def test_bad_input_ends_in_one_line_before_training(changes, said, texts, tmp_path, capsys):
    assert_refused(classification.main, arguments_for(texts, tmp_path / "run", **changes), said, capsys)


def test_divergence_is_reported_with_its_step_and_the_checkpoint_stands(texts, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        classification.main(arguments_for(texts, tmp_path, learning_rate=1e36, max_grad_norm=0, checkpointing_steps=1))
    assert ended.value.code == EXIT_DIVERGED
    error = capsys.readouterr().err
    step = int(re.search(r"error: step (\d+): loss", error)[1])
    assert re.search(r"first in the output of bert\.\S+ \(\w+\)", error)
    assert (tmp_path / f"checkpoint-{step - 1}" / "model.safetensors").is_file() == (step > 1)
    assert f"step {step}" in json.loads((tmp_path / "diverged.json").read_text())["diverged"]


def test_a_run_that_stopped_at_a_spike_goes_on_without_that_step(texts, tmp_path, capsys):
    options = {"spike_sigmas": 1, "checkpointing_steps": 10, "max_steps": 160}
    with pytest.raises(SystemExit) as ended:
        classification.main(arguments_for(texts, tmp_path, on_spike="stop", **options))
    assert ended.value.code == EXIT_DIVERGED
    step = int(re.search(r"error: step (\d+): .* is a spike", capsys.readouterr().err)[1])
    assert (tmp_path / f"checkpoint-{(step - 1) // 10 * 10}").is_dir()
    classification.main(arguments_for(texts, tmp_path, on_spike="skip", **options))
    said = capsys.readouterr().out
    assert "resuming from step" in said
    assert re.search(rf"step {step}: .*: step skipped", said)
    assert json.loads((tmp_path / "results.json").read_text())["skipped_steps"] >= 1
    assert not (tmp_path / "diverged.json").exists()


def test_a_pretrained_model_is_fine_tuned_and_tracked(finished, texts, tmp_path):
    changes = {"model_config": "{}", "model_name_or_path": finished / "best", "C": 1.3, "k": 0.07}
    classification.main(
        arguments_for(texts, tmp_path, max_steps=2, learning_rate=1e-6, report_to="[tensorboard]", **changes)
    )
    results = read_results(tmp_path)
    assert results["validation"]["accuracy"] == read_results(finished)["validation"]["accuracy"]
    assert results["test"] is None
    assert list(tmp_path.rglob("events.out.tfevents*"))


def test_sentence_pairs_with_named_classes(texts, tmp_path):
    rows = [json.loads(line) for line in texts["train"].read_text().splitlines()]
    pairs = [{"a": r["text"], "b": r["text"][::-1], "kind": ["bad", "good"][r["label"]]} for r in rows]
    file = tmp_path / "pairs.json"
    file.write_text(json.dumps(pairs))
    changes = {"train_file": file, "validation_file": file, "max_length": 32, "max_steps": 2}
    columns = {"text_column": "a", "text_pair_column": "b", "label_column": "kind", "tokenizer": "bpe"}
    classification.main(arguments_for(texts, tmp_path / "run", **changes, **columns, test_file=file))
    assert load(tmp_path / "run").config.id2label == {0: "bad", 1: "good"}
    results = read_results(tmp_path / "run")
    assert results["test"]["accuracy"] == results["validation"]["accuracy"]


def test_a_pretrained_model_folds_by_a_fit_with_a_k_for_each_norm(texts, tmp_path):
    trained, fitted = tmp_path / "layernorm", tmp_path / "run"
    classification.main(arguments_for(texts, trained, norm="layernorm", max_steps=10))
    changes = {"model_config": "{}", "model_name_or_path": trained / "best", "affine": "fold", "k": 1.0}
    changes |= {"unfoldable": "calibrate", "calibrate_k": True, "learning_rate": 1e-9, "max_steps": 2}
    classification.main(arguments_for(texts, fitted, **changes))
    results = read_results(fitted)
    ks = [settings["k"] for _, settings in norms_of(load(fitted))]
    assert len(set(ks)) == results["norm_modules"] == 3
    assert all(0 < k < 1 for k in ks)
    loss = read_results(trained)["validation"]["loss"]
    assert results["validation"]["loss"] == pytest.approx(loss, abs=0.02)
