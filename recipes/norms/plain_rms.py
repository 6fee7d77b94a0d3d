"""RMSNorm without a gain, a norm of your own in one file: --norm recipes/norms/plain_rms.py:PlainRMS"""

import torch.nn.functional as F
from torch import nn


class PlainRMS(nn.Module):
    """x / rms(x), without parameters.

    Args:
        normalized_shape: the trailing dimensions to normalize.
        eps: added to the mean square.
    """

    def __init__(self, normalized_shape, eps=1e-5):
        super().__init__()
        self.normalized_shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, eps=self.eps)
