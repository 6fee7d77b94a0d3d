"""Names in a spec outlive the names of modules: they are the checkpoint's, and what was renamed is recognized."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from transformers import BertModel, ViTModel

from hf_adanorm import AdaNormSpec, patch_model
from hf_adanorm.saving.spec import resolved_spec
from tests.zoo.round_trip import CASES, build, norms


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


def spec(**group: Any) -> dict[str, Any]:
    groups = [{"norm": "adanorm", "settings": {"C": 1.0, "k": 0.1}, "modules": ["h"], **group}]
    return {"format": 1, "version": "0.1.0", "groups": groups}


def test_a_spec_comes_back_as_it_was_written() -> None:
    given = spec(eps=1e-3, centered=False, normalized_shape=[2, 3], output_dtype="weight")
    assert AdaNormSpec.from_dict(given).to_dict() == given


def test_under_the_same_version_names_of_another_model_are_passed_over(recwarn: pytest.WarningsRecorder) -> None:
    config = CASES["bert"].config()
    config.adanorm = {
        "format": 1,
        "version": "0.1.0",
        "groups": [{"norm": "adanorm", "modules": ["decoder.layer.*.output.LayerNorm"]}],
    }
    assert not norms(BertModel(config))
    assert not recwarn
