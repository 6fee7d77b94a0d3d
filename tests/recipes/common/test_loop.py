"""Runs that cannot continue, or are asked to stop, end within seconds on all of their processes."""

import json
import math
import os
import re
import signal
import time

import pytest
import torch.nn.functional as F

import classification
from common.endings import EXIT_RESUME
from common.loop import Run
from common.options import parse_options
from tasks.data import data_content
from tasks.options import ClassificationOptions
from tasks.text import prepare_text
from tests.recipes.fault_runs import arguments, write_data
from tests.recipes.recipe_process import read_results, resumed_from, start, two_processes, wait, weights
from tests.recipes.tiny_configs import TINY_CLASSIFIER, TINY_PARSER, TINY_TRANSFORMER_XL, TINY_TRANSLATOR

STILL = {  # models without dropout, whose masks are drawn per process
    "classification": {**TINY_CLASSIFIER, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "translation": {**TINY_TRANSLATOR, "attention_dropout": 0.0},
    "language_modeling": TINY_TRANSFORMER_XL,
    "parsing": {**TINY_PARSER, "dropout": 0.0},
}


@pytest.mark.parametrize("recipe", STILL)
def test_two_processes_do_what_one_does(recipe, data, tmp_path):
    """Compare one process of two micro-batches a step with two processes of one each."""
    changes = {"model_config": json.dumps(STILL[recipe]), "max_steps": 12, "eval_steps": 4, "logging_steps": 4}
    if recipe == "translation":
        changes |= {"dropout": 0.0, "average_checkpoints": 2, "save_total_limit": 3}
    if recipe == "language_modeling":
        changes["eval_batch_size"] = 3  # streams
    one, two = (arguments(recipe, data, tmp_path / name, **changes) for name in ("one", "two"))
    assert wait(start(recipe, one, tmp_path / "log")) == 0, (tmp_path / "log").read_text()
    codes, said = two_processes(recipe, [*two, "--gradient_accumulation_steps", "1"], tmp_path)
    assert codes == [0, 0], said
    assert said[0].startswith("2 processes on cpu\n")
    assert "Removed shared tensor" not in said[0] + said[1]
    lines = [line for log in said for line in log.splitlines() if line.startswith("step 4")]
    assert len(lines) == 2, said  # one of training, one of validation, from one process
    left, right = read_results(tmp_path / "one"), read_results(tmp_path / "two")
    assert (left["num_processes"], right["num_processes"]) == (1, 2)
    assert left.get("target_tokens") == right.get("target_tokens")
    # Sums of floats in another order: 1e-5 on losses of about 3 after 12 updates. Each of the 13 examples counts once.
    for a, b in zip(left["history"], right["history"], strict=True):
        assert b == pytest.approx(a, abs=1e-5)
    if recipe == "translation":
        assert right["average_steps"] == [8, 12]
        assert right["average_validation"] == pytest.approx(left["average_validation"], abs=1e-5)
    for name, value in weights(tmp_path / "one", 12).items():
        assert value.sub(weights(tmp_path / "two", 12)[name]).abs().max() < 1e-4, name


def test_a_second_run_in_the_folder_is_refused_in_one_line_and_the_first_goes_on(data, tmp_path):
    argv = arguments("classification", data, tmp_path / "run", max_steps=10_000, eval_steps=10_000)
    first = start("classification", argv, tmp_path / "log1")
    while not (tmp_path / "run" / "checkpoint-4").exists() and first.is_alive():
        time.sleep(0.005)
    assert wait(start("classification", argv, tmp_path / "log2")) == 2
    said = (tmp_path / "log2").read_text()
    assert re.search(
        rf"^error: --output_dir .*: another run, process {first.pid} on \S+, writes there: .*\n\Z", said, re.MULTILINE
    )
    assert first.is_alive()
    first.kill()
    assert wait(first) < 0
    third = start("classification", argv, tmp_path / "log3")  # the lock died with the first
    while not ((tmp_path / "log3").exists() and resumed_from(tmp_path / "log3")) and third.is_alive():
        time.sleep(0.005)
    third.kill()
    wait(third)
    assert resumed_from(tmp_path / "log3") >= 4


@pytest.mark.parametrize("finished", [False, True])
def test_a_run_whose_data_has_changed_is_refused(finished, tmp_path):
    argv = arguments("classification", write_data(tmp_path), tmp_path / "run")
    kill = {} if finished else {"kill_at": ("open", r"\.tmp-checkpoint-8/")}
    wait(start("classification", argv, tmp_path / "log", **kill))
    path = tmp_path / "texts-validation.jsonl"
    before = path.stat()
    first, rest = path.read_text().split("\n", 1)
    path.write_text(json.dumps({**json.loads(first), "label": 1 - json.loads(first)["label"]}) + "\n" + rest)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert wait(start("classification", argv, tmp_path / "log")) == 2
    assert "on other data: what --validation_file names has changed since" in (tmp_path / "log").read_text()


def test_a_step_that_is_not_finite_leaves_the_training_loss_finite_and_the_run_resumable(data, tmp_path):
    changes = {"max_steps": 3, "logging_steps": 3, "checkpointing_steps": 1, "eval_steps": 3}
    changes |= {"gradient_accumulation_steps": 1, "on_nonfinite": "skip"}
    argv = arguments("classification", data, tmp_path / "run", **changes)
    losses = []
    for stop in (True, False):
        run = Run(parse_options(ClassificationOptions, argv), argv, classification.__file__, data_content)
        run.prepare(prepare_text)
        with run.training():
            for step in run:
                if stop and run.progress.step == 2:
                    break
                for batch in step:
                    labels = batch.pop("labels")
                    loss = F.cross_entropy(run.model(**batch).logits, labels)
                    losses.append(loss.item())
                    run.backward(loss * (math.nan if len(losses) == 2 else 1.0))
        if stop:
            saved = json.loads((tmp_path / "run" / "checkpoint-2" / "progress.json").read_text())
            assert (saved["running_loss"], saved["running_steps"]) == (pytest.approx(losses[0]), 1)
    assert run.progress.train_history == [{"step": 3, "loss": pytest.approx((losses[0] + losses[2]) / 2)}]


def test_ctrl_c_in_the_middle_of_an_evaluation_is_answered_at_once(data, tmp_path):
    """The evaluation takes seconds; the resumed run does it first, and ends as if nothing had been."""
    text = tmp_path / "long.txt"
    text.write_bytes((data / "bytes-train.jsonl").read_bytes() * 40)
    changes = {"validation_file": text, "eval_batch_size": 1, "eval_stride": 1, "max_validation_samples": 600}
    changes |= {"max_steps": 4, "eval_steps": 2, "logging_steps": 2, "checkpointing_steps": "null"}
    runs = {name: arguments("language_modeling", data, tmp_path / name, **changes) for name in ("whole", "stopped")}
    assert wait(start("language_modeling", runs["whole"], tmp_path / "log")) == 0, (tmp_path / "log").read_text()
    log = tmp_path / "log2"
    process = start("language_modeling", runs["stopped"], log)
    while not (log.exists() and "step 2/4" in log.read_text()) and process.is_alive():
        time.sleep(0.005)
    time.sleep(0.05)  # the evaluation has begun
    os.kill(process.pid, signal.SIGINT)
    assert wait(process) == EXIT_RESUME, log.read_text()
    assert "step 2: validation" not in log.read_text()
    assert re.search("stopped by Ctrl-C at step 2; run the same command again to resume", log.read_text())
    assert wait(start("language_modeling", runs["stopped"], log)) == 0, log.read_text()
    whole, stopped = (read_results(tmp_path / name) for name in runs)
    for key in ("validation", "history", "train_history", "best_step"):
        assert whole[key] == stopped[key]
