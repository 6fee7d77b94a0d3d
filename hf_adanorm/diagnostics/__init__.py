"""What norms do to activations and gradients, and where two models part ways."""

from typing import TYPE_CHECKING

from hf_adanorm._lazy import lazily

if TYPE_CHECKING:
    from . import plots
    from .outputs import compare_outputs
    from .watch import WatchNormsCallback, watch_norms

# The pictures' colors need neither the Trainer's callbacks nor transformers.
__getattr__ = lazily(
    __name__, {"outputs": "compare_outputs", "plots": "plots", "watch": "WatchNormsCallback watch_norms"}
)
