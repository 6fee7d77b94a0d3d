"""Derf, a norm of your own in one file: python recipes/classification.py --norm recipes/norms/derf.py:Derf ..."""

import torch
from torch import nn


class Derf(nn.Module):
    """Derf: gain * erf(alpha * x + shift) + bias, without statistics (Chen et al., CVPR 2026, arXiv:2512.10938).

    Args:
        normalized_shape: shape of gain and bias, the trailing dimensions of the input.
        eps: not used; every norm takes it.
        alpha: where the scalar alpha starts.
        shift: where the scalar shift starts.
    """

    def __init__(self, normalized_shape, eps=1e-5, *, alpha=0.5, shift=0.0, device=None, dtype=None):
        super().__init__()
        where = {"device": device, "dtype": dtype}
        self.gain = nn.Parameter(torch.ones(normalized_shape, **where))
        self.bias = nn.Parameter(torch.zeros(normalized_shape, **where))
        self.alpha = nn.Parameter(torch.full((1,), float(alpha), **where))
        self.shift = nn.Parameter(torch.full((1,), float(shift), **where))

    def forward(self, x):
        return self.gain * torch.erf(self.alpha * x + self.shift) + self.bias

    @classmethod
    def from_norm(cls, norm, **settings):
        """Start from the gain and the bias of the norm that it replaces."""
        new = cls(norm.normalized_shape, norm.eps, **settings).to(norm.weight)
        with torch.no_grad():
            new.gain.copy_(norm.weight)
            if getattr(norm, "bias", None) is not None:
                new.bias.copy_(norm.bias)
        return new
