"""What the benchmark compares."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_adanorm import AdaNorm
from hf_adanorm.bench import contenders, measure

CPU = torch.device("cpu")


def test_the_written_out_formula_is_adanorm():
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    ours, written = AdaNorm(12, 1e-5)(x), contenders.WrittenOut(1e-5)(x)
    torch.testing.assert_close(ours, written)
    torch.testing.assert_close(
        torch.autograd.grad(ours.pow(2).sum(), x)[0], torch.autograd.grad(written.pow(2).sum(), x)[0]
    )


@pytest.mark.parametrize("norm", ["rmsnorm", "adanorm-lancopku", "adanorm-written", "adanorm"])
@pytest.mark.parametrize("kind", contenders.MODELS)
def test_models_with_every_norm_train(kind, norm):
    model, batch, num_tokens = contenders.build_model(kind, contenders.SIZES["tiny"])
    stock = contenders.count_norms(model)
    model = contenders.with_norm(model, norm)
    assert not any(isinstance(module, nn.LayerNorm) for module in model.modules())
    assert contenders.count_norms(model) == stock > 0
    assert num_tokens > 0
    run = measure._Run(model, batch, CPU, torch.float32, "eager")
    before = {name: p.clone() for name, p in model.named_parameters()}
    run.train_step()
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert measure.peak_bytes(run.task("inference"), CPU) > 0


def test_an_unknown_model_is_named():
    with pytest.raises(ValueError, match="bert, gpt2, marian, vit, got 'resnet'"):
        contenders.build_model("resnet", contenders.SIZES["tiny"])
