"""The marks of a fold in the config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import GPT2Model

from hf_adanorm import fold_affine, patch_model, unpatch_model
from hf_adanorm.saving import folded_norms
from tests.zoo.fold_blocks import quietly
from tests.zoo.fold_models import build, tied_llama


def test_a_fold_is_noted_by_names_in_the_base_model_and_lasts(tmp_path: Path) -> None:
    model = build("gpt2-lm")
    folded = ["h.0.ln_1", "h.0.ln_2", "h.1.ln_1", "h.1.ln_2"]
    quietly(patch_model, model, affine="fold")
    assert folded_norms(model) == folded
    quietly(unpatch_model, model)
    model.save_pretrained(tmp_path)
    assert folded_norms(GPT2Model.from_pretrained(tmp_path)) == folded
    fold_affine(model, tied="untie")
    assert folded_norms(model) == [*folded, "ln_f"]


@pytest.mark.parametrize(("name", "weightless"), [("llama", True), ("gemma", False), ("opt", False), ("vit", False)])
def test_models_that_need_no_norm_weights_carry_the_mark_of_flashnorm(name: str, weightless: bool) -> None:
    model = build(name)
    fold_affine(model)
    assert getattr(model.config, "flashnorm_folded", False) is weightless


def test_a_norm_that_is_kept_or_trained_afterwards_takes_the_mark_away(tmp_path: Path) -> None:
    model = tied_llama()
    fold_affine(model)
    assert not hasattr(model.config, "flashnorm_folded")  # the last norm was kept
    fold_affine(model, tied="untie")
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["flashnorm_folded"] is True
    with torch.no_grad():
        model.model.norm.weight[0] = 1.5
    model.save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    assert "flashnorm_folded" not in data
    assert "norm" in data["folded_norms"]
