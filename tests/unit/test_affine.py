"""What becomes of trained gains and biases in a patch."""

from __future__ import annotations

import warnings

import pytest
import torch

from hf_adanorm import (
    patch_model,
)
from tests.zoo.round_trip import build, tiny


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


def test_fresh_model_patches_in_silence() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch_model(tiny())


def test_patching_again_does_not_warn_of_gains_that_are_gone() -> None:
    model = patch_model(build("bert"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch_model(model, "detachnorm")
