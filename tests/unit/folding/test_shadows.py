"""What becomes of a norm's channels in the operations that its output goes through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_adanorm.folding.shadows import FOREIGN, PADDING, Shadows, Trace
from hf_adanorm.state import tensors_in

aten = torch.ops.aten
NORM = ("norm", "n")


def followed(func: Any, arguments: Callable[[Tensor], tuple[Any, ...]]) -> tuple[Any, Trace | None]:
    """Return what `func` of a norm's output (2, 3) loses, and the trace of its result."""
    shadows, x = Shadows(), torch.randn(2, 3)
    shadows.begin(x, NORM, torch.arange(3))
    args = arguments(x)
    out = func(*args)
    return shadows.follow(func, args, {}, out, list(tensors_in(args))), shadows.of(out).get(NORM)


@pytest.mark.parametrize(
    ("func", "arguments", "columns", "arrives"),
    [
        (aten.flip.default, lambda x: (x, [1]), (2, 1, 0), True),
        (aten.slice.Tensor, lambda x: (x, 1, 1, 3), (1, 2), True),
        (aten.cat.default, lambda x: ([x, torch.zeros(2, 1)], 1), (0, 1, 2, FOREIGN), True),
        (aten.constant_pad_nd.default, lambda x: (x, [1, 0]), (PADDING, 0, 1, 2), False),
        (aten.mul.Tensor, lambda x: (x, torch.tensor(0.5)), (0, 1, 2), False),
        (aten.mean.dim, lambda x: (x, [0], True), (0, 1, 2), True),
    ],
)
def test_channels_and_biases_are_followed(func: Any, arguments: Any, columns: tuple[int, ...], arrives: bool) -> None:
    lost, trace = followed(func, arguments)
    assert lost == []
    assert trace is not None
    assert trace.columns(1) == columns
    assert trace.biases_arrive() is arrives


@pytest.mark.parametrize(("func", "rest"), [(aten.tanh.default, ()), (aten.sum.dim_IntList, ([1],))])
def test_what_mixes_or_bends_channels_cannot_be_followed(func: Any, rest: tuple[Any, ...]) -> None:
    assert followed(func, lambda x: (x, *rest)) == (None, None)


def test_the_memory_of_a_traced_tensor_is_known_under_other_names() -> None:
    shadows, x = Shadows(), torch.randn(2, 3)
    shadows.begin(x, NORM, torch.arange(3))
    assert shadows.aliased(torch.from_numpy(x.numpy())) == [NORM]
    assert shadows.aliased(x.clone()) == []
