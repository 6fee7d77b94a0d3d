"""What a run cannot go on with, or is asked to stop in, is answered in seconds, by all of its processes."""

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
from tests.recipes.recipe_process import resumed_from, start, two_processes, wait
from tests.recipes.tiny_configs import TINY_PARSER


def test_two_processes_of_the_parser_do_what_one_does(data, tmp_path):
    recipe, changes = "parsing", {"model_config": json.dumps({**TINY_PARSER, "dropout": 0.0})}
    one = arguments(recipe, data, tmp_path / "one", **{**changes, "batch_size": 4, "eval_batch_size": 4})
    assert wait(start(recipe, one, tmp_path / "log")) == 0, (tmp_path / "log").read_text()
    two = arguments(recipe, data, tmp_path / "two", **{**changes, "batch_size": 2, "eval_batch_size": 2})
    codes, said = two_processes(recipe, [two, two], tmp_path)
    assert codes == [0, 0], said
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")]
    assert results[1]["num_processes"] == 2
    for left, right in zip(results[0]["history"], results[1]["history"], strict=True):
        assert right == pytest.approx(left, rel=1e-4)


def test_a_second_run_in_the_folder_is_refused_in_one_line_and_the_first_goes_on(data, tmp_path):
    argv = arguments("classification", data, tmp_path / "run", max_steps=10_000, eval_steps=10_000)
    first = start("classification", argv, tmp_path / "log1")
    while not (tmp_path / "run" / "checkpoint-4").exists() and first.is_alive():
        time.sleep(0.005)
    assert wait(start("classification", argv, tmp_path / "log2")) == 2
    said = (tmp_path / "log2").read_text()
    assert re.search(
        rf"^error: --output_dir .*: another run, process {first.pid} on \S+, writes there; .*\n\Z", said, re.MULTILINE
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
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    assert wait(process) == EXIT_RESUME, log.read_text()
    assert "step 2: validation" not in log.read_text()
    assert re.search("stopped by Ctrl-C at step 2; run the same command again to resume", log.read_text())
    assert wait(start("language_modeling", runs["stopped"], log)) == 0, log.read_text()
    whole, stopped = (json.loads((tmp_path / name / "results.json").read_text()) for name in runs)
    for key in ("validation", "history", "train_history", "best_step"):
        assert whole[key] == stopped[key]
