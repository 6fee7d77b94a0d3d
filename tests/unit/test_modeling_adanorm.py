"""The norms' mathematics: against float64 references written from the paper, and by property."""

from __future__ import annotations

import copy
import hashlib
import math
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.ao.quantization import get_default_qconfig_mapping, quantize_fx
from torch.fx.experimental.proxy_tensor import make_fx

from hf_adanorm import AdaNorm, DetachNorm, LayerNormSimple, NoNorm, modeling_adanorm
from hf_adanorm.kernels import cpu
from tests.zoo.formulas import (
    ADANORM,
    DETACHED,
    IDS,
    MEAN_DETACHED,
    NORMS,
    SIMPLE,
    VARIANCE_DETACHED,
    H,
    derivatives,
    leaf,
    make,
    random,
    reference,
)

LAYOUTS = [
    pytest.param((3, 5, H), H, {}, id="last"),
    pytest.param((3, 4, 6), (4, 6), {}, id="two-trailing"),
    pytest.param((3, H, 2, 5), H, {"channels_first": True}, id="channels-first"),
]
LAYOUT = pytest.mark.parametrize(("size", "shape", "layout"), LAYOUTS)
NORM = pytest.mark.parametrize("norm", NORMS, ids=IDS)


def test_the_file_is_short():
    """It travels with every model, and who loads one may want to read it."""
    assert len(Path(modeling_adanorm.__file__).read_text(encoding="utf-8").splitlines()) <= 450


def test_the_docs_state_its_hash():
    digest = hashlib.sha256(Path(modeling_adanorm.__file__).read_bytes()).hexdigest()
    assert digest in (Path(__file__).parents[2] / "docs/saving.md").read_text(encoding="utf-8")


def dims_of(shape, layout) -> tuple[int, ...]:
    return (1,) if layout else tuple(range(-len(shape if isinstance(shape, tuple) else (shape,)), 0))


@NORM
@LAYOUT
@pytest.mark.parametrize("centered", [True, False])
def test_output_gradient_and_double_backward_are_the_papers(norm, size, shape, layout, centered):
    if norm == MEAN_DETACHED and not centered:
        norm = SIMPLE  # nothing would be detached, and the arguments are refused (test_bad_arguments)
    x, dz, v = random(*size, seed=1) + 0.3, random(*size, seed=2), random(*size, seed=3)
    module = make(norm, shape, centered=centered, **layout)
    ours = derivatives(module, x, dz, v)
    theirs = derivatives(lambda x: reference(norm, x, dims_of(shape, layout), 1e-3, centered), x, dz, v)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


rows = st.tuples(st.integers(2, 40), st.integers(0, 2**31), st.floats(-3, 3), st.floats(-50, 50), st.floats(0, 0.1))


@settings(max_examples=60, deadline=None)
@given(rows)
@pytest.mark.parametrize(
    ("norm", "mean_kept", "variance_kept"),
    [(DETACHED, True, True), (SIMPLE, False, False), (MEAN_DETACHED, True, False), (VARIANCE_DETACHED, False, True)],
    ids=["both", "ordinary", "mean", "variance"],
)
def test_theorem_1(norm, mean_kept, variance_kept, row):
    """The mean of the gradient is kept (g_bar / sigma) only if the mean is detached, or else zero; its variance is
    kept (D_g / sigma^2) only if the variance is detached, or else at most that."""
    width, seed, log_scale, offset, eps = row
    x = leaf(random(1, width, seed=seed) * 10**log_scale + offset)
    g = random(1, width, seed=seed + 1) + 0.5
    (dx,) = torch.autograd.grad(make(norm, width, eps)(x), x, g)
    sigma = (x.detach().var(correction=0) + eps).sqrt()
    unit = (g.abs().max() / sigma).item()  # what errors are measured in
    mean = (g.mean() / sigma).item() if mean_kept else 0.0
    assert dx.mean().item() == pytest.approx(mean, abs=1e-6 * unit)
    bound = (g.var(correction=0) / sigma**2).item()
    variance = dx.var(correction=0).item()
    if variance_kept:
        assert variance == pytest.approx(bound, abs=1e-6 * unit**2)
    else:
        assert variance <= bound + 1e-6 * unit**2


