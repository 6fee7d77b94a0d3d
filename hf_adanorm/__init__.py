"""Swap the norms of any transformers model in one call. The stock calls save and load the result.

    import hf_adanorm
    hf_adanorm.patch_model(model, "adanorm")
    model.save_pretrained("out")

The import registers the norms, so that `from_pretrained`, `pipeline` and `Trainer` load patched checkpoints.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ._lazy import lazily
from .saving import install, when_imported

__all__ = [
    "AdaNorm",
    "AdaNormSpec",
    "DetachNorm",
    "DyT",
    "Fold",
    "FoldReport",
    "FoldedNorm",
    "KReport",
    "LayerNormSimple",
    "NoNorm",
    "NormGroup",
    "NormInfo",
    "NormLog",
    "NormRange",
    "NormRecord",
    "NormRow",
    "NormSchedule",
    "NormScheduleCallback",
    "Report",
    "WatchNormsCallback",
    "__version__",
    "calibrate_k",
    "fold_affine",
    "inspect_model",
    "is_patched",
    "patch_model",
    "register_norm",
    "set_norm",
    "unpatch_model",
    "watch_norms",
    "write_model_card",
]

if TYPE_CHECKING:
    from . import modeling_adanorm as modeling_adanorm
    from .calibration import KReport, NormRange, calibrate_k
    from .detection import NormInfo
    from .diagnostics import NormLog, NormRecord, WatchNormsCallback, watch_norms
    from .diagnostics import plots as plots
    from .folding import Fold, FoldedNorm, FoldReport, fold_affine
    from .modeling_adanorm import AdaNorm, DetachNorm, DyT, LayerNormSimple, NoNorm, __version__
    from .norms import register_norm
    from .patching import inspect_model, is_patched, patch_model, unpatch_model
    from .report import NormRow, Report
    from .saving import write_model_card
    from .settings import NormSchedule, NormScheduleCallback, set_norm
    from .spec import AdaNormSpec, NormGroup

# The names of each module, imported when one is first used: `import hf_adanorm` costs next to nothing, not even torch.
__getattr__, __dir__ = lazily(
    __name__,
    {
        "calibration": "KReport NormRange calibrate_k",
        "detection": "NormInfo",
        "diagnostics": "NormLog NormRecord WatchNormsCallback plots watch_norms",
        "folding": "Fold FoldReport FoldedNorm fold_affine",
        "modeling_adanorm": "AdaNorm DetachNorm DyT LayerNormSimple NoNorm __version__ modeling_adanorm",
        "norms": "register_norm",
        "report": "NormRow Report",
        "patching": "inspect_model is_patched patch_model unpatch_model",
        "spec": "AdaNormSpec NormGroup",
        "saving": "write_model_card",
        "settings": "NormSchedule NormScheduleCallback set_norm",
    },
)


def serve(format: int, stock: Any, others: Any) -> Any:  # noqa: A002
    """Answer the code of a saved model, which asks whether this package reads its format; see `saving.hooks.serve`."""
    return importlib.import_module(".saving.hooks", __name__).serve(format, stock, others)


def _complete(modeling: Any) -> None:
    """Add what only this package has to the classes of the file that travels: methods and kernels."""
    importlib.import_module(".protocol", __name__).complete_all()
    importlib.import_module(".kernels", __name__)  # registers on import


install.install()
when_imported(f"{__name__}.modeling_adanorm", _complete)
