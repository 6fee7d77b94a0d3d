"""Every mode of torch's autograd and compilers, with and without the kernels, against the definition in float64.

In the definition phi, or what DetachNorm detaches, is a constant, computed at the point where it is differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, functional, grad
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.func import hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.utils.checkpoint import checkpoint

from hf_adanorm import modeling_adanorm
from hf_adanorm.kernels import cpu, fused
from hf_adanorm.modeling_adanorm import NORM_CLASSES, AdaNorm, LayerNormSimple
from tests.zoo.formulas import reference, saved_bytes

H, EPS = 6, 1e-2
Function = Callable[[Tensor], Tensor]


def random(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, V, W, MANY = random(H, seed=0) * 2 + 0.5, random(H, seed=1), random(H, seed=2), random(3, H, seed=3)


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def loss(f: Function) -> Function:
    return lambda x: (f(x) * W.to(x.dtype)).sum()


def reverse(f: Function, x: Tensor) -> Tensor:
    x = leaf(x)
    return grad(f(x), x, W.to(x.dtype))[0]


def first(f: Function, x: Tensor) -> Tensor:
    """The gradient, with a graph of its own."""
    return grad(loss(f)(x), x, create_graph=True)[0]


def double(f: Function, x: Tensor) -> Tensor:
    x = leaf(x)
    return grad(first(f, x) + 0 * x, x, V.to(x.dtype))[0]  # 0 * x: a constant gradient has no graph


def batched(f: Function, x: Tensor) -> Tensor:
    x = leaf(x)
    return grad(f(x), x, MANY.to(x.dtype), is_grads_batched=True)[0]


def through_a_batched(f: Function, x: Tensor) -> Tensor:
    x = leaf(x)
    many = grad(f(x), x, MANY.to(x.dtype), is_grads_batched=True, create_graph=True)[0]
    return grad((many + 0 * x).pow(2).sum(), x)[0]


def tangent(f: Function, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(f(forward_ad.make_dual(x, V.to(x.dtype)))).tangent
        return torch.zeros_like(x) if found is None else found


def forward_over_reverse(f: Function, x: Tensor) -> Tensor:
    return tangent(lambda x: grad(loss(f)(x), x)[0], leaf(x)).detach()


def reverse_over_forward(f: Function, x: Tensor) -> Tensor:
    x = leaf(x)
    return grad(tangent(f, x) + 0 * x, x, W.to(x.dtype))[0]


def tangent_of_the_gradient_alone(f: Function, x: Tensor) -> Tensor:
    x = leaf(x)
    z = f(x)
    return tangent(lambda dz: grad(z, x, dz)[0], W.to(x.dtype))


def with_hooks(f: Function, x: Tensor) -> Tensor:
    with saved_tensors_hooks(lambda t: t.clone(), lambda t: t), save_on_cpu():
        return double(f, x)


def checkpointed_reentrant(f: Function, x: Tensor) -> Tensor:
    x = leaf(x)
    checkpoint(f, x, use_reentrant=True).backward(W.to(x.dtype))  # type: ignore[union-attr]
    assert x.grad is not None
    return x.grad


MODES: dict[str, Callable[[Function, Tensor], Tensor]] = {
    "value": lambda f, x: f(x),
    "reverse": reverse,
    "double": double,
    "batched": batched,
    "through a batched": through_a_batched,
    "forward": tangent,
    "forward, with a graph": lambda f, x: tangent(f, leaf(x)).detach(),
    "forward over reverse": forward_over_reverse,
    "reverse over forward": reverse_over_forward,
    "a tangent of the gradient alone": tangent_of_the_gradient_alone,
    "functional.jacobian": lambda f, x: functional.jacobian(f, x, vectorize=True),
    "functional.jacobian, forward": lambda f, x: functional.jacobian(f, x, vectorize=True, strategy="forward-mode"),
    "functional.hessian, forward": lambda f, x: functional.hessian(
        loss(f), x, vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
    "functional.jvp": lambda f, x: functional.jvp(f, x, V.to(x.dtype))[1],
    "vjp": lambda f, x: vjp(f, x)[1](W.to(x.dtype))[0],
    "jvp": lambda f, x: jvp(f, (x,), (V.to(x.dtype),))[1],
    "jacrev": lambda f, x: jacrev(f)(x),
    "jacfwd": lambda f, x: jacfwd(f)(x),
    "hessian": lambda f, x: hessian(loss(f))(x),
    "jacrev of jacrev": lambda f, x: jacrev(jacrev(loss(f)))(x),
    "jacrev of jacfwd": lambda f, x: jacrev(jacfwd(f))(x),
    "jacfwd of jacfwd": lambda f, x: jacfwd(jacfwd(f))(x),
    "vmap": lambda f, x: vmap(torch.func.grad(loss(f)))(torch.stack([x, x]))[0],
    "hooks of saved tensors": with_hooks,
    "checkpoint": lambda f, x: double(lambda x: checkpoint(f, x, use_reentrant=False), x),  # type: ignore[return-value,arg-type]
    "checkpoint, reentrant": checkpointed_reentrant,
}


def statistics(norm: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.mean(-1, keepdim=True) if norm.centered else torch.zeros((), dtype=x.dtype)
    square = (x - mean).pow(2)
    return mean, (square.mean(-1, keepdim=True) + norm.eps).sqrt()


def definition(norm: Any) -> Function:
    """z = phi * N(x) around X, with phi and what DetachNorm detaches as constants."""
    mean_there, std_there = statistics(norm, X)
    C, k = getattr(norm, "C", 1.0), getattr(norm, "k", 0.0)
    phi = C * (1 - k * (X - mean_there) / std_there)

    def f(x: Tensor) -> Tensor:
        mean, std = statistics(norm, x)
        if norm.norm_name == "detachnorm":
            mean = mean_there if norm.detach_mean else mean
            std = std_there if norm.detach_variance else std
        return phi * (x - mean) / std

    return f


def norms(dtype: torch.dtype) -> Iterator[nn.Module]:
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("adanorm", {"C": 1.3, "k": 0.3}),
        ("layernorm-simple", {}),
        *(("detachnorm", {"detach_mean": mean, "detach_variance": std}) for mean, std in ((1, 1), (0, 1), (1, 0))),
    ]
    for name, given in kinds:
        settings = {key: bool(value) if name == "detachnorm" else value for key, value in given.items()}
        for centered in (True, False) if settings.get("detach_variance", True) else (True,):
            yield NORM_CLASSES[name](H, EPS, **settings, centered=centered, dtype=dtype)


@pytest.fixture(params=[True, False], ids=["kernels", "plain"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With the package's kernels, which must be there, and without, as where the package is missing."""
    if not request.param:
        monkeypatch.setattr(modeling_adanorm, "KERNELS", {})
    elif cpu._library() is None:
        pytest.skip("the loops need gcc on Linux")
    monkeypatch.setattr(fused, "FEW_ELEMENTS", 0)
    return bool(request.param)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_takes_the_same_things_for_constants(mode: str, kernels: bool) -> None:
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-4)):
        for norm in norms(dtype):
            expected = MODES[mode](definition(norm), X)
            found = MODES[mode](norm, X.to(dtype))
            assert (found - expected).abs().max() <= tolerance * expected.abs().max().clamp_min(1.0), norm


