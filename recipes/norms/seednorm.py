"""SeeDNorm, a norm of your own in one file: --norm recipes/norms/seednorm.py:SeeDNorm"""

import torch
import torch.nn.functional as F
from torch import nn


class SeeDNorm(nn.Module):
    """SeeDNorm: (tanh(x . beta) * alpha + gamma) * x / rms(x) (Cai et al., ICLR 2026, arXiv:2510.22777).

    x . beta is one scalar for each row. beta starts at 0, so the norm starts as an RMSNorm with gain gamma.

    Args:
        normalized_shape: width of the input, one dimension.
        eps: added to the mean square.
        alpha: where alpha starts. It must not be 0: alpha and beta, both 0, would have no gradient. The default 1.0 is
            our choice, not a value confirmed in the paper.
    """

    def __init__(self, normalized_shape, eps=1e-5, *, alpha=1.0, device=None, dtype=None):
        super().__init__()
        if alpha == 0:
            raise ValueError("alpha must not be 0: alpha and beta would have no gradient")
        where = {"device": device, "dtype": dtype}
        self.eps = eps
        self.alpha = nn.Parameter(torch.full((normalized_shape,), float(alpha), **where))
        self.beta = nn.Parameter(torch.zeros(normalized_shape, **where))
        self.gamma = nn.Parameter(torch.ones(normalized_shape, **where))

    def forward(self, x):
        scale = torch.tanh(x @ self.beta).unsqueeze(-1) * self.alpha + self.gamma
        return scale * F.rms_norm(x, x.shape[-1:], eps=self.eps)

    @classmethod
    def from_norm(cls, norm, **settings):
        """Start from the gain of the norm that it replaces."""
        (width,) = norm.normalized_shape
        new = cls(width, norm.eps, **settings).to(norm.weight)
        with torch.no_grad():
            new.gamma.copy_(norm.weight)
        return new
