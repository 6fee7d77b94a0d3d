"""Names in a spec outlive the names of modules: they are the checkpoint's, and what was renamed is recognised."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageClassification, BertModel, ViTModel

from hf_adanorm import modeling_adanorm, patch_model
from hf_adanorm.modeling_adanorm import check_version
from hf_adanorm.saving.spec import resolved_spec
from tests.zoo.round_trip import CASES, build, inputs, norms


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs("vit")).logits


@pytest.fixture
def vit(tmp_path: Path) -> Callable[..., Any]:
    """Save a patched ViT, change its config.json (the modules' names and the version that wrote them), load it."""
    model = patch_model(build("vit"), "adanorm", C=1.3, k=0.07)
    model.save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "config.json"

    def load(rename: Callable[[str], str], version: str | None = None, fmt: int = 1) -> Any:
        config = json.loads(path.read_text())
        group = config["adanorm"]["groups"][0]
        group["modules"] = [rename(name) for name in group["modules"]]
        config["adanorm"]["format"] = fmt
        config["transformers_version"] = version or config["transformers_version"]
        path.write_text(json.dumps(config))
        return AutoModelForImageClassification.from_pretrained(tmp_path / "saved"), logits(model)

    return load


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


def test_a_spec_of_format_1_with_the_modules_own_names_is_read(vit: Callable[..., Any]) -> None:
    layers = "layers." if hasattr(ViTModel(CASES["vit"].config()), "layers") else "encoder.layer."
    model, expected = vit(lambda name: name.replace("encoder.layer.", layers))
    assert torch.equal(logits(model), expected)


def test_names_of_another_version_are_recognised_by_their_place(vit: Callable[..., Any], tmp_path: Path) -> None:
    model, expected = vit(lambda name: name.replace("encoder.layer.", "tower.blocks."), "5.99.0")
    assert len(norms(model)) == 5
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "again")  # with the names of today, as it says to be of this version
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), expected)


def test_numbers_are_kept_where_the_place_is_another() -> None:
    renamed = modeling_adanorm._renamed_by_place(
        ["a.layers.1.norm", "top"], ["b.blocks.0.norm", "b.blocks.1.norm", "x.top"]
    )
    assert renamed == {"a.layers.1.norm": "b.blocks.1.norm", "top": "x.top"}


def test_places_that_can_be_confused_are_not_guessed() -> None:
    free = ["text.layers.0.norm", "vision.layers.0.norm"]
    assert modeling_adanorm._renamed_by_place(["tower.layers.*.norm"], free) == {}
    lost = ["a.layers.*.norm", "b.layers.*.norm"]
    assert modeling_adanorm._renamed_by_place(lost, free) == {
        "a.layers.*.norm": "text.layers.*.norm",
        "b.layers.*.norm": "vision.layers.*.norm",
    }


def test_names_that_match_nothing_are_told_with_the_version_that_wrote_them(vit: Callable[..., Any]) -> None:
    with (
        pytest.warns(
            UserWarning, match=r"written with transformers '5\.99\.0', names 3 modules, such as 'ln_\d+'.* none"
        ),
        pytest.raises(RuntimeError, match="size"),
    ):
        vit(lambda name: f"ln_{len(name)}", "5.99.0")


def test_under_the_same_version_names_of_another_model_are_passed_over(recwarn: pytest.WarningsRecorder) -> None:
    config = CASES["bert"].config()
    config.adanorm = {
        "format": 1,
        "version": "0.1.0",
        "groups": [{"norm": "adanorm", "modules": ["decoder.layer.*.output.LayerNorm"]}],
    }
    assert not norms(BertModel(config))
    assert not recwarn


def test_versions_that_are_too_old_or_were_never_tried_are_told() -> None:
    oldest, newest = (".".join(map(str, v)) for v in (modeling_adanorm.OLDEST, modeling_adanorm.NEWEST))
    with pytest.raises(ImportError, match=rf"needs transformers {oldest} or newer, and 4\.57\.6 is installed: pip"):
        check_version("4.57.6")
    with pytest.warns(UserWarning, match=rf"was tried with transformers {oldest} to {newest}, not with 6\.0\.0\.dev0"):
        check_version("6.0.0.dev0")


def test_versions_that_were_tried_are_not(recwarn: pytest.WarningsRecorder) -> None:
    for version in ("5.0.0", "5.13.1", ".".join(map(str, modeling_adanorm.NEWEST)) + ".0"):
        check_version(version)
    assert not recwarn
