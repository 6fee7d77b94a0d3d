"""Names in a spec outlive the names of modules: they are those of the checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import ViTModel

from hf_adanorm import patch_model
from hf_adanorm.saving.spec import resolved_spec
from tests.zoo.round_trip import CASES, build


@pytest.mark.parametrize("case", CASES)
def test_names_are_keys_of_the_checkpoint(case: str, tmp_path: Path) -> None:
    model = patch_model(build(case), "layernorm-simple")
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        keys = [re.sub(r"\.\d+(?=\.)", ".*", key) for key in file.keys()]  # noqa: SIM118
    spec = resolved_spec(model)
    assert spec is not None
    prefix = f"{model.base_model_prefix}."
    for name in spec.names():
        key = f"{name.removeprefix('^')}.weight"
        assert key in keys or prefix + key in keys


def test_a_base_model_and_a_model_with_a_head_use_the_same_names() -> None:
    base = patch_model(ViTModel(CASES["vit"].config(), add_pooling_layer=False))
    head = patch_model(build("vit"), affine="drop")
    assert resolved_spec(base) == resolved_spec(head)
