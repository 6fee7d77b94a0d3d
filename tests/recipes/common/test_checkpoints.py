import json
import os
import shutil
import signal

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from common.checkpoints import Checkpoints, Interruption, Progress, ResumeError, write_json

CONFIG = {"learning_rate": 0.1, "norm": "adanorm", "logging_steps": 5}


def prepared(seed=0):
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(seed)
    model = nn.Linear(3, 3)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    return accelerator, model, optimizer


def train_steps(model, optimizer, count):
    for _ in range(count):
        model(torch.randn(4, 3)).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def test_a_failed_write_leaves_the_old_file_and_numbers_that_json_does_not_know_become_null(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"loss": [float("nan"), 1.5, float("inf")]})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {"loss": [None, 1.5, None]}
    assert names(tmp_path) == ["a.json"]


def test_weights_optimizer_and_randomness_come_back_bit_for_bit(tmp_path):
    accelerator, model, optimizer = prepared()
    train_steps(model, optimizer, 3)
    Checkpoints(tmp_path, accelerator, CONFIG).save(Progress(step=3, samples=12))
    train_steps(model, optimizer, 2)
    accelerator.free_memory()
    accelerator, again, optimizer = prepared(seed=1)
    assert Checkpoints(tmp_path, accelerator, CONFIG).resume() == Progress(step=3, samples=12)
    train_steps(again, optimizer, 2)
    assert torch.equal(model.weight, again.weight)


def test_only_the_newest_checkpoints_and_the_model_they_speak_of_are_kept(tmp_path):
    accelerator, *_ = prepared()
    checkpoints = Checkpoints(tmp_path, accelerator, CONFIG, keep=2)
    for step in (2, 4, 6, 10):
        with checkpoints.staged(tmp_path / f"best-{step}") as folder:
            (folder / "weights").write_text("x")
        if step < 10:
            checkpoints.save(Progress(step=step, best_step=4 if step > 2 else 2))
    # best-10 is not mentioned by a checkpoint yet, best-4 still is
    assert names(tmp_path) == ["best-10", "best-4", "checkpoint-4", "checkpoint-6"]
    checkpoints.save(Progress(step=10, best_step=10))
    assert names(tmp_path) == ["best-10", "checkpoint-10", "checkpoint-6"]
    assert checkpoints.latest() == tmp_path / "checkpoint-10"
    assert checkpoints.promote_best(10) == checkpoints.promote_best(10) == tmp_path / "best"


def test_a_save_that_fails_leaves_no_trace(tmp_path):
    accelerator, *_ = prepared()
    checkpoints = Checkpoints(tmp_path, accelerator, CONFIG)
    checkpoints.save(Progress(step=1))

    @checkpoints.staged(tmp_path / "best-2")
    def full_disk():
        (tmp_path / ".tmp-best-2" / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        full_disk()
    assert names(tmp_path) == ["checkpoint-1"]


def test_torn_folders_are_not_seen_and_cleared_away(tmp_path):
    (tmp_path / ".tmp-checkpoint-7").mkdir()
    (tmp_path / ".tmp-checkpoint-7" / "model.safetensors").write_text("half")
    accelerator, *_ = prepared()
    checkpoints = Checkpoints(tmp_path, accelerator, CONFIG)
    assert checkpoints.latest() is None
    assert names(tmp_path) == []


def test_other_options_are_refused_by_name_and_a_finished_run_says_how_to_go_on(tmp_path):
    accelerator, *_ = prepared()
    Checkpoints(tmp_path, accelerator, CONFIG).save(Progress(step=1))
    changed = {**CONFIG, "learning_rate": 0.2, "logging_steps": 7}
    checkpoints = Checkpoints(tmp_path, accelerator, changed, free=frozenset({"logging_steps"}))
    with pytest.raises(ResumeError, match=r"\(learning_rate: 0.1 in the checkpoint, 0.2 now\).* to start afresh$"):
        checkpoints.check_resumable()
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ResumeError, match=rf"To train its model further, give --model_name_or_path {tmp_path}/best"):
        checkpoints.check_resumable()
    shutil.rmtree(tmp_path / "checkpoint-1")
    with pytest.raises(ResumeError, match=r"results\.json of a finished run, but no checkpoint"):
        checkpoints.check_resumable()


def test_overwriting_deletes_a_run_and_nothing_else(tmp_path):
    accelerator, *_ = prepared()
    Checkpoints(tmp_path, accelerator, CONFIG).save(Progress(step=1))
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "results.json").write_text("{}")
    checkpoints = Checkpoints(tmp_path, accelerator, {}, overwrite=True)
    assert checkpoints.check_resumable() is None
    assert names(tmp_path) == ["checkpoint-1", "notes.txt", "results.json"]  # the input may turn out to be bad
    assert checkpoints.resume() == Progress()
    assert names(tmp_path) == ["notes.txt"]


def test_a_checkpoint_whose_options_cannot_be_read_is_named(tmp_path):
    accelerator, *_ = prepared()
    Checkpoints(tmp_path, accelerator, CONFIG).save(Progress(step=1))
    (tmp_path / "checkpoint-1" / "config.json").write_text("{")
    with pytest.raises(ResumeError, match=r"checkpoint-1/config\.json cannot be read .* delete checkpoint-1"):
        Checkpoints(tmp_path, accelerator, CONFIG).check_resumable()


def test_sigterm_is_noted_and_the_old_handler_comes_back():
    accelerator, *_ = prepared()
    before = signal.getsignal(signal.SIGTERM)
    with Interruption(accelerator) as interruption:
        assert not interruption.requested()
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.requested()
    assert signal.getsignal(signal.SIGTERM) is before
