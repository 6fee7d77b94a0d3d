"""Stock Trainer on patched models: checkpoints, the best one at the end, exact resume."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_adanorm import is_patched, patch_model
from tests.zoo.round_trip import CASES, SWAPS, norms, randomize

STEPS = 6


class Rows(Dataset[dict[str, Tensor]]):
    """Random ids; the label is whether the first is odd."""

    def __init__(self, rows: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(3, 99, (rows, 8), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index, 0] % 2}


def trainer(folder: Path, swap: str, model: Any = None, max_steps: int = STEPS, **options: Any) -> Trainer:
    set_seed(0)
    if model is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = patch_model(randomize(BertForSequenceClassification(CASES["bert"].config())), **SWAPS[swap])
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=max_steps,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        logging_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        seed=0,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_num_workers=0,
        **options,
    )
    return Trainer(model=model, args=arguments, train_dataset=Rows(64, 0), eval_dataset=Rows(16, 1))


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.fixture(scope="module", params=SWAPS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Trainer]:
    folder = tmp_path_factory.mktemp(request.param)
    run = trainer(folder, request.param)
    run.train()
    return request.param, folder, run


def test_every_checkpoint_loads_by_the_stock_call(trained: tuple[str, Path, Trainer]) -> None:
    swap, folder, run = trained
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-6",
    ]
    for checkpoint in folder.glob("checkpoint-*"):
        assert (checkpoint / "modeling_adanorm.py").exists()
        model, info = AutoModelForSequenceClassification.from_pretrained(checkpoint, output_loading_info=True)
        assert not any(info.values()), info
        assert norms(model) == norms(run.model)
        assert {norm.norm_name for norm in model.modules() if getattr(norm, "is_adanorm_module", False)} == {swap}


def test_best_checkpoint_is_in_memory_at_the_end(trained: tuple[str, Path, Trainer]) -> None:
    _, _, run = trained
    evaluations = {e["step"]: e["eval_loss"] for e in run.state.log_history if "eval_loss" in e}
    best = min(evaluations, key=evaluations.__getitem__)
    assert run.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert run.evaluate()["eval_loss"] == pytest.approx(evaluations[best], abs=1e-6)
    saved = AutoModelForSequenceClassification.from_pretrained(run.state.best_model_checkpoint).state_dict()
    assert all(torch.equal(value, saved[key]) for key, value in run.model.state_dict().items())


def test_resumed_run_ends_where_the_uninterrupted_one_does(trained: tuple[str, Path, Trainer], tmp_path: Path) -> None:
    swap, folder, run = trained
    again = trainer(tmp_path, swap)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert losses(again) == losses(run)
    old = AutoModelForSequenceClassification.from_pretrained(folder / "checkpoint-6").state_dict()
    new = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-6").state_dict()
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old)


def test_resume_with_a_reloaded_model(trained: tuple[str, Path, Trainer], tmp_path: Path) -> None:
    """The model comes from the checkpoint, as in a new process, and nothing is patched by hand."""
    swap, folder, run = trained
    model = AutoModelForSequenceClassification.from_pretrained(folder / "checkpoint-4")
    again = trainer(tmp_path, swap, model=model)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert losses(again) == losses(run)


def test_resuming_with_other_norms_is_said_before_the_first_step(tmp_path: Path) -> None:
    trainer(tmp_path, "adanorm", max_steps=2).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    for options, told in (
        ({"k": 0.5}, r"k=0\.07; .* has k=0\.5"),
        ({"norm": "none", "C": None, "k": None}, r"norm=adanorm, C=1.*has norm=none"),
    ):
        model = BertForSequenceClassification(CASES["bert"].config())
        options = {"norm": "adanorm", "C": 1.3, "k": 0.07, "eps": 1e-3, **options}
        patch_model(model, **{name: value for name, value in options.items() if value is not None})
        again = trainer(tmp_path / "again", "", model=model, max_steps=2)
        with pytest.warns(UserWarning, match=f"resumes with other norms than the checkpoint .*needs .*{told}"):
            again.train(resume_from_checkpoint=checkpoint)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer(tmp_path / "same", "adanorm", max_steps=2).train(resume_from_checkpoint=checkpoint)


def test_resuming_an_adapter_on_other_norms_is_said(tmp_path: Path) -> None:
    def run(k: float) -> Trainer:
        model = patch_model(BertForSequenceClassification(CASES["bert"].config()), k=k)
        lora = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
        return trainer(tmp_path, "", model=get_peft_model(model, lora), max_steps=2)

    with pytest.warns(UserWarning, match="saved without its base"):
        run(0.1).train()
    with pytest.warns(UserWarning, match=r"resumes with other norms .* k=0\.1; .* k=0\.5"):
        run(0.5).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_final_save_of_the_trainer(trained: tuple[str, Path, Trainer], tmp_path: Path) -> None:
    _, _, run = trained
    run.save_model(str(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["adanorm"] == run.model.config.adanorm
    assert norms(AutoModelForSequenceClassification.from_pretrained(tmp_path)) == norms(run.model)


def test_stock_model_does_not_resume_from_a_patched_checkpoint(
    trained: tuple[str, Path, Trainer], tmp_path: Path
) -> None:
    _, folder, _ = trained
    stock = BertForSequenceClassification(CASES["bert"].config())
    again = trainer(tmp_path, "", model=stock)
    with pytest.raises((RuntimeError, ValueError), match="size"):
        again.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert not is_patched(stock)
