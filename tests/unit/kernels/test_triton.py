"""The Triton kernels against float64: on a GPU, or by Triton's interpreter (TRITON_INTERPRET=1) on a CPU."""

import os

import pytest
import torch

if not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
    pytest.skip("needs a GPU, or Triton with TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

from torch import nn

from hf_adanorm import modeling_adanorm, triton_kernel
from tests.zoo.formulas import ADANORM, IDS, NORMS, SIMPLE, derivatives, leaf, make, random, reference, ulps

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NORM = pytest.mark.parametrize("norm", NORMS, ids=IDS)
DTYPE = pytest.mark.parametrize("dtype", triton_kernel._DTYPES, ids=str)
FLAGS = pytest.mark.parametrize("flags", [(False, False), (True, False), (False, True), (True, True)], ids=str)
EPS = 1e-5


@pytest.fixture(autouse=True)
def _on(monkeypatch):
    """On a CPU the interpreted kernels stand where the loops do."""
    monkeypatch.setattr(modeling_adanorm, "gpu_kernel", triton_kernel)
    monkeypatch.setattr(modeling_adanorm, "cpu_kernel", triton_kernel)


@pytest.mark.parametrize("width", [1, 7, 64, 1000, 16_384, 16_385, 20_000])
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
    assert type(z.grad_fn).__name__ in ("_AdaNormFunctionBackward", "_DetachNormFunctionBackward")
    (dx,) = torch.autograd.grad(z, low, dz.to(DEVICE))
    assert (z.dtype, dx.dtype) == (dtype, dtype)
    if dtype == torch.float32:
        torch.testing.assert_close(z.cpu().double(), expected, rtol=1e-5, atol=3e-6)
    else:
        assert ulps(z.detach().cpu(), expected.detach()) <= ulps(stock.detach().cpu(), simple.detach()) + 1

    def error(value, exact):
        return ((value.cpu().double() - exact).abs().max() / exact.abs().max().clamp_min(1e-2)).item()

    assert error(dx, expected_dx) <= error(stock_dx, simple_dx) + torch.finfo(dtype).eps


@NORM
def test_half_input_under_autocast_gives_float32(norm):
    x, dz = random(3, 100).to(torch.bfloat16), random(3, 100, seed=1).float()
    z, stats = triton_kernel.forward(x.to(DEVICE), torch.float32, EPS)
    torch.testing.assert_close(z.cpu().double(), reference(SIMPLE, x.double(), (-1,), EPS), rtol=1e-5, atol=1e-5)
    assert triton_kernel.backward(dz.to(DEVICE), x.to(DEVICE), stats).dtype == torch.bfloat16


@NORM
@pytest.mark.parametrize("row", [[1e18] * 1000, [1e18, *[0.0] * 40], [0.0] * 4, [1e19] * 20_000], ids=str)
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
    assert modeling_adanorm.gpu_kernel is None
    triton_kernel.enable()
    assert modeling_adanorm.gpu_kernel is triton_kernel
    triton_kernel.enable(False)
    assert modeling_adanorm.gpu_kernel is None


# ------------------------------------------------------------------------------------------- torch's library


def normalize(x, C=1.3, k=0.07, flags=(False, False)):
    return torch.ops.hf_adanorm.normalize(x, x.dtype, 1e-3, C, k, *flags)[0]


@FLAGS
def test_the_operators_pass_torchs_own_checks(flags):
    x, dz = leaf(random(3, 24).float().to(DEVICE)), leaf(random(3, 24, seed=1).float().to(DEVICE))
    torch.library.opcheck(torch.ops.hf_adanorm.normalize, (x, x.dtype, 1e-3, 1.3, 0.07, *flags))
    stats = torch.ops.hf_adanorm.normalize(x, x.dtype, 1e-3, 1.3, 0.07, *flags)[1]
    torch.library.opcheck(torch.ops.hf_adanorm.normalize_backward, (dz, x, stats, 1e-3, 1.3, 0.07, *flags))


@FLAGS
def test_the_operators_derivatives_are_the_formulas(flags):
    norm = ("detachnorm", {"detach_mean": flags[0], "detach_variance": flags[1]})
    x, dz, v = (random(3, 24, seed=seed).float().to(DEVICE) for seed in range(3))
    ours = derivatives(lambda x: normalize(x, 1.0, 0.0, flags), x, dz, v)
    for a, b in zip(ours, derivatives(lambda x: reference(norm, x, (-1,), 1e-3), x, dz, v), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    theirs = derivatives(lambda x: reference(ADANORM, x, (-1,), 1e-3), x, dz, v)
    for a, b in zip(derivatives(normalize, x, dz, v), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_operators_compile_whole_and_export():
    x, dz = random(6, 24).float().to(DEVICE), random(6, 24, seed=1).float().to(DEVICE)
    a, b = leaf(x), leaf(x)
    za, zb = torch.compile(normalize, fullgraph=True, backend="aot_eager")(a), normalize(b)
    torch.testing.assert_close(za, zb)
    torch.testing.assert_close(torch.autograd.grad(za, a, dz), torch.autograd.grad(zb, b, dz))

    class Model(nn.Module):
        def forward(self, x):
            return normalize(x)

    program = torch.export.export(Model(), (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    assert "hf_adanorm.normalize" in program.graph_module.code
    torch.testing.assert_close(program.module()(x[:3]), normalize(x[:3]))


@NORM
def test_layers_stand_in_for_the_norms_forward(norm):
    x = random(3, 24).float().to(DEVICE)
    for module in (make(norm), make(norm, channels_first=True), make(norm, reference="lancopku")):
        layer = getattr(triton_kernel.layers, type(module).__name__)
        input_ = x[..., None] if module.channels_first else x
        torch.testing.assert_close(layer.forward(module, input_), module.eval()(input_))


def test_the_layers_are_what_kernels_asks_for():
    """Stateless, and with the forward signature of the norm: `kernels` refuses others."""
    for name in ("AdaNorm", "DetachNorm", "LayerNormSimple"):
        layer = getattr(triton_kernel.layers, name)
        assert layer.__init__ is nn.Module.__init__
        assert set(dir(layer)) - set(dir(nn.Module)) == {"has_backward", "can_torch_compile"}
