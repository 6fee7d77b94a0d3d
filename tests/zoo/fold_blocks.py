"""Blocks of a norm and what reads it, made by hand, for tests of folding."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from hf_adanorm import fold_affine

transformers.logging.set_verbosity_error()
WIDTH = 8


def difference(new: Tensor, old: Tensor) -> float:
    return float((new - old).abs().max() / old.abs().max())


def quietly(function: Any, *args: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def norm(width: int = WIDTH, bias: bool = True) -> nn.LayerNorm:
    """A LayerNorm with a gain and a bias that show."""
    module = nn.LayerNorm(width)
    with torch.no_grad():
        module.weight.copy_(torch.linspace(0.5, 1.5, width))
        module.bias.copy_(torch.linspace(-0.5, 0.5, width) if bias else torch.zeros(width))
    return module


class Block(nn.Module):
    """`compute(self, norm(x))` with a norm, a linear layer and whatever else is given as `self.NAME`."""

    def __init__(self, compute: Any, *, bias: bool = True, **modules: nn.Module) -> None:
        super().__init__()
        self.norm = norm(bias=bias)
        if "linear" in compute.__code__.co_names:  # one that does not run might read the norm on other inputs
            self.linear = nn.Linear(WIDTH, 3)
        for name, module in modules.items():
            setattr(self, name, module)
        self.compute = compute

    def forward(self, x: Tensor) -> Any:
        return self.compute(self, self.norm(x))


def fold_block(block: nn.Module, **options: Any) -> Any:
    options = {"inputs": {"x": torch.randn(2, 5, WIDTH)}, **options}
    return fold_affine(block.eval(), **options).norms[0]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor], *, rounding: bool = False) -> bool:
    """Return whether the state is as before: bit for bit, or to within rounding of each element."""
    after = model.state_dict()
    tolerance = {"rtol": 1e-5, "atol": 0.0} if rounding else {"rtol": 0.0, "atol": 0.0}
    return after.keys() == before.keys() and all(
        torch.allclose(after[key], before[key], **tolerance) for key in before
    )
