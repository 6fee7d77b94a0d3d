"""AdaNorm and its relatives for any transformers model: one call swaps the norms, stock calls save and load it.

    import hf_adanorm
    hf_adanorm.patch_model(model, "adanorm")
    model.save_pretrained("out")

Importing the package is what teaches stock `from_pretrained`, `pipeline` and `Trainer` to read patched checkpoints.
"""

from . import cpu_kernel, modeling_adanorm
from .hooks import install as _install
from .modeling_adanorm import AdaNorm, AdaNormSpec, DetachNorm, LayerNormSimple, NoNorm, __version__
from .patching import inspect_model, is_patched, patch_model, unpatch_model

__all__ = [
    "AdaNorm",
    "AdaNormSpec",
    "DetachNorm",
    "LayerNormSimple",
    "NoNorm",
    "__version__",
    "inspect_model",
    "is_patched",
    "patch_model",
    "unpatch_model",
]

_install()
modeling_adanorm.cpu_kernel = cpu_kernel  # compiled on the first training step on a CPU, not here
