import math
from pathlib import Path

import numpy
import torch
from torch import Tensor

from hf_adanorm import patch_model
from tests.recipes.norms.norm_checks import FOLDER, check_formula, check_round_trip, model


def by_integral(z: Tensor) -> Tensor:
    """erf by its definition, 2 / sqrt(pi) times the integral of exp(-t^2) from 0 to z, with Gauss-Legendre nodes."""
    nodes, weights = map(torch.from_numpy, numpy.polynomial.legendre.leggauss(64))
    t = z[..., None] * (nodes + 1) / 2
    return (torch.exp(-t * t) * weights).sum(-1) * z / math.sqrt(math.pi)


def test_it_is_its_formula() -> None:
    check_formula("derf.py:Derf", lambda x, gain, bias, alpha, shift: gain * by_integral(alpha * x + shift) + bias)


def test_it_starts_from_its_settings_and_the_gain_and_bias_of_the_norm() -> None:
    stock = model()
    with torch.no_grad():
        stock.embeddings.LayerNorm.weight.uniform_(0.5, 2)
    gain = stock.embeddings.LayerNorm.weight.clone()
    norm = patch_model(stock, f"{FOLDER}/derf.py:Derf", alpha=0.7).embeddings.LayerNorm.inner
    assert torch.equal(norm.gain, gain)
    assert (norm.alpha.item(), norm.shift.item()) == (torch.tensor(0.7).item(), 0.0)


def test_it_survives_a_round_trip(tmp_path: Path) -> None:
    again = check_round_trip("derf.py:Derf", tmp_path, alpha=0.7)
    assert again.embeddings.LayerNorm.settings() == {"alpha": 0.7, "shift": 0.0}
