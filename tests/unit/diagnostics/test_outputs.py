"""Where two models part."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import BertModel

from hf_adanorm import compare_outputs, patch_model
from tests.zoo.classifier import batch, bert


def test_models_part_at_the_first_norm_that_was_swapped():
    stock = bert().bert
    patched = patch_model(copy.deepcopy(stock), "adanorm", layers=[2])
    comparison = compare_outputs(stock, patched, {"input_ids": batch()["input_ids"]})
    assert comparison.first.name == "encoder.layer.2.attention.output.LayerNorm"
    assert (comparison.first.class_a, comparison.first.class_b) == ("LayerNorm", "AdaNorm")
    assert comparison.rows[0].max_abs == 0
    assert comparison.output.max_abs > 1e-3
    assert "<- first" in str(comparison)
    assert "<- first" not in str(comparison).split("layer.2")[0]


def test_a_reloaded_model_does_not_differ(tmp_path):
    model = bert("adanorm").bert
    model.save_pretrained(tmp_path)
    inputs = {"input_ids": batch()["input_ids"]}
    assert compare_outputs(model, BertModel.from_pretrained(tmp_path), inputs).first is None


def test_a_model_is_identical_to_itself():
    model = bert("adanorm").bert
    comparison = compare_outputs(model, model, {"input_ids": batch()["input_ids"]})
    assert comparison.identical
    assert comparison.first is None
    assert str(comparison) == f"identical: {len(comparison.rows)} outputs, bit for bit"
    assert "<table>" not in comparison._repr_html_()


def test_comparison_changes_neither_model():
    model, other = bert().train(), bert("adanorm").train()
    state = torch.random.get_rng_state()
    compare_outputs(model, other, batch())
    assert model.training
    assert other.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for both in (model, other) for m in both.modules())
    assert torch.equal(state, torch.random.get_rng_state())


def test_dropout_does_not_make_models_differ():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    assert compare_outputs(model, copy.deepcopy(model), torch.randn(3, 4)).identical


def test_small_differences_are_equal_within_the_tolerance():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    other = copy.deepcopy(model)
    other[0].weight.data += 1e-7
    inputs = torch.randn(3, 4)
    comparison = compare_outputs(model, other, inputs)
    assert comparison.first is None
    assert not comparison.identical
    assert len(str(comparison).splitlines()) == 1
    assert compare_outputs(model, other, inputs, tolerance=0).first.name == "0"


def test_shapes_nan_and_one_sided_modules_are_reported():
    model, other = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    other[0].load_state_dict(model[0].state_dict())
    other.append(nn.ReLU())
    comparison = compare_outputs(model, other, (torch.randn(3, 4),))
    assert comparison.first.name == "1"
    assert "shapes differ" in comparison.first.note
    assert comparison.only_in_b == ("2",)
    broken = copy.deepcopy(model)
    broken[0].weight.data[0, 0] = float("nan")
    assert compare_outputs(model, broken, torch.randn(3, 4)).first.name == "0"


def test_models_without_a_common_module_are_refused():
    model = bert()
    with pytest.raises(ValueError, match=r"no module in common.*model\.bert"):
        compare_outputs(nn.Sequential(nn.Linear(2, 2)), nn.ModuleDict({"a": nn.Linear(2, 2)})["a"], torch.randn(1, 2))
    with pytest.raises(TypeError, match="inputs must be"):
        compare_outputs(model, model, "text")
    with pytest.raises(ValueError, match="tolerance"):
        compare_outputs(model, model, batch(), tolerance=-1.0)