# ---------------------------------------------------------------------------------------------------- numerics


def need_compiler() -> None:
    if not (sys.platform == "linux" and shutil.which("gcc")):
        pytest.skip("the loops need gcc on Linux")
    assert cpu._library() is not None, "the loops did not compile"


@pytest.fixture(params=["torch", "loop"])
def kernel(request, monkeypatch):
    """The plain norms, and those on the CPU's loops."""
    if request.param == "loop":
        need_compiler()
    else:
        monkeypatch.setattr(modeling_adanorm, "KERNELS", {})
    return request.param


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["plain", "autocast"])
@NORM
def test_dtype_is_nn_layernorms(norm, dtype, autocast):
    x = random(3, H, dtype=dtype)
    stock, module = nn.LayerNorm(H), make(norm)
    if autocast is None:
        stock.to(dtype)
    elif dtype == torch.float64:
        stock.double()  # torch mixes no other types with it
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        expected = stock(x).dtype
        for each in (module.train(), module.eval()):
            assert each(x).dtype == expected
            assert each(leaf(x)).dtype == expected


@NORM
def test_under_cuda_autocast_the_dtype_is_float32(norm, monkeypatch):
    """There, layer_norm runs in float32. Without a GPU at hand the same policy is registered for the CPU."""
    library = torch.library.Library("aten", "IMPL")
    library.impl(
        "layer_norm",
        lambda x, shape, weight=None, bias=None, eps=1e-5, cudnn=True: _without_autocast(
            lambda: torch.layer_norm(x.float(), shape, weight, bias, eps, cudnn)
        ),
        "AutocastCPU",
    )
    try:
        x, dz = leaf(random(3, H, dtype=torch.bfloat16)), random(3, H, dtype=torch.float32, seed=1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert nn.LayerNorm(H)(x).dtype == torch.float32
            z = make(norm)(x)
        assert z.dtype == torch.float32
        exact = leaf(x.double())
        expected = reference(norm, exact, (-1,), 1e-3)
        torch.testing.assert_close(z.double(), expected, rtol=1e-5, atol=1e-5)
        (dx,) = torch.autograd.grad(z, x, dz)
        assert dx.dtype == torch.bfloat16
        torch.testing.assert_close(
            dx.double(), torch.autograd.grad(expected, exact, dz.double())[0], rtol=1e-2, atol=1e-3
        )
    finally:
        library._destroy()


def _without_autocast(function):
    with torch.autocast("cpu", enabled=False):
        return function()


@NORM
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "row",
    [[1.0] * 4, [0.0] * 4, [1e4, -1e4, 1e4, 1e4], [1e-30] * 4, [1e18] * 1000, [1e18, *[0.0] * 40]],
    ids=["constant", "zero", "large", "tiny", "large-constant", "largest"],
)
def test_finite_wherever_torch_is(norm, dtype, row, kernel):
    low = leaf(torch.tensor([row]).to(dtype))
    width = (len(row),)
    stock = F.layer_norm(low, width, torch.ones(width, dtype=dtype))
    z = make(norm, width, 1e-5)(low)
    still = make(norm, width, 1e-5).eval()(low.detach())
    assert z.isfinite().logical_or(~stock.isfinite()).all()
    assert still.isfinite().logical_or(~stock.isfinite()).all()
    stock_dx, dx = (torch.autograd.grad(out.sum(), low)[0] for out in (stock, z))
    assert dx.isfinite().logical_or(~stock_dx.isfinite()).all()


