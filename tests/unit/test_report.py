"""What a model's norms are said to be: counts, lines, HTML and data."""

from __future__ import annotations

import html
import json

import torch
from torch import nn
from transformers import BertForMaskedLM

from hf_adanorm import fold_affine, inspect_model, patch_model
from tests.zoo.round_trip import CASES
from tests.zoo.todays_models import build


def tiny() -> BertForMaskedLM:
    torch.manual_seed(0)
    return BertForMaskedLM(CASES["bert"].config()).eval()


def test_report_counts() -> None:
    model = tiny()
    report = inspect_model(model, layers=[0])
    assert (report.num_swappable, report.num_swapped, report.num_skipped) == (2, 0, 4)
    assert report.num_affine_parameters == 2 * 64
    patch_model(model, layers=[0])
    report = inspect_model(model)
    assert (report.num_swappable, report.num_swapped, report.num_skipped) == (4, 2, 0)
    assert report.num_removed_parameters == 2 * 64
    data = json.loads(json.dumps(report.to_dict()))
    assert (data["swappable"], len(data["norms"])) == (4, 6)
    page = html.unescape(report._repr_html_())
    assert all(cell in page for row in report.table() for cell in row)
    assert report.every_name().count("not chosen") == 4
    assert "bert.encoder.layer.1.output.LayerNorm" in report.every_name()
    assert str(inspect_model(nn.Linear(2, 2))) == "Linear: 0 norms, 0 swapped (0 parameters removed), 0 skipped"


def test_report_as_text_groups_by_class_and_says_why() -> None:
    model = patch_model(tiny(), C=1.3, layers=[0])
    text = str(inspect_model(model, exclude=["embeddings.LayerNorm"]))
    lines = text.splitlines()
    assert lines[0].startswith("BertForMaskedLM: 6 norms, 2 swapped (128 parameters removed), 3 would be swapped (192")
    assert "1 not chosen, 0 skipped" in lines[0]
    assert any(line.startswith("1 ") and "AdaNorm((32,)" in line and "C=1.3" in line for line in lines)
    assert any(line.startswith("1 ") and "would be swapped" in line and "layer.1.output" in line for line in lines)
    assert any(line.startswith("1 ") and "not chosen: exclude" in line for line in lines)


def test_lines_of_a_report_can_be_pasted_into_include() -> None:
    model = tiny()
    for count, *_, names in inspect_model(model).table():
        again = inspect_model(model, include=[names])
        assert str(again.num_swappable) == count


def test_after_a_patch_of_some_norms_the_others_read_not_chosen() -> None:
    report = inspect_model(patch_model(tiny(), layers=[0]))
    assert {report.status(row) for row in report.rows if not row.is_swapped} == {"not chosen"}
    assert "4 not chosen" in str(report)
    assert "would be swapped" in str(inspect_model(patch_model(tiny(), layers=[0]), targets="all"))


def test_after_a_fold_the_report_says_why_a_norm_was_kept() -> None:
    model, _ = build("gemma3_text")
    fold_affine(model)
    report = inspect_model(model)
    status = {row.name: report.status(row) for row in report.rows}
    assert status["model.layers.0.post_attention_layernorm"].startswith("not folded: added to the residual stream")
    assert status["model.norm"].startswith("not folded: the weight of lm_head is tied")
    assert status["model.layers.0.input_layernorm"] == "would be swapped"
