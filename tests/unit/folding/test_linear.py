"""Which modules are linear layers to a fold, and where their features lie."""

from __future__ import annotations

import pytest
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_adanorm.folding.watch import channel_dim, is_linear_map, num_inputs


@pytest.mark.parametrize(
    ("module", "ndim", "dim"),
    [(nn.Linear(3, 5), 3, 2), (Conv1D(5, 3), 3, 2), (nn.Conv1d(3, 5, 2), 3, 1), (nn.Conv2d(3, 5, 2), 4, 1)],
)
def test_linear_layers_and_where_their_features_lie(module: nn.Module, ndim: int, dim: int) -> None:
    assert is_linear_map(module)
    assert num_inputs(module) == 3
    assert channel_dim(module, ndim) == dim


class Doubled(nn.Linear):
    def forward(self, x):  # type: ignore[no-untyped-def]
        return 2 * super().forward(x)


def test_a_forward_of_its_own_is_no_linear_layer() -> None:
    assert not is_linear_map(Doubled(3, 5))