@NORM
def test_empty_batch_width_one_and_meta(norm, kernel):
    empty = leaf(torch.empty(0, 3, H))
    z = make(norm)(empty)
    assert z.shape == (0, 3, H)
    assert torch.autograd.grad(z.sum(), empty)[0].shape == (0, 3, H)
    one = leaf(random(5, 1, dtype=torch.float32))
    z = make(norm, 1)(one)
    assert z.eq(0).all()
    assert torch.autograd.grad(z.sum(), one)[0].isfinite().all()
    meta = torch.empty(2, H, device="meta", dtype=torch.bfloat16, requires_grad=True)
    z = make(norm, device="meta")(meta)
    assert (z.shape, z.dtype, z.device.type) == ((2, H), torch.bfloat16, "meta")


@NORM
def test_layout_of_input_and_gradient_does_not_matter(norm, kernel):
    x, dz = random(6, H, 5, dtype=torch.float32), random(6, H, 5, dtype=torch.float32, seed=1)
    strided, dense = leaf(x), leaf(x.transpose(1, 2).contiguous())
    module = make(norm)
    z, expected = module(strided.transpose(1, 2)), module(dense)
    torch.testing.assert_close(z, expected)
    (dx,) = torch.autograd.grad(z, strided, dz.transpose(1, 2))
    (dx_dense,) = torch.autograd.grad(expected, dense, dz.transpose(1, 2).contiguous())
    torch.testing.assert_close(dx, dx_dense.transpose(1, 2))
    sliced = leaf(x)
    torch.testing.assert_close(module(sliced.transpose(1, 2)[::2]), expected[::2])
    (expanded,) = torch.autograd.grad(module(dense).sum(), dense)
    (ones,) = torch.autograd.grad(module(dense), dense, torch.ones_like(dense))
    torch.testing.assert_close(expanded, ones)


def test_a_wrong_width_is_refused_as_torch_refuses_it(kernel):
    for norm in NORMS:
        with pytest.raises(RuntimeError, match="normalized_shape"):
            make(norm)(leaf(torch.zeros(2, H + 1)))


def test_the_loop_agrees_with_itself_on_threads():
    need_compiler()
    x, dz = random(300, 257, dtype=torch.float32) + 5, random(300, 257, dtype=torch.float32, seed=1)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            low = leaf(x)
            z = make(ADANORM, 257)(low)
            found.append((z.detach(), *torch.autograd.grad(z, low, dz)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_without_a_compiler_the_loop_is_left_out(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    cpu._library.cache_clear()
    try:
        x = leaf(random(4, H, dtype=torch.float32))
        z = AdaNorm(H).train()(x)
        assert cpu._library() is None
        (dx,) = torch.autograd.grad(z.sum(), x)
        assert dx.isfinite().all()
        assert not list(tmp_path.rglob("*.so"))
    finally:
        cpu._library.cache_clear()


# --------------------------------------------------------------------------------------- compilers and copies


@pytest.mark.parametrize("norm", [ADANORM, DETACHED, SIMPLE], ids=["adanorm", "detach", "simple"])
def test_compiles_whole_and_once_for_all_batch_sizes(norm):
    """The graphs that Dynamo and AOTAutograd make; Inductor's own code is not what is tested here."""
    torch._dynamo.reset()
    module, graphs = make(norm), []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    for batch in (5, 7, 3):
        x, dz = random(batch, H, dtype=torch.float32), random(batch, H, dtype=torch.float32, seed=1)
        a, b = leaf(x), leaf(x)
        za, zb = compiled(a), module(b)
        torch.testing.assert_close(za, zb)
        torch.testing.assert_close(torch.autograd.grad(za, a, dz), torch.autograd.grad(zb, b, dz))
    assert len(graphs) == 1


def test_compiled_by_inductor_equals_eager():
    torch._dynamo.reset()
    x, module = random(6, H, dtype=torch.float32), make(ADANORM)
    a, b = leaf(x), leaf(x)
    try:
        za = torch.compile(module, fullgraph=True)(a)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        pytest.skip(f"Inductor finds no compiler here: {error}")
    torch.testing.assert_close(za, module(b))
    torch.testing.assert_close(torch.autograd.grad(za.sum(), a), torch.autograd.grad(module(b).sum(), b))


@pytest.mark.parametrize("strict", [True, False])
@NORM
def test_exports(norm, strict):
    module = make(norm)
    batch = torch.export.Dim("batch", min=2)
    x = random(4, H, dtype=torch.float32)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: batch},), strict=strict)
    larger = random(9, H, dtype=torch.float32, seed=1)
    torch.testing.assert_close(program.module()(larger), module(larger))


