"""Linear layers as a fold sees them: which modules are some, and where their features lie."""

from __future__ import annotations

from typing import cast

from torch import nn
from transformers.pytorch_utils import Conv1D


def is_linear_map(module: nn.Module) -> bool:
    """nn.Linear, Conv1D and nn.Conv1d/2d/3d, and subclasses that leave the forward pass alone."""
    forward = type(module).forward
    return any(
        isinstance(module, kind) and forward is kind.forward
        for kind in (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    )


def num_inputs(module: nn.Module) -> int:
    """Input features of a linear map (for a convolution: input channels)."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0])
    return module.in_features if isinstance(module, nn.Linear) else cast(nn.Conv1d, module).in_channels


def channel_dim(module: nn.Module, ndim: int) -> int:
    """The dimension of a linear map's input (or output) that holds its features."""
    if isinstance(module, (nn.Linear, Conv1D)):
        return ndim - 1
    return ndim - 1 - len(cast(nn.Conv1d, module).kernel_size)  # or 2d, 3d
