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
from torch import nn
from transformers import AutoModelForImageClassification, BertModel, PreTrainedConfig, PreTrainedModel, ViTModel

from hf_adanorm import AdaNorm, modeling_adanorm, patch_model
from hf_adanorm.modeling_adanorm import NormGroup, check_version
from hf_adanorm.saving.spec import resolved_spec, swapped_norms
from tests.zoo.round_trip import CASES, build, inputs, norms


class TowersConfig(PreTrainedConfig):
    model_type = "towers"


class Towers(PreTrainedModel):
    """Three stacks whose norms have the same ending."""

    config_class = TowersConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for name in "abc":
            layer = nn.ModuleDict({"norm": nn.LayerNorm(4)})
            self.add_module(name, nn.ModuleDict({"layers": nn.ModuleList([layer])}))
        self.head = nn.Linear(4, 4)
        self.post_init()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for tower in (self.a, self.b, self.c):
            x = tower["layers"][0]["norm"](x)
        return self.head(x)


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


def test_the_reference_of_a_norm_put_in_by_hand_lasts(tmp_path: Path) -> None:
    model = build("vit")
    model.vit.layernorm = AdaNorm(model.config.hidden_size, reference="lancopku")
    model.save_pretrained(tmp_path / "first")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "first")
    torch.testing.assert_close(logits(again), logits(model))
    patch_model(again, "layernorm-simple", include="vit.layernorm")
    again.save_pretrained(tmp_path / "second")
    last = AutoModelForImageClassification.from_pretrained(tmp_path / "second")
    assert [(norm.norm, norm.reference) for _, norm in swapped_norms(last)] == [("layernorm-simple", "lancopku")]
    torch.testing.assert_close(logits(last), logits(again))


def test_a_reference_is_written_only_where_it_is_not_the_paper() -> None:
    group = {"norm": "adanorm", "C": 1.0, "k": 0.1, "modules": ["h"]}
    assert NormGroup.from_dict({**group, "reference": "paper"}).to_dict() == group
    other = {**group, "reference": "lancopku"}
    assert NormGroup.from_dict(other).to_dict() == other


@pytest.mark.parametrize("given", [{"reference": "x"}, {"reference": 1}, {"centered": False}])
def test_a_reference_that_no_norm_can_have_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="reference"):
        NormGroup.from_dict({"norm": "adanorm", "modules": ["h"], "reference": "lancopku", **given})


def test_names_of_another_version_are_recognised_by_their_place(vit: Callable[..., Any], tmp_path: Path) -> None:
    model, expected = vit(lambda name: name.replace("encoder.layer.", "tower.blocks."), "5.99.0")
    assert len(norms(model)) == 5
    torch.testing.assert_close(logits(model), expected)
    model.save_pretrained(tmp_path / "again")  # with the names of today, as it says to be of this version
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(again), expected)


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


def test_stacks_of_other_settings_are_not_told_apart_by_their_order() -> None:
    lost, free = ["a.layers.*.norm", "b.layers.*.norm"], ["c.layers.0.norm", "d.layers.0.norm"]
    guess = {"a.layers.*.norm": "c.layers.*.norm", "b.layers.*.norm": "d.layers.*.norm"}
    one, other = (NormGroup(norm="adanorm", C=C, modules=()) for C in (1.0, 2.0))
    assert modeling_adanorm._renamed_by_place(lost, free, dict.fromkeys(lost, one)) == guess
    with pytest.warns(UserWarning, match=r"'a\.layers\.\*\.norm' and 'b\.layers\.\*\.norm' have other settings"):
        assert modeling_adanorm._renamed_by_place(lost, free, dict(zip(lost, (one, other), strict=True))) == {}


def test_stacks_of_the_same_settings_are_told_by_their_order_whatever_their_numbers() -> None:
    lost = ["encoder.layers.2.norm", "encoder.layers.3.norm", "decoder.layers.0.norm", "decoder.layers.1.norm"]
    free = [f"{stack}.layers.{i}.norm" for stack, size in (("e", 4), ("d", 2)) for i in range(size)]
    same = dict.fromkeys(lost, NormGroup(norm="adanorm", C=1.0, modules=()))
    expected = {name: name.replace("encoder", "e").replace("decoder", "d") for name in lost}
    assert modeling_adanorm._renamed_by_place(lost, free, same) == expected


def test_layers_of_other_settings_in_stacks_that_are_alike_are_found_by_their_numbers() -> None:
    lost = [f"{stack}.layers.{i}.norm" for i in range(2) for stack in "ab"]
    free = [name.replace("a.", "c.").replace("b.", "d.") for name in lost]
    settings = {name: NormGroup(norm="adanorm", C=1.0 + ("1" in name), modules=()) for name in lost}
    assert modeling_adanorm._renamed_by_place(lost, free, settings) == dict(zip(lost, free, strict=True))


def test_a_group_of_stacks_around_another_group_stops_the_load_instead_of_changing_settings(tmp_path: Path) -> None:
    """Named by groups, the stacks stand in another order than in the model."""
    model = Towers(TowersConfig())
    for tower, C in (("a", 1.0), ("b", 2.0), ("c", 1.0)):
        patch_model(model, C=C, include=f"{tower}.layers.*.norm")
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    assert [group["C"] for group in json.loads(path.read_text())["adanorm"]["groups"]] == [1.0, 2.0]
    renamed = re.sub(r'"([abc])\.layers', r'"old_\1.layers', path.read_text())
    path.write_text(json.dumps({**json.loads(renamed), "transformers_version": "5.99.0"}))
    with pytest.warns(UserWarning, match="have other settings"), pytest.raises(RuntimeError, match="size"):
        Towers.from_pretrained(tmp_path)


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
