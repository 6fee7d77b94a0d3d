"""AdaNorm and its relatives for any transformers model: one call swaps the norms, stock calls save and load it.

    import hf_adanorm
    hf_adanorm.patch_model(model, "adanorm")
    model.save_pretrained("out")

Importing the package is what teaches stock `from_pretrained`, `pipeline` and `Trainer` to read patched checkpoints.
"""

from typing import TYPE_CHECKING, Any

from . import cpu_kernel, modeling_adanorm
from .modeling_adanorm import AdaNorm, AdaNormSpec, DetachNorm, LayerNormSimple, NoNorm, __version__
from .patching import inspect_model, is_patched, patch_model, unpatch_model
from .saving.hooks import install as _install

__all__ = [
    "AdaNorm",
    "AdaNormSpec",
    "DetachNorm",
    "FadeCallback",
    "LayerNormSimple",
    "NoNorm",
    "WatchNormsCallback",
    "__version__",
    "calibrate_k",
    "compare_outputs",
    "finish_fading",
    "fold_affine",
    "inspect_model",
    "is_patched",
    "patch_model",
    "set_fade",
    "unpatch_model",
    "watch_norms",
    "write_model_card",
]

if TYPE_CHECKING:
    from .calibration import calibrate_k
    from .diagnostics.outputs import compare_outputs
    from .diagnostics.watch import WatchNormsCallback, watch_norms
    from .fading import FadeCallback, finish_fading, set_fade
    from .folding.fold import fold_affine
    from .saving.card import write_model_card

# name -> the module that is imported when it is first used: `import hf_adanorm` stays cheap, and a TrainerCallback
# would bring in PEFT and more.
_LAZY = {
    "FadeCallback": "fading",
    "WatchNormsCallback": "diagnostics.watch",
    "calibrate_k": "calibration",
    "compare_outputs": "diagnostics.outputs",
    "finish_fading": "fading",
    "fold_affine": "folding.fold",
    "set_fade": "fading",
    "watch_norms": "diagnostics.watch",
    "write_model_card": "saving.card",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name == "plots":
        return importlib.import_module(".diagnostics.plots", __name__)
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)


_install()
modeling_adanorm.cpu_kernel = cpu_kernel  # compiled on the first training step on a CPU, not here
