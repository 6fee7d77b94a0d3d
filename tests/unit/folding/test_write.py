"""Gains, biases and scales written into weights, compared with the formulas in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_adanorm.folding import write
from hf_adanorm.folding.write import _Edit, _of_branch, _of_columns, _write_layer
from hf_adanorm.swapping import Change


@torch.no_grad()
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_a_layer_that_reads_one_norm_and_is_the_branch_of_another(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "_BLOCK", 10)  # several blocks of rows
    layer = nn.Linear(4, 5) if kind is nn.Linear else Conv1D(5, 4)
    gain, shift, bias = (torch.randn(n, dtype=torch.float64) for n in (4, 4, 5))
    weight = (layer.weight if kind is nn.Linear else layer.weight.T).detach().double()
    old = layer.bias.detach().double()
    x = torch.randn(7, 4)
    expected = ((x.double() * gain + shift) @ weight.T + old + bias) / 0.25
    edits: list[_Edit] = [_of_columns(layer, (0, 1, 2, 3), gain, shift), _of_branch(layer, bias, 0.25)]
    for order in (edits, edits[::-1]):
        change = Change(layer)
        assert not _write_layer("layer", layer, order, True, change)
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
        change.restore()
        torch.testing.assert_close(layer.bias.double(), old, rtol=0.0, atol=0.0)
