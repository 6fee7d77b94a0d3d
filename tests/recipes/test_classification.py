"""The classification recipe as users run it: tiny models, real data files, real processes."""

import hashlib
import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, pipeline

import classification
import hf_adanorm
from common.endings import EXIT_DIVERGED
from tests.recipes.fault_runs import stopped_and_resumed
from tests.recipes.recipe_process import two_processes
from tests.recipes.tiny_configs import TINY_CLASSIFIER

SCRIPT = Path(classification.__file__)


def read_results(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def weights(folder, step):
    return load_file(folder / f"checkpoint-{step}" / "model.safetensors")


def assert_same_weights(left, right):
    assert left.keys() == right.keys()
    assert [name for name in left if not left[name].equal(right[name])] == []


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
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def test_a_compiled_model_is_saved_as_what_it_is(texts, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")  # traced as by --compile true, without a C++ compiler
    classification.main(arguments_for(texts, tmp_path, max_steps=1, max_validation_samples=8))
    loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "best", output_loading_info=True)
    assert not any(info.values())
    assert_same_weights(loaded.state_dict(), weights(tmp_path, 1))


def test_results_hold_what_others_script_against(finished):
    results = read_results(finished)
    assert results["norm"] == "adanorm"
    assert results["norm_modules"] == 3
    assert (results["seed"], results["steps"], results["num_processes"]) == (1, 60, 1)
    assert results["parameters"] == sum(p.numel() for p in load(finished).parameters())
    assert results["train_samples_per_second"] > 0
    assert "--norm" not in results["command"]
    assert results["command"].startswith("recipes/classification.py --train_file")
    assert results["versions"]["hf-adanorm"] == hf_adanorm.__version__


def test_accuracy_in_a_fresh_process_equals_that_in_memory(finished):
    results = read_results(finished)
    assert results["validation"]["accuracy"] > 80
    assert results["test"]["accuracy"] == results["validation"]["accuracy"]


def load(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder / "best")


def test_the_best_model_works_in_a_stock_pipeline_with_its_norms(finished):
    model = load(finished)
    norms = [module for module in model.modules() if getattr(module, "is_adanorm_module", False)]
    assert [(module.norm_name, module.C, module.k) for module in norms] == [("adanorm", 1.3, 0.07)] * 3
    classify = pipeline("text-classification", str(finished / "best"))
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
    start = {**changes, "model_config": "{}", "model_name_or_path": tmp_path / "run" / "best", "learning_rate": 1e-9}
    classification.main(arguments_for(texts, tmp_path / "more", **{**start, "max_steps": 1}))
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
    norms = [module for module in load(tmp_path / "whole").modules() if getattr(module, "is_adanorm_module", False)]
    assert [norm.k for norm in norms] == pytest.approx([expected] * 3)
    again = tmp_path / "again"
    resumed = stopped_and_resumed(lambda: classification.main(arguments_for(texts, again, **changes)), again)
    assert resumed is None
    assert read_results(again)["history"] == whole["history"]
    assert_same_weights(weights(again, 24), weights(tmp_path / "whole", 24))
    classification.main(arguments_for(texts, tmp_path / "fixed", k=0.1, max_steps=24, eval_steps=6))
    assert read_results(tmp_path / "fixed")["history"][0]["loss"] != whole["history"][0]["loss"]


def test_options_that_change_nothing_change_nothing(texts, tmp_path, capsys):
    """Those of where a run writes and how it is watched, all at once; the losses are told without a bar, too."""
    changes = {"save_total_limit": 2, "logging_steps": 3, "report_to": "tensorboard", "watch_norms": 2}
    changes |= {"progress_bar": False, "dataloader_workers": 1, "preprocessing_workers": 2, "checkpointing_steps": 5}
    plain, changed = tmp_path / "plain", tmp_path / "changed"
    classification.main(arguments_for(texts, plain, max_steps=12, eval_steps=6))
    capsys.readouterr()
    classification.main(arguments_for(texts, changed, max_steps=12, eval_steps=6, **changes))
    assert re.search(r"step 3/12: loss \d", capsys.readouterr().out)
    assert_same_weights(weights(plain, 12), weights(changed, 12))
    assert read_results(plain)["history"] == read_results(changed)["history"]


def test_other_options_in_the_same_folder_are_refused_by_name(finished, texts, capsys):
    with pytest.raises(SystemExit) as ended:
        classification.main(arguments_for(texts, finished, C=1.2, k=0.07, test_file=texts["validation"]))
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "(norm_settings: {'C': 1.3, 'k': 0.07} in the checkpoint, {'C': 1.2, 'k': 0.07} now)" in said
    assert f"To train its model further, give --model_name_or_path {finished / 'best'}" in said


def test_two_processes_do_what_one_does(texts, tmp_path):
    # Without dropout, whose masks are drawn per process.
    model = json.dumps({**TINY_CLASSIFIER, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    common = {"model_config": model, "max_steps": 12, "eval_steps": 4}
    one, two = tmp_path / "one", tmp_path / "two"
    classification.main(arguments_for(texts, one, batch_size=8, **common))
    command = arguments_for(texts, two, batch_size=4, logging_steps=4, test_file=texts["validation"], **common)
    codes, said = two_processes("classification", [command, command], tmp_path)
    assert codes == [0, 0], said
    left, right = read_results(one), read_results(two)
    assert right["num_processes"] == 2
    # Sums of floats in another order: 1e-5 on losses of about 0.7 after 12 steps.
    for a, b in zip(left["history"], right["history"], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-5)
        assert b["accuracy"] == a["accuracy"]  # of 41 examples, an odd number: none counted twice
    assert right["test"]["accuracy"] == right["validation"]["accuracy"]
    for name, value in weights(one, 12).items():
        assert value.sub(weights(two, 12)[name]).abs().max() < 1e-4, name
    lines = [line for log in said for line in log.splitlines() if line.startswith("step 4")]
    assert len(lines) == 2, said  # one of training, one of validation, from one process


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train_file": "absent.csv"}, "--train_file absent.csv: no such file"),
        ({"max_length": 64}, "--max_length 64 is beyond the model's 32 positions"),
        ({"include": "encoder.nothing"}, "--norm adanorm: "),
        ({"C": 0}, "--norm adanorm: "),
        ({"norm_schedule": "k:0:0.1"}, "--norm_schedule k:0:0.1: expected SETTING:SHAPE:FROM:TO[:OVER], such as"),
        ({"norm_schedule": "k:linear:0.1:-1"}, "--norm_schedule: k must be a finite number >= 0"),
        ({"norm_schedule": "alpha:linear:0:1"}, "--norm_schedule: no norm of this model has the setting 'alpha'"),
        ({"report_to": "[tensorbord]"}, "--report_to tensorbord: expected all, aim, "),
        ({"output_dir": "/proc/run"}, "--output_dir /proc/run: cannot be written: "),
        ({"batch_size": 0}, "--batch_size must be positive, got 0"),
        ({"seed": -1}, "--seed must be in [0, 4294967295], got -1"),
        ({"model_name_or_path": "no/such/model", "model_config": "{}"}, "--model_name_or_path no/such/model: "),
        ({"model_config": '{"model_type": "bert", "hidden_act": "nosuch"}'}, "no bert can be built from it: KeyError"),
    ],
)
def test_bad_input_ends_in_one_line_before_training(changes, said, texts, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        classification.main(arguments_for(texts, tmp_path / "run", **changes))
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert said in error
    assert "Traceback" not in error
    assert not list((tmp_path / "run").glob("checkpoint-*"))


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
    columns = {"text_column": "a", "text_pair_column": "b", "label_column": "kind", "tokenizer": "wordpiece"}
    classification.main(arguments_for(texts, tmp_path / "run", **changes, **columns, test_file=file))
    assert load(tmp_path / "run").config.id2label == {0: "bad", 1: "good"}
    assert (
        read_results(tmp_path / "run")["test"]["accuracy"] == read_results(tmp_path / "run")["validation"]["accuracy"]
    )


def test_a_pretrained_model_folds_by_a_fit_with_a_k_for_each_norm(texts, tmp_path):
    trained, fitted = tmp_path / "layernorm", tmp_path / "run"
    classification.main(arguments_for(texts, trained, norm="layernorm", max_steps=10))
    changes = {"model_config": "{}", "model_name_or_path": trained / "best", "affine": "fold", "k": 1.0}
    changes |= {"unfoldable": "calibrate", "calibrate_k": True, "learning_rate": 1e-9, "max_steps": 2}
    classification.main(arguments_for(texts, fitted, **changes))
    results = read_results(fitted)
    norms = [m for m in load(fitted).modules() if getattr(m, "is_adanorm_module", False)]
    assert len(norms) == results["norm_modules"] == 3
    assert len({norm.k for norm in norms}) == 3
    assert all(0 < norm.k < 1 for norm in norms)
    loss = read_results(trained)["validation"]["loss"]
    assert results["validation"]["loss"] == pytest.approx(loss, abs=0.02)
