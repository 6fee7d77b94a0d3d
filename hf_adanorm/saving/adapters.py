"""PEFT adapters record the norms of the base that they were trained on.

An adapter is saved without its base. On a base with other norms it computes something else, and no tensor is missing.
So, once both PEFT and hf_adanorm are imported:

1. Attaching an adapter to a base (`get_peft_model`, `PeftModel.from_pretrained`, `load_adapter`, `model.add_adapter`)
   ties its config to that base.
2. Saving the config, which every way of saving an adapter does, records the base's spec and folded norms in
   `auto_mapping` of adapter_config.json, a free-form field of PEFT that loads everywhere. It warns if the base that
   the file names does not have these norms.
3. Attaching a loaded adapter to a base that differs from its record raises, before anything is attached. One without
   a record warns on swapped or folded norms, unless the base that it names has them as well.

PEFT is never imported from here (see install.py).
"""

from __future__ import annotations

import json
import warnings
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from inspect import BoundArguments
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils.hub import cached_file

from hf_adanorm.modeling_adanorm import check, is_name
from hf_adanorm.spec import AdaNormSpec

from .marks import FOLDED, folded_norms
from .spec import Differences, differences, in_words, resolved_spec, swapped_norms

KEY = "adanorm"
_BASE, _LOADED = "_adanorm_base", "_adanorm_loaded"  # outside the fields that PEFT saves


class _Base:
    """The base that an adapter's config belongs to. A copy or pickle of it has only the record."""

    def __init__(self, model: nn.Module | None, record: dict[str, Any]) -> None:
        self.model = (lambda: None) if model is None else weakref.ref(model)
        self._record = record

    def record(self) -> dict[str, Any]:
        """Return the record of the base as it is now, or as it was when this was copied or the base deleted."""
        model = self.model()
        return self._record if model is None else _record_of(model)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Base, (None, self.record())


# --------------------------------------------------------------------------------------- the four places in PEFT


def inject_adapter(original: Callable[..., Any], tuner: Any, bound: BoundArguments) -> Any:
    config, model = tuner.peft_config[bound.arguments["adapter_name"]], bound.arguments["model"]
    bare = [name for name, norm in swapped_norms(model) if not any(True for _ in norm.parameters())]
    if config.peft_type == "LN_TUNING" and bare:
        warnings.warn(
            f"{len(bare)} swapped norms of this {type(model).__name__} have no gain and bias to tune "
            f"({bare[0]}, ...): use another method, such as LoRA",
            stacklevel=4,
        )
    _attach(config, model)
    return original(tuner)


def add_adapter(original: Callable[..., Any], peft_model: Any, bound: BoundArguments) -> Any:
    config = bound.arguments["peft_config"]
    if config.is_prompt_learning:  # those inject nothing
        _attach(config, peft_model.base_model)
    return original(peft_model)


def load_config(original: Callable[..., Any], config_class: Any, bound: BoundArguments) -> Any:
    config = original(config_class)
    config.__dict__[_LOADED] = True
    return config


def save_config(original: Callable[..., Any], config: Any, bound: BoundArguments) -> Any:
    base = config.__dict__.get(_BASE)
    if base is None:
        return original(config)
    model, record = base.model(), base.record()
    mapping = {**(bound.kwargs.get("auto_mapping_dict") or config.auto_mapping or {}), **record}
    if record and model is not None:
        if config.task_type is None:  # then PEFT looks for the base's class here
            mapping = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__, **mapping}
        if not _named_base_has_norms_of(model, config):
            warnings.warn(
                "this adapter is saved without its base, and the base that it names, "
                f"{config.base_model_name_or_path!r}, does not have these swapped or folded norms: save the base with "
                "save_pretrained, load it from there, and train the adapter on that",
                stacklevel=5,
            )
    return original(config, auto_mapping_dict=mapping or None)


# ----------------------------------------------------------------------------------------------------- the record


def _record_of(model: nn.Module) -> dict[str, Any]:
    """Return what an adapter records of its base, {} for a stock model. Its config.json has the same keys."""
    spec, folded = resolved_spec(model), folded_norms(model)
    return {**({KEY: spec.to_dict()} if spec else {}), **({FOLDED: folded} if folded else {})}


def _attach(config: Any, model: nn.Module) -> None:
    """Link an adapter's config to its base.

    Raise ValueError if the base differs from the adapter's record. Warn if a loaded adapter has no record and may
    belong to another base.
    """
    mapping = dict(config.auto_mapping or {})
    record = {key: mapping.pop(key) for key in (KEY, FOLDED) if key in mapping}
    if record and (differing := _differences(record, model)):
        raise ValueError(
            f"this adapter was trained on a base with other norms: {in_words(differing, model)}. Load the base that "
            "it was trained on, or patch or fold this one in the same way, before attaching it"
        )
    now, was_loaded = _record_of(model), config.__dict__.pop(_LOADED, False)
    if now and not record and was_loaded and not _named_base_has_norms_of(model, config):
        warnings.warn(
            f"this adapter may not belong to this {type(model).__name__}, whose norms were swapped or folded: it has "
            f"no record of norms, and its base {config.base_model_name_or_path!r} has other norms or cannot be "
            "read: attach it to the base that it was trained on",
            stacklevel=5,
        )
    config.auto_mapping = mapping or None  # saving writes a new record
    config.__dict__[_BASE] = _Base(model, now)


def _differences(record: Mapping[str, Any], model: nn.Module) -> Differences:
    """Return how `model` differs from a base with this record, which a stranger may have written."""
    spec = AdaNormSpec() if record.get(KEY) is None else AdaNormSpec.from_dict(record[KEY])
    recorded, here = record.get(FOLDED) or [], folded_norms(model)
    check(isinstance(recorded, list) and all(map(is_name, recorded)), "folded_norms must be a list of names", recorded)
    changed = sorted({*recorded} ^ {*here})
    folds = {name: ({"folded": name in recorded}, {"folded": name in here}) for name in changed}
    return {**differences(spec, model), **folds}


def _named_base_has_norms_of(model: nn.Module, config: Any) -> bool:
    """Tell whether the base that an adapter names, a folder or a repository in the local cache, has the norms of
    `model`."""
    with suppress(OSError, ValueError, TypeError, AttributeError):  # not there, or no config: it cannot be vouched for
        name, revision = config.base_model_name_or_path, config.revision
        path: Any = name and cached_file(name, "config.json", revision=revision, local_files_only=True)
        return not _differences(json.loads(Path(path).read_text(encoding="utf-8")), model)
    return False
