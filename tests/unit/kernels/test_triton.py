"""The Triton kernels against float64: on a GPU, or by Triton's interpreter (TRITON_INTERPRET=1) on a CPU."""

import os

import pytest
import torch

if not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
    pytest.skip("needs a GPU, or Triton with TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

from torch import nn

from hf_adanorm.kernels import fused, triton
from tests.zoo.formulas import ADANORM, IDS, NORMS, SIMPLE, derivatives, leaf, make, random, reference, ulps

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NORM = pytest.mark.parametrize("norm", NORMS, ids=IDS)
DTYPE = pytest.mark.parametrize("dtype", triton._DTYPES, ids=str)
FLAGS = pytest.mark.parametrize("flags", [(False, False), (True, False), (False, True), (True, True)], ids=str)
EPS = 1e-5


@pytest.fixture(autouse=True)
def _on(monkeypatch):
    """On a CPU the interpreted kernels replace the loops."""
    monkeypatch.setattr(fused, "BACKENDS", {"cpu": triton, "cuda": triton})
    monkeypatch.setattr(fused, "FEW_ELEMENTS", 0)  # small inputs as well


@pytest.mark.parametrize("width", [1, 7, 64, 1000, 16_384])
@DTYPE
@NORM
def test_output_and_gradient_are_as_exact_as_nn_layernorms(norm, dtype, width):
    x, dz = (random(5, width) * 3 + 1).to(dtype), random(5, width, seed=1).to(dtype)
    exact = leaf(x.double())
    expected = reference(norm, exact, (-1,), EPS)
    (expected_dx,) = torch.autograd.grad(expected, exact, dz.double())
    stock_x = leaf(x.to(DEVICE))
    stock = nn.LayerNorm(width, EPS, device=DEVICE, dtype=dtype)(stock_x)
    (stock_dx,) = torch.autograd.grad(stock, stock_x, dz.to(DEVICE))
    stock_exact = leaf(x.double())
    simple = reference(SIMPLE, stock_exact, (-1,), EPS)
    (simple_dx,) = torch.autograd.grad(simple, stock_exact, dz.double())

    low = leaf(x.to(DEVICE))
    z = make(norm, width, EPS)(low)
    assert type(z.grad_fn).__name__ == "_FusedBackward"
    (dx,) = torch.autograd.grad(z, low, dz.to(DEVICE))
    assert (z.dtype, dx.dtype) == (dtype, dtype)
    if dtype == torch.float32:
        torch.testing.assert_close(z.cpu().double(), expected, rtol=1e-5, atol=3e-6)
    else:
        assert ulps(z.detach().cpu(), expected.detach()) <= ulps(stock.detach().cpu(), simple.detach()) + 1

    def error(value, exact):
        return ((value.cpu().double() - exact).abs().max() / exact.abs().max().clamp_min(1e-2)).item()

    assert error(dx, expected_dx) <= error(stock_dx, simple_dx) + torch.finfo(dtype).eps


def test_half_input_under_autocast_gives_float32():
    x, dz = random(3, 100).to(torch.bfloat16), random(3, 100, seed=1).float()
    arguments = fused.Arguments(EPS)
    z, stats = triton.forward(x.to(DEVICE), torch.float32, arguments, True)
    torch.testing.assert_close(z.cpu().double(), reference(SIMPLE, x.double(), (-1,), EPS), rtol=1e-5, atol=1e-5)
    dx = triton.backward(dz.to(DEVICE), x.to(DEVICE), stats, arguments, torch.bfloat16)
    assert dx.dtype == torch.bfloat16


def test_wider_rows_are_left_to_torch():
    assert type(make(ADANORM, 16_385)(leaf(random(1, 16_385).float().to(DEVICE))).grad_fn).__name__ != "_FusedBackward"


def test_uncentered():
    x, dz = leaf(random(3, 100).float().to(DEVICE) + 1), random(3, 100, seed=1).float().to(DEVICE)
    norm = make(ADANORM, 100, centered=False)
    z, plain = norm(x), norm.compute(x)
    assert type(z.grad_fn).__name__ == "_FusedBackward"
    torch.testing.assert_close(z, plain)
    torch.testing.assert_close(torch.autograd.grad(z, x, dz), torch.autograd.grad(plain, x, dz))


@NORM
@pytest.mark.parametrize("row", [[1e18] * 1000, [1e18, *[0.0] * 40], [0.0] * 4, [1e19] * 2000], ids=str)
def test_finite_wherever_torch_is(norm, row):
    x = leaf(torch.tensor([row], device=DEVICE))
    z = make(norm, len(row), EPS)(x)
    assert z.isfinite().all()
    assert torch.autograd.grad(z.sum(), x)[0].isfinite().all()


@NORM
def test_layout_empty_batch_and_double_backward(norm):
    x = leaf(random(4, 24, 5).float().to(DEVICE))
    module = make(norm)
    torch.testing.assert_close(module(x.transpose(1, 2)), module(x.transpose(1, 2).contiguous()))
    assert module(leaf(torch.empty(0, 24, device=DEVICE))).shape == (0, 24)
    x, dz, v = (random(3, 24, seed=seed).float().to(DEVICE) for seed in range(3))
    expected = derivatives(lambda x: reference(norm, x, (-1,), 1e-3), x, dz, v)
    for ours, theirs in zip(derivatives(module, x, dz, v), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_only_where_it_is_asked_for(monkeypatch):
    monkeypatch.undo()
    assert "cuda" not in fused.BACKENDS
    triton.enable()
    assert fused.BACKENDS["cuda"] is triton
    triton.enable(False)
    assert "cuda" not in fused.BACKENDS
