"""calibrate_k: what reaches each norm, and the k that it proposes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from hf_adanorm import calibrate_k, patch_model
from hf_adanorm.running import dummy_inputs
from tests.zoo.fold_models import build

transformers.logging.set_verbosity_error()


def test_calibrate_k_measures_what_reaches_each_norm() -> None:
    block = nn.Sequential(nn.LayerNorm(64), nn.LayerNorm(64))
    x = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
    x[:, 3] = 40.0
    report = calibrate_k(block, [{"input": x[:5]}, {"input": x[5:]}], k=0.1, margin=0.25)
    y = F.layer_norm(x, (64,))
    first = report.norms[0]
    assert first.name == "0"
    assert first.largest == pytest.approx(float(y.max()))
    assert first.smallest == pytest.approx(float(y.min()))
    assert first.share_falling == pytest.approx(float((y > 5).double().mean())) == pytest.approx(1 / 64)
    assert first.share_negative == 0.0
    assert report.k["0"] == pytest.approx(0.25 / float(y.abs().max()))
    assert "1.562%" in str(report)
    assert "proposed k</th>" in report._repr_html_()


def test_proposed_k_reaches_the_spec_norm_by_norm(tmp_path: Path) -> None:
    model = build("bert-cls")
    inputs = dummy_inputs(model)
    report = calibrate_k(model, [inputs], margin=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch_model(model, "adanorm", k=report.k)
    with pytest.raises(ValueError, match="k has a value for 'embeddings', which is no norm of the model"):
        patch_model(model, "adanorm", k={"embeddings": 0.1})
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    ks = {name: module.k for name, module in again.named_modules() if getattr(module, "is_adanorm_module", False)}
    assert ks == report.k
    assert len(set(ks.values())) == 5


IDS = torch.ones(1, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("batches", "options", "error", "said"),
    [
        ([], {}, ValueError, "at least one batch"),
        ([{"input_ids": IDS}], {"margin": 0.0}, ValueError, "margin must be a finite number > 0"),
        ({"input_ids": IDS}, {}, TypeError, "batches must be a list of batches"),
        (7, {}, TypeError, "batches must be a list of batches"),
        ([IDS], {}, TypeError, "a batch must be"),
    ],
)
def test_calibrate_k_refuses_bad_input(batches: Any, options: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        calibrate_k(build("bert-cls"), batches, **options)


def test_calibration_refuses_norms_that_met_nan() -> None:
    model = build("bert-cls")
    good = dummy_inputs(model)
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[5] = float("nan")
    bad = {**good, "input_ids": torch.full_like(good["input_ids"], 5)}
    with pytest.raises(ValueError, match=r"embeddings\.LayerNorm met NaN"):
        calibrate_k(model, [bad])


def test_padding_does_not_count_in_a_calibration() -> None:
    model = build("bert-cls")
    ids = torch.randint(4, 20, (2, 8))
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[3] = 0.0
        model.bert.embeddings.word_embeddings.weight[3, 0] = 100.0
    padded = {"input_ids": ids.clone(), "attention_mask": torch.ones(2, 8, dtype=torch.int64)}
    padded["input_ids"][:, 6:], padded["attention_mask"][:, 6:] = 3, 0
    plain = {"input_ids": ids[:, :6]}
    k = "bert.embeddings.LayerNorm"
    assert calibrate_k(model, [padded]).k[k] == pytest.approx(calibrate_k(model, [plain]).k[k], rel=1e-5)
    seen = calibrate_k(model, [{**padded, "attention_mask": torch.ones(2, 8, dtype=torch.int64)}])
    assert seen.k[k] < 0.9 * calibrate_k(model, [plain]).k[k]