def test_linearize(kernels: bool) -> None:
    norm = next(norms(torch.float64))
    torch.testing.assert_close(linearize(norm, X)[1](V), jvp(definition(norm), (X,), (V,))[1])


@pytest.mark.parametrize("kernels", [True], indirect=True)
def test_the_kernels_compute_in_training_and_inference_and_save_no_more_than_nn_layernorm(kernels: bool) -> None:
    calls: list[str] = []
    for norm in norms(torch.float32):
        x = torch.randn(64, H, requires_grad=True)
        computed = fused.run(norm, x)
        assert computed is not None
        calls.append(str(norm))
        assert type(computed.grad_fn).__name__ == "_FusedBackward"
        still = fused.run(norm.eval(), x.detach())
        assert still is not None
        torch.testing.assert_close(computed, still)
        assert saved_bytes(norm, x) <= saved_bytes(nn.LayerNorm(H), x)
    assert len(calls) == 9


def test_small_inputs_of_layernorm_simple_train_on_torchs_operator() -> None:
    norm = LayerNormSimple(H)
    assert fused.run(norm, torch.randn(8, H, requires_grad=True)) is None
    assert (fused.run(norm, torch.randn(8, H)) is None) is (cpu._library() is None)


@pytest.mark.parametrize("name", ["adanorm", "layernorm-simple", "detachnorm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_err_at_most_a_tenth_more_than_nn_layernorm(dtype: torch.dtype, name: str, kernels: bool) -> None:
    def errors(module: nn.Module, kind: str, settings: dict[str, float]) -> list[float]:
        low, exact = leaf(x), leaf(x.double())
        z, expected = module(low), reference((kind, settings), exact, (-1,), 1e-5)
        (dx,), (expected_dx,) = grad(z, low, dz), grad(expected, exact, dz.double())
        pairs = ((z.detach(), expected.detach()), (dx, expected_dx))
        return [((one.double() - e).pow(2).mean() / e.pow(2).mean()).sqrt().item() for one, e in pairs]

    x, dz = (random(64, 768, seed=5) * 3 + 1).to(dtype), random(64, 768, seed=6).to(dtype)
    settings = {"C": 1.3, "k": 0.07} if name == "adanorm" else {}
    found = errors(NORM_CLASSES[name](768, **settings), name, settings)
    for error, stock in zip(found, errors(nn.LayerNorm(768, dtype=dtype), "layernorm-simple", {}), strict=True):
        assert error <= 1.1 * stock


@pytest.mark.parametrize("offset", [0.0, 1.0, 100.0, 1e4])
@pytest.mark.parametrize("width", [1, 7, 768, 20_000])
def test_the_rounding_of_float32_is_bounded(width: int, offset: float, kernels: bool) -> None:
    """At most 12 units of 2^-23 (1 + |mean| / std) max(1, |z|) off the exact value, with and without kernels."""
    x = (random(32, width, seed=width) * 3 + offset).float()
    exact = reference(("adanorm", {"C": 1.0, "k": 0.1}), x.double(), (-1,), 1e-5)
    std = (x.double().var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    unit = 2.0**-23 * (1 + x.double().mean(-1, keepdim=True).abs() / std) * exact.abs().clamp_min(1)
    assert ((AdaNorm(width)(x).double() - exact).abs() / unit).max() <= 12
