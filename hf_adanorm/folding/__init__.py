"""Fold gains and biases into the linear layers that read a norm: watch, plan, fit, write, check."""

from typing import TYPE_CHECKING

from hf_adanorm._lazy import lazily

if TYPE_CHECKING:
    from .fold import FoldReport as FoldReport
    from .fold import fold_affine as fold_affine
    from .fold import fold_norms as fold_norms
    from .options import Fold as Fold
    from .plan import FoldedNorm as FoldedNorm
    from .plan import is_plain as is_plain

# The options alone are imported without torch.
__getattr__, __dir__ = lazily(
    __name__, {"fold": "FoldReport fold_affine fold_norms", "plan": "FoldedNorm is_plain", "options": "Fold"}
)
