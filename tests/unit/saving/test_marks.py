"""The marks of a fold in the config."""

from __future__ import annotations

from pathlib import Path

from transformers import GPT2Model

from hf_adanorm import fold_affine, patch_model, unpatch_model
from hf_adanorm.saving import folded_norms
from tests.zoo.fold_blocks import quietly
from tests.zoo.fold_models import build


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
