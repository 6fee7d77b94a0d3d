"""AdaNorm and its relatives for any transformers model: one call swaps the norms, stock calls save and load it.

    import hf_adanorm
    hf_adanorm.patch_model(model, "adanorm")
    model.save_pretrained("out")

Importing the package is what teaches stock `from_pretrained`, `pipeline` and `Trainer` to read patched checkpoints.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .saving.install import install
from .saving.wrapping import when_imported

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
    from . import modeling_adanorm as modeling_adanorm
    from .calibration import calibrate_k
    from .diagnostics.outputs import compare_outputs
    from .diagnostics.watch import WatchNormsCallback, watch_norms
    from .fading import FadeCallback, finish_fading, set_fade
    from .folding.fold import fold_affine
    from .modeling_adanorm import AdaNorm, AdaNormSpec, DetachNorm, LayerNormSimple, NoNorm, __version__
    from .patching import inspect_model, is_patched, patch_model, unpatch_model
    from .saving.card import write_model_card

# name -> the module that is imported when it is first used: `import hf_adanorm` costs next to nothing, not even torch.
_LAZY = {
    "AdaNorm": "modeling_adanorm",
    "AdaNormSpec": "modeling_adanorm",
    "DetachNorm": "modeling_adanorm",
    "FadeCallback": "fading",
    "LayerNormSimple": "modeling_adanorm",
    "NoNorm": "modeling_adanorm",
    "WatchNormsCallback": "diagnostics.watch",
    "__version__": "modeling_adanorm",
    "calibrate_k": "calibration",
    "compare_outputs": "diagnostics.outputs",
    "finish_fading": "fading",
    "fold_affine": "folding.fold",
    "inspect_model": "patching",
    "is_patched": "patching",
    "patch_model": "patching",
    "set_fade": "fading",
    "unpatch_model": "patching",
    "watch_norms": "diagnostics.watch",
    "write_model_card": "saving.card",
}
_MODULES = {"cpu_kernel": ".cpu_kernel", "modeling_adanorm": ".modeling_adanorm", "plots": ".diagnostics.plots"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(_MODULES[name], __name__)
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)


def _add_kernel(modeling: Any) -> None:
    modeling.cpu_kernel = importlib.import_module(".cpu_kernel", __name__)  # compiled on the first training step


install()
when_imported(f"{__name__}.modeling_adanorm", _add_kernel)