@NORM
def test_traces(norm):
    module = make(norm)
    x = random(4, H, dtype=torch.float32)
    torch.testing.assert_close(torch.jit.trace(module, (x,))(x + 1), module(x + 1))


@pytest.mark.parametrize("norm", [*NORMS, ("none", {})])
def test_copies_and_pickles(norm):
    module = make(norm)
    x = random(2, H, dtype=torch.float32)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert repr(other) == repr(module)
        torch.testing.assert_close(other(x), module(x))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:Please use quant_min")
@pytest.mark.parametrize("norm", [*NORMS, ("none", {})])
def test_fx_takes_it_for_one_call(norm):
    model = nn.Sequential(nn.Linear(H, H), make(norm), nn.Linear(H, H))
    x = random(4, H, dtype=torch.float32)
    traced = torch.fx.symbolic_trace(model)
    assert [node.op for node in traced.graph.nodes].count("call_module") == 3
    torch.testing.assert_close(traced(x), model(x))
    quantized = quantize_fx.prepare_fx(copy.deepcopy(model).eval(), get_default_qconfig_mapping("fbgemm"), (x,))
    torch.testing.assert_close(quantized(x), model.eval()(x))


@NORM
def test_make_fx_records_what_is_computed(norm, kernel):
    model, x = nn.Sequential(nn.Linear(H, H), make(norm)), random(4, H, dtype=torch.float32)
    torch.testing.assert_close(make_fx(model)(x)(x + 1), model(x + 1))


def test_script_is_refused_with_what_to_use():
    model = nn.Sequential(nn.Linear(H, H), AdaNorm(H))
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.trace.*torch\.export"):
        torch.jit.script(model)


def test_no_norm_returns_what_may_be_written_to():
    x = random(2, H)
    before = x.clone()
    NoNorm(H)(x).mul_(2)
    assert torch.equal(x, before)
    assert torch.equal(NoNorm(H)(x), x)


# --------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("make_it", "error", "words"),
    [
        (lambda: AdaNorm(H, C=0.0), ValueError, "C must be .* > 0, got 0"),
        (lambda: AdaNorm(H, C=math.inf), ValueError, "C must be"),
        (lambda: AdaNorm(H, C="1"), ValueError, "C must be a finite number"),
        (lambda: AdaNorm(H, k=-0.1), ValueError, r"k must be .* >= 0, got -0\.1"),
        (lambda: AdaNorm(H, k=math.nan), ValueError, "k must be"),
        (lambda: AdaNorm(H, eps=-1e-5), ValueError, "eps must be"),
        (lambda: AdaNorm(H, eps=True), ValueError, "eps must be a finite number"),
        (lambda: LayerNormSimple(()), ValueError, "normalized_shape"),
        (lambda: LayerNormSimple("8"), ValueError, "normalized_shape"),
        (lambda: LayerNormSimple((8, -1)), ValueError, "normalized_shape"),
        (lambda: LayerNormSimple((2, 4), channels_first=True), ValueError, "channels_first"),
        (lambda: LayerNormSimple(8, centered=1), ValueError, "centered"),
        (lambda: LayerNormSimple(8, center=True), ValueError, "unknown argument of LayerNormSimple, got .'center'"),
        (lambda: DetachNorm(8, detach_variance=False, centered=False), ValueError, "nothing is detached"),
        (lambda: DetachNorm(8, detach_mean=0), ValueError, "detach_mean"),
    ],
)
def test_bad_arguments(make_it, error, words):
    with pytest.raises(error, match=words):
        make_it()
