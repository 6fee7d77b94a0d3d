"""Show what norms do to activations and gradients."""

from typing import TYPE_CHECKING

from hf_adanorm._lazy import lazily

if TYPE_CHECKING:
    from . import plots
    from .log import NormLog, NormRecord
    from .watch import WatchNormsCallback, watch_norms

# The plots' colors need neither the Trainer's callbacks nor transformers.
__getattr__, __dir__ = lazily(
    __name__, {"log": "NormLog NormRecord", "plots": "plots", "watch": "WatchNormsCallback watch_norms"}
)
