from __future__ import annotations

import math
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig

from hf_adanorm import AdaNorm
from studies import depth


def test_the_study_runs_and_tells_of_every_way(
    texts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"measured_layers": "[1]", "trained_layers": "[1]", "learning_rates": "[0.001,0.01]", "num_seeds": 1}
    sizes |= {"width": 16, "num_steps": 2, "batch_size": 4}
    files = {"train_file": texts["train"], "validation_file": texts["test"], "output_dir": tmp_path / "out"}
    arguments = [f"--{name}={value}" for name, value in {**files, **sizes}.items()]
    monkeypatch.setattr(sys, "argv", ["depth.py", *arguments])
    depth.main()
    cells = list((tmp_path / "out" / "cells").iterdir())
    assert len(cells) == 2 * len(depth.ways(1)) + 2  # at initialization, trained, and to choose the learning rate
    table = capsys.readouterr().out
    assert all(f"| {name} | " in table for name in depth.ways(1))
    assert table.endswith((tmp_path / "out" / "depth.md").read_text() + "\n")
    assert (tmp_path / "out" / "depth.png").stat().st_size > 10_000


def test_a_cell_is_made_once_and_a_summary_makes_none(tmp_path: Path) -> None:
    options = depth.DepthOptions(train_file="", validation_file="", output_dir=str(tmp_path), summary_only=True)
    assert depth.Study(options).cell("a", dict) == []
    options.summary_only = False
    made = {"losses": [0.5, math.nan], "validation_loss": 0.5}
    assert str(depth.Study(options).cell("a", lambda: made)) == str([made])
    assert str(depth.Study(options).cell("a", dict)) == str([made])


def small_bert(num_layers: int) -> depth.MeanPooled:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=num_layers, num_attention_heads=2, intermediate_size=32
    )
    return depth.MeanPooled(AutoModelForSequenceClassification.from_config(config)).eval()


def test_deepnorm_scales_the_residual_and_the_branches_weights() -> None:
    plain, model = small_bert(2), small_bert(2)
    depth.set_up(model, depth.Way(deepnorm=True))
    mine, theirs = model.bert.encoder.layer[0].attention, plain.bert.encoder.layer[0].attention
    assert torch.equal(mine.self.query.weight, theirs.self.query.weight)
    assert torch.allclose(mine.self.value.weight, theirs.self.value.weight / 2)  # (8 * 2)^(-1/4)
    x, residual = torch.randn(3, 16), torch.randn(3, 16)
    expected = mine.output.LayerNorm(mine.output.dense(x) + 2**0.5 * residual)  # (2 * 2)^(1/4)
    assert torch.allclose(mine.output(x, residual), expected, atol=1e-6)


def test_a_profile_holds_the_gradient_at_every_norm_and_what_the_branches_add() -> None:
    model = small_bert(2)
    batch = {
        "input_ids": torch.arange(12).view(2, 6),
        "attention_mask": torch.ones(2, 6),
        "labels": torch.tensor([0, 1]),
    }
    norms = [block.LayerNorm for layer in model.bert.encoder.layer for block in (layer.attention.output, layer.output)]
    gradients: list[float] = []
    for norm in norms:
        norm.register_full_backward_hook(
            lambda _, into, out: gradients.append(float(into[0].var(-1, correction=0).mean()))
        )
    found = depth.profile(model, [batch])
    assert found["gradient"] == pytest.approx(gradients[::-1], rel=1e-4)
    assert len(found["branch"]) == 4
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_prediction_is_one_without_k_and_grows_with_k_and_depth() -> None:
    nothing = [0.0] * 12
    assert depth.predicted_loss(0.0, nothing, 64) == pytest.approx(1, abs=0.05)
    assert 1.1 < depth.predicted_loss(0.05, nothing, 64) < depth.predicted_loss(0.1, nothing, 64)
    assert depth.predicted_loss(0.1, nothing * 2, 64) > 3 * depth.predicted_loss(0.1, nothing, 64)


@pytest.mark.parametrize("C", [0.5, 3.0])
def test_a_scale_cancels_where_branches_are_homogeneous(C: float) -> None:
    """What `predicted_loss` leaves C out for: gradients at every norm of a post-norm stack of ReLU networks."""

    def gradients(C: float) -> list[torch.Tensor]:
        torch.manual_seed(0)
        x, inputs = torch.randn(8, 32, dtype=torch.float64, requires_grad=True) * C, []
        for branch in [nn.Sequential(nn.Linear(32, 64, bias=False), nn.ReLU(), nn.Linear(64, 32, bias=False))] * 6:
            inputs.append(x + branch.double()(x))
            x = AdaNorm(32, C=C, eps=0.0)(inputs[-1])
        return list(torch.autograd.grad(x[:, 0].sum(), inputs))

    ratios = [[float(b.var() / a.var()) for a, b in pairwise(gradients(scale))] for scale in (1.0, C)]
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-6)
