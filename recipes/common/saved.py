"""A saved model, loaded as others load it."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from common.options import DataError


def load_saved(auto_class: Any, name: Any) -> PreTrainedModel:
    """What stock `auto_class.from_pretrained` makes of a folder or a name on the Hub.

    Raises DataError where weights are missing, which would be left at chance: scores would be those of no model.
    """
    model, info = auto_class.from_pretrained(name, output_loading_info=True)
    if missing := sorted(info["missing_keys"]):
        few = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise DataError(f"{name} lacks {len(missing)} weights of a {type(model).__name__}: {few}")
    return model
