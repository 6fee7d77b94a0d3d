"""Mark a folded model in its config, for adapters and for engines that load models without norm weights.

`config.folded_norms` lists the norms whose gains and biases are now in other layers, by their names in the base model.
`config.flashnorm_folded` is the mark of FlashNorm (arXiv:2407.09577): engines that know it skip the norms' weights. It
is set only where that changes nothing, and removed when a model with trained weights is saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn
from transformers import PreTrainedModel

from .spec import plain_modules

FOLDED, WEIGHTLESS = "folded_norms", "flashnorm_folded"
WEIGHTLESS_TAG = "weightless-rmsnorm"
"""The Hub's tag for such models."""


def mark_folded(model: nn.Module, names: Iterable[str], *, weightless: bool) -> None:
    """Note in the config of `model`, and of every model in it that has a config of its own, which norms were folded.

    Args:
        model: whose configs are its own.
        names: folded norms, by their names in `model.named_modules()`.
        weightless: every norm of the model as wide as its hidden states is an RMSNorm with weight 1 and no bias.
    """
    folded = {id(module) for name, module in model.named_modules() if name in set(names)}
    if not folded:
        return
    seen = set()
    for part in model.modules():  # parents come first: a config belongs to the outermost model that has it
        if not isinstance(part, PreTrainedModel) or id(part.config) in seen:
            continue
        seen.add(id(part.config))
        mine = [name for name, module in _base_names(part) if id(module) in folded]
        if mine:
            setattr(part.config, FOLDED, sorted({*folded_norms(part), *mine}))
            if weightless:
                setattr(part.config, WEIGHTLESS, True)


def folded_norms(model: nn.Module) -> list[str]:
    """Return the names, in the base model, of norms that were folded, as the model's config says."""
    config = getattr(model, "config", None)
    found = getattr(config, FOLDED, None)
    return [str(name) for name in found] if isinstance(found, list) else []


def refresh_marks(model: PreTrainedModel) -> None:
    """Take the mark of models without norm weights away where these weights were trained or loaded since the fold."""
    if not getattr(model.config, WEIGHTLESS, False):
        return
    names = set(folded_norms(model))
    for name, module in _base_names(model):
        weight = module._parameters.get("weight")
        if name in names and weight is not None and not weight.is_meta and not bool((weight == 1).all()):
            del model.config.__dict__[WEIGHTLESS]
            return


def _base_names(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Yield modules with their names in the base model, which are the same whatever head it has."""
    prefix = f"{model.base_model_prefix}."
    for name, module in plain_modules(model):
        yield name.removeprefix(prefix), module
