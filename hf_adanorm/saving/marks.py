"""List the folded norms of a model in its config: `folded_norms`, by their names in the base model.

Adapters compare this list with that of the base that they were trained on (adapters.py).
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel

from .spec import plain_modules

FOLDED = "folded_norms"


def mark_folded(model: nn.Module, names: Iterable[str]) -> None:
    """List folded norms in the config of `model`, and of every model in it that has a config of its own.

    Args:
        model: whose configs are its own.
        names: folded norms, by their names in `model.named_modules()`.
    """
    folded = {id(module) for name, module in model.named_modules() if name in set(names)}
    seen = set()
    for part in model.modules():  # parents come first: a config belongs to the outermost model that has it
        if not isinstance(part, PreTrainedModel) or id(part.config) in seen:
            continue
        seen.add(id(part.config))
        prefix = f"{part.base_model_prefix}."  # left out: names are the same whatever head the model has
        mine = [name.removeprefix(prefix) for name, module in plain_modules(part) if id(module) in folded]
        if mine:
            setattr(part.config, FOLDED, sorted({*folded_norms(part), *mine}))


def folded_norms(model: nn.Module) -> list[str]:
    """Return the names, in the base model, of norms that were folded, as the model's config says."""
    found = getattr(getattr(model, "config", None), FOLDED, None)
    return [str(name) for name in found] if isinstance(found, list) else []
