from pathlib import Path

import pytest
import torch
from torch import Tensor

from hf_adanorm import patch_model
from tests.recipes.norms.norm_checks import FOLDER, check_formula, check_round_trip, model


def written_out(x: Tensor, alpha: Tensor, beta: Tensor, gamma: Tensor) -> Tensor:
    rows = []
    for row in x:
        rms = (row.pow(2).sum() / len(row) + 1e-12).sqrt()
        rows.append((torch.tanh((row * beta).sum()) * alpha + gamma) * row / rms)
    return torch.stack(rows)


def test_it_is_its_formula() -> None:
    check_formula("seednorm.py:SeeDNorm", written_out)


def test_it_starts_as_an_rmsnorm_with_the_gain_of_the_norm_and_trains_beta() -> None:
    norm = patch_model(model(), f"{FOLDER}/seednorm.py:SeeDNorm").embeddings.LayerNorm
    x = torch.randn(4, 16)
    torch.testing.assert_close(norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-12).sqrt())
    norm(x).pow(3).sum().backward()
    assert norm.inner.beta.grad.abs().min() > 0


def test_a_start_that_could_not_train_is_refused() -> None:
    with pytest.raises(ValueError, match="alpha must not be 0"):
        patch_model(model(), f"{FOLDER}/seednorm.py:SeeDNorm", alpha=0.0)


def test_it_survives_a_round_trip(tmp_path: Path) -> None:
    check_round_trip("seednorm.py:SeeDNorm", tmp_path)
