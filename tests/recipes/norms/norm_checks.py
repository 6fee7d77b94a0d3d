"""What the tests of the norms in recipes/norms share: each is used through the public API only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, BertConfig, BertModel

from hf_adanorm import patch_model, unpatch_model

FOLDER = Path(__file__).parents[3] / "recipes" / "norms"


def model() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertModel(BertConfig(vocab_size=32, **sizes)).eval()


def check_formula(norm: str, reference: Callable[..., Tensor], **settings: Any) -> None:
    """Compare output and gradients with `reference(x, **parameters)` in float64, at parameters drawn at random."""
    patched = patch_model(model(), f"{FOLDER}/{norm}", **settings)
    module = patched.embeddings.LayerNorm.inner.double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    parameters = {name: value.detach().clone().requires_grad_() for name, value in module.named_parameters()}
    dz = torch.randn(3, 16, dtype=torch.float64)
    found = module(x)
    expected = reference(x, **parameters)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    ours = torch.autograd.grad(found, [x, *module.parameters()], dz)
    theirs = torch.autograd.grad(expected, [x, *parameters.values()], dz)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def check_round_trip(norm: str, tmp_path: Path, **settings: Any) -> Any:
    """Patch, train a step, save, load and unpatch; return the loaded model."""
    patched = patch_model(model(), f"{FOLDER}/{norm}", **settings)
    ids = torch.arange(8)[None]
    optimizer = torch.optim.SGD(patched.parameters(), lr=0.1)
    patched(ids).last_hidden_state.square().mean().backward()
    optimizer.step()
    patched.save_pretrained(tmp_path)
    again, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(again(ids).last_hidden_state, patched(ids).last_hidden_state)
    assert type(unpatch_model(patched).embeddings.LayerNorm) is torch.nn.LayerNorm
    return again
