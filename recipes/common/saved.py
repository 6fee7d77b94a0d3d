"""A saved model, loaded as others load it."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from common.endings import DataError


def load_saved(auto_class: Any, name: Any) -> PreTrainedModel:
    """What stock `auto_class.from_pretrained` makes of a folder or a name on the Hub.

    Raises DataError where weights are missing, which would be left at chance: scores would be those of no model.
    Sinusoidal positions, which FSMT and Pegasus compute and do not save, are none of them.
    """
    model, info = auto_class.from_pretrained(name, output_loading_info=True)
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
    return model
