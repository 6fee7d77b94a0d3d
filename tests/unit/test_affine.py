"""What becomes of trained gains and biases in a patch."""

from __future__ import annotations

import warnings
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from hf_adanorm import Fold, patch_model
from tests.zoo.fold_models import tied_llama
from tests.zoo.round_trip import build, tiny


class Centering(nn.Module):
    """A user's class that subtracts the mean, also in the place of an RMSNorm."""

    plain_settings: ClassVar[dict[str, float]] = {"k": 0.0}

    def __init__(self, normalized_shape: int, eps: float = 1e-5, *, k: float = 0.1) -> None:
        super().__init__()
        self.k, self.norm = k, nn.LayerNorm(normalized_shape, eps, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return y * (1 - self.k * y.detach())


def test_a_class_folds_where_it_computes_what_it_declares() -> None:
    ids = torch.arange(4, 12)[None]
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, bos_token_id=1, eos_token_id=1))
    for name, parameter in model.named_parameters():
        if "ln_" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    before = model.eval()(ids).logits
    patch_model(model, Centering, affine=Fold(tied="untie"))
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-5)
    assert model.transformer.ln_f.settings() == {"k": 0.0}
    llama = tied_llama()
    state = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    with pytest.raises(ValueError, match=r"Centering: at \{'k': 0.0\} it is not the rmsnorm of model.norm"):
        patch_model(llama, Centering, affine="fold")
    assert all(torch.equal(tensor, state[name]) for name, tensor in llama.state_dict().items())


def test_dropping_trained_gains_warns_with_their_number_and_the_alternatives() -> None:
    with pytest.warns(UserWarning, match=r'of 6 norms are dropped.*affine="fold".*calibrate_k') as caught:
        patch_model(build("bert"))
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_trained_bias_alone_counts() -> None:
    model = tiny()
    with torch.no_grad():
        model.bert.embeddings.LayerNorm.bias[3] = 1e-3
    with pytest.warns(UserWarning, match="of 1 norm are dropped"):
        patch_model(model)


def test_fresh_models_and_patched_ones_are_patched_in_silence() -> None:
    patched = patch_model(build("bert"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch_model(tiny())
        patch_model(patched, "detachnorm")
