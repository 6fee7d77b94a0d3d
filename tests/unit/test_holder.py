"""A norm of a user's gets from its holder what the replaced norm gave the model."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_adanorm import patch_model
from hf_adanorm.holder import held


class Shifted(nn.Module):
    def __init__(self, normalized_shape: Any, eps: float = 1e-5, *, shift: float = 2.0) -> None:
        super().__init__()
        self.weight, self.shift = nn.Parameter(torch.full((normalized_shape,), 0.5)), shift
        self.register_buffer("seven", torch.full((1,), 7.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.float() * self.weight + self.shift + self.seven


def build(**arguments: Any) -> Any:
    return held({"shifted": Shifted})["shifted"](normalized_shape=(3,), eps=1e-3, **arguments)


def test_the_layout_and_the_dtype_are_those_of_the_replaced_norm() -> None:
    x = torch.randn(2, 3, 4)
    norm = build(channels_first=True, shift=1.0)
    torch.testing.assert_close(norm(x), 0.5 * x + 8.0)
    assert norm.settings() == {"shift": 1.0}
    assert build(dtype=torch.bfloat16)(x.movedim(1, -1).bfloat16()).dtype == torch.bfloat16
    assert build(dtype=torch.float64, output_dtype="weight")(x.movedim(1, -1)).dtype == torch.float64


def test_a_full_size_weight_does_not_pass_as_that_of_a_stock_norm() -> None:
    state = build().state_dict()
    assert (state["weight"].shape, state["norm.weight"].shape) == ((1,), (3,))
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        nn.LayerNorm(3).load_state_dict(state, strict=False)


def test_memory_that_comes_late_is_filled_with_the_values_of_a_new_norm() -> None:
    norm = build(device="meta").to_empty(device="cpu")
    tensors = dict((*norm.named_parameters(), *norm.named_buffers()))
    for tensor in tensors.values():
        tensor.detach().fill_(99.0)
    norm.norm.weight._is_hf_initialized = True  # as that of a checkpoint
    norm.reset_parameters()
    found = {name: tensor.unique().tolist() for name, tensor in tensors.items()}
    assert found == {"norm.weight": [99.0], "weight": [1.0], "norm.seven": [7.0]}


def test_an_error_of_the_authors_constructor_says_what_was_being_built() -> None:
    class Halved(Shifted):
        def __init__(self, normalized_shape: Any, eps: float = 1e-5, *, shift: float = 2.0) -> None:
            super().__init__(normalized_shape, eps, shift=shift / 2)

    with pytest.raises(TypeError, match="unsupported operand") as caught:
        held({"halved": Halved})["halved"](normalized_shape=3, shift="x")
    assert caught.value.__notes__ == ["while building Halved(shift='x')"]


def test_it_pickles() -> None:
    norm, x = build(shift=3.0), torch.randn(2, 3)
    assert torch.equal(pickle.loads(pickle.dumps(norm))(x), norm(x))


def test_a_second_call_keeps_what_was_learned_and_does_not_warn() -> None:
    model = patch_model(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), Shifted)
    with torch.no_grad():
        model[1].norm.weight.fill_(0.25)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch_model(model, Shifted, shift=1.0)
    assert (model[1].settings(), model[1].norm.weight.tolist()) == ({"shift": 1.0}, [0.25] * 3)
