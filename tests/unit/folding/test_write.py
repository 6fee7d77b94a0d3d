"""Gains, biases and scales written into weights: one layer may take those of several norms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_adanorm import Fold
from hf_adanorm.folding import write
from hf_adanorm.folding.fold import fold_norms
from hf_adanorm.swapping import Change
from tests.zoo.fold_blocks import WIDTH, Block, norm, state, unchanged


@torch.no_grad()
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("read", ["norm", "other"])
def test_a_layer_reads_one_norm_and_is_the_branch_of_another(
    read: str, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compute(self: Any, y: Tensor) -> Tensor:
        y, z = (y, self.other(self.x)) if read == "norm" else (self.other(self.x), y)
        return self.linear(self.last(self.wide(y) + z))

    monkeypatch.setattr(write, "_BLOCK", 10)  # several blocks of rows
    block = Block(compute, wide=kind(WIDTH, WIDTH), other=norm(), last=norm()).eval()
    (block.other if read == "norm" else block.norm).weight.fill_(0.25)  # one number: the fold is exact
    block.x, x = torch.randn(2, 5, WIDTH), torch.randn(2, 5, WIDTH)
    before, weights, options = block(x), state(block), Fold(unfoldable="approximate", inputs={"x": x})
    change = Change(block)
    assert not fold_norms(change, None, options).names("kept")
    assert bool((block.norm.weight == 1).all() and (block.other.weight == 1).all())
    torch.testing.assert_close(block(x), before, rtol=1e-5, atol=1e-5)
    change.restore()
    assert unchanged(block, weights, rounding=True)
