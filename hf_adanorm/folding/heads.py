"""Untie output layers from the embedding whose weight they share, so that the norm before them can fold.

`config.tie_word_embeddings` becomes False if the model ties nothing but the head, and if the config class saves it.
Elsewhere (T5 and BART tie their embeddings to each other) transformers finds two different tensors in the checkpoint
on loading, and leaves them untied.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_adanorm.saving import own_configs

Heads = dict[str, dict[str, nn.Parameter]]


def untie_heads(model: nn.Module) -> Heads:
    """Give every head its own copy of the parameters that it shares. Return the shared ones by the head's name."""
    found: Heads = {}
    for _, head in _heads(model):
        name = next(name for name, module in model.named_modules() if module is head)
        others = {id(p) for module in model.modules() if module is not head for p in module.parameters(recurse=False)}
        for key, parameter in head.named_parameters(recurse=False):
            if id(parameter) in others:
                found.setdefault(name, {})[key] = parameter
                copy = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
                head._parameters[key] = copy
    return found


def settle_heads(model: nn.Module, heads: Heads, untied: Collection[str]) -> dict[str, int]:
    """Tie all heads except `untied` again, and record that those have their own weight. Return the number of
    parameters that each adds."""
    modules = dict(model.named_modules())
    for name in set(heads) - set(untied):
        modules[name]._parameters.update(heads[name])
    added = {name: sum(p.numel() for p in heads[name].values()) for name in heads if name in untied}
    if not added:
        return {}
    own_configs(model)
    parameters = {f"{name}.{key}" for name in added for key in heads[name]}
    for prefix, part in modules.items():
        if not isinstance(part, PreTrainedModel):
            continue
        here = {name.removeprefix(prefix).lstrip(".") for name in parameters if name.startswith(prefix)}
        part.all_tied_weights_keys = {k: v for k, v in part.all_tied_weights_keys.items() if k not in here}
        if isinstance(part._tied_weights_keys, Mapping):
            part._tied_weights_keys = {
                key: value
                for key, value in part._tied_weights_keys.items()
                if not any(re.fullmatch(rf"{key}(\..*)?", name) for name in here)
            }
    for part, head in _heads(model):
        config = part.config
        if any(modules[name] is head for name in added) and not part.get_expanded_tied_weights_keys(
            all_submodels=True
        ):
            config.tie_word_embeddings = False
            if type(config).from_dict(config.to_dict()).tie_word_embeddings is not False:
                config.tie_word_embeddings = True
    return added


def _heads(model: nn.Module) -> Iterator[tuple[PreTrainedModel, nn.Module]]:
    """Return the output layers of the model and of the models in it, each with the innermost model around it."""
    found: dict[int, tuple[PreTrainedModel, nn.Module]] = {}
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            head = None
            with contextlib.suppress(AttributeError, NotImplementedError):
                head = part.get_output_embeddings()  # type: ignore[no-untyped-call]
            if isinstance(head, nn.Module) and isinstance(getattr(head, "weight", None), torch.Tensor):
                found[id(head)] = (part, head)
    return iter(found.values())
