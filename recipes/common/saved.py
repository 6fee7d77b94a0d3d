"""Applies saved models the way others do: stock `from_pretrained`, and the options of the scripts that use it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

import hf_adanorm  # noqa: F401  (registers the norms, so that stock from_pretrained loads patched models)
from common.endings import DataError


def load_saved(auto_class: Any, name: Any, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Return what stock `auto_class.from_pretrained` loads from a folder or a name on the Hub, in eval mode.

    Raises DataError for a model of another kind, and for missing weights, which would be random. Sinusoidal
    positions, which FSMT and Pegasus compute and do not save, may be missing.
    """
    try:
        model, info = auto_class.from_pretrained(name, output_loading_info=True, trust_remote_code=trust_remote_code)
    except ValueError as error:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        kind = next(iter(config.architectures or []), config.model_type)
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"--model {name}: {auto_class.__name__} cannot load a {kind}: {reason}") from error
    fixed = {
        id(parameter)
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
        if not parameter.requires_grad or "Sinusoidal" in type(module).__name__
    }
    own = dict(model.named_parameters(remove_duplicate=False))
    if missing := sorted(key for key in info["missing_keys"] if id(own.get(key)) not in fixed):
        few = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise DataError(f"{name} lacks {len(missing)} weights of a {type(model).__name__}: {few}")
    return model.eval()


def device_and_autocast(precision: str) -> tuple[str, torch.autocast]:
    """Return the device to run on, and the context of a precision: "no", "fp16" or "bf16"."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    return device, torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32)
