"""PEFT adapters remember the norms of the base that they were trained on.

An adapter is saved without its base. If the base was patched in memory, the folder names a base with stock norms. An
adapter on that base computes something else, and no tensor is missing. So, once both PEFT and hf_adanorm are imported:

1. Attaching an adapter to a base (`get_peft_model`, `PeftModel.from_pretrained`, `load_adapter`, `model.add_adapter`)
   ties its config to that base.
2. Saving the config, which every way of saving an adapter does, puts the spec of the base's norms into
   `auto_mapping` of adapter_config.json, a free-form field of PEFT that loads everywhere. If the base that the file
   names does not have these norms, a warning says so.
3. Attaching a loaded adapter that carries a spec to a base with other norms raises, before anything is attached.
   One without a spec was trained on a stock base, or where hf_adanorm was not imported: on a base with swapped norms
   the base that it names decides, and a warning says what does not fit or cannot be known.
4. The norms that were folded are recorded and compared in the same way: an adapter trained before a fold moves the
   outputs of the folded model, and the other way round.
5. An adapter that would train gains and biases of norms which have none (LN tuning) is refused.

PEFT is never imported from here (see install.py).
"""

from __future__ import annotations

import json
import re
import warnings
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from inspect import BoundArguments
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils.hub import cached_file

from hf_adanorm.modeling_adanorm import is_swapped
from hf_adanorm.spec import AdaNormSpec

from .marks import FOLDED, folded_norms
from .spec import describes, differences, in_words, resolved_spec, spec_in_file

KEY = "adanorm"
_BASE, _LOADED = "_adanorm_base", "_adanorm_loaded"  # outside the fields that PEFT saves


class _Base:
    """The base that an adapter's config belongs to, held outside the fields that PEFT saves."""

    def __init__(self, model: nn.Module | None, spec: AdaNormSpec | None, folded: list[str]) -> None:
        self._model = None if model is None else weakref.ref(model)
        self._spec, self._folded = spec, folded

    @property
    def model(self) -> nn.Module | None:
        return None if self._model is None else self._model()

    @property
    def spec(self) -> AdaNormSpec | None:
        """Norms of the base as they are now, or as they were if the base is gone or in another process."""
        model = self.model
        return self._spec if model is None else resolved_spec(model)

    @property
    def folded(self) -> list[str]:
        """The norms that were folded when the adapter was attached. A later fold skips its layers."""
        return self._folded

    def __deepcopy__(self, memo: dict[int, Any]) -> _Base:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _Base, (None, self.spec, self.folded)


# --------------------------------------------------------------------------------------- the four places in PEFT


def inject_adapter(original: Callable[..., Any], tuner: Any, bound: BoundArguments) -> Any:
    config, model = tuner.peft_config[bound.arguments["adapter_name"]], bound.arguments["model"]
    _check_trainable(config, tuner, model)
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
    spec = base.spec
    mapping = dict(bound.kwargs.get("auto_mapping_dict") or config.auto_mapping or {})
    mapping.pop(KEY, None)
    mapping.pop(FOLDED, None)
    if base.folded:
        mapping[FOLDED] = base.folded
        if not _named_base_is_folded_so(config, base.folded):
            warnings.warn(
                "this adapter is saved without its base, which was folded in memory: on the base that it names, "
                f"{config.base_model_name_or_path!r}, it would compute something else. Save the folded base with "
                "save_pretrained and train the adapter on that",
                stacklevel=3,
            )
    if spec is not None:
        mapping[KEY] = spec.to_dict()
        if config.task_type is None and base.model is not None:  # then PEFT looks for the base's class here
            mapping.setdefault("base_model_class", type(base.model).__name__)
            mapping.setdefault("parent_library", type(base.model).__module__)
        _warn_unless_named_base_has(spec, base.model, config)
    return original(config, auto_mapping_dict=mapping or None)


def _attach(config: Any, model: nn.Module) -> None:
    mapping, spec = dict(config.auto_mapping or {}), resolved_spec(model)
    _check_fold(config, mapping.pop(FOLDED, None), folded_norms(model))
    if (data := mapping.pop(KEY, None)) is not None:
        if differing := differences(AdaNormSpec.from_dict(data), model):
            raise ValueError(
                f"this adapter was trained on a base with other norms. {in_words(differing, model)}. Load the "
                "patched base that it was trained on, or call patch_model with these settings on the stock base, "
                "before attaching it"
            )
    elif config.__dict__.pop(_LOADED, False) and spec is not None:
        _warn_unless_trained_here(config, model)
    config.auto_mapping = mapping or None  # from here on the base itself says what it has
    config.__dict__[_BASE] = _Base(model, spec, folded_norms(model))


def _check_fold(config: Any, recorded: Any, here: list[str]) -> None:
    """Raise ValueError for an adapter that was trained on a base with other folds. Warn where it keeps no record of
    any, and the base that it names has others."""
    if recorded is not None and recorded != here:
        raise ValueError(
            "this adapter was trained on a base whose norms were folded into the layers behind them "
            f"({_some(recorded)}); the norms folded here are {_some(here)}. Load the folded base that it was trained "
            "on, or fold this one in the same way before attaching the adapter"
        )
    if recorded is None and here and config.__dict__.get(_LOADED) and not _named_base_is_folded_so(config, here):
        warnings.warn(
            f"this adapter may not belong to this base, whose norms were folded ({_some(here)}): it has no record of "
            "a fold. Adapters trained before a fold change what the model computes; merge them before folding, or "
            "train them on the folded base",
            stacklevel=5,
        )


def _some(names: list[str]) -> str:
    return ", ".join(map(str, names[:2])) + (f" and {len(names) - 2} more" if len(names) > 2 else "") or "none"


def _named_base_is_folded_so(config: Any, folded: list[str]) -> bool:
    """Tell whether config.json of the base that an adapter names lists these folded norms."""
    name = config.base_model_name_or_path
    with suppress(OSError, ValueError):
        if name and (path := cached_file(name, "config.json", revision=config.revision, local_files_only=True)):
            return bool(json.loads(Path(path).read_text(encoding="utf-8")).get(FOLDED) == folded)
    return False


def _warn_unless_trained_here(config: Any, model: nn.Module) -> None:
    """Warn unless the base that an adapter without a record of norms names has the norms of `model`. Such an adapter
    was trained on a stock base, or where hf_adanorm was not imported."""
    name = config.base_model_name_or_path
    known, saved = _saved_spec(name, config.revision)
    saved = saved or AdaNormSpec()
    if known and not (differing := differences(saved, model)):
        return
    why = (
        f"its base {name!r} has other norms: {in_words(differing, model)}"
        if known
        else f"its base {name!r} cannot be read here, and it keeps no record of norms, as adapters of stock models "
        "and those trained where hf_adanorm was not imported"
    )
    warnings.warn(
        f"this adapter may not belong to this {type(model).__name__}, whose norms were swapped or folded: {why}. "
        "Adapters trained on other norms change what the model computes",
        stacklevel=5,
    )


def _check_trainable(config: Any, tuner: Any, model: nn.Module) -> None:
    """Refuse to tune gains and biases of norms that have none."""
    if config.peft_type == "LN_TUNING":
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        targets = config.target_modules or getattr(tuner, "target_module_mapping", {}).get(model_type, ())
        found, chosen = _without_parameters(targets, model)
        if chosen and len(found) == chosen:
            raise ValueError(
                f"LN tuning has nothing to tune in this {type(model).__name__}: all {chosen} norms that it would "
                f"train ({', '.join(found[:2])}, ...) were swapped for norms without gain and bias. Tune the stock "
                "model and patch it afterwards, or use another method, such as LoRA"
            )
    else:
        found, _ = _without_parameters(config.__dict__.get("modules_to_save") or (), model)
    if found:
        warnings.warn(
            f"{len(found)} of the norms that this adapter is to train were swapped ({', '.join(found[:2])}, ...): "
            "they have no gain and bias to tune",
            stacklevel=4,
        )


def _without_parameters(targets: str | Iterable[str], model: nn.Module) -> tuple[list[str], int]:
    """Return which modules that PEFT's `targets` mean are swapped norms without parameters, and how many modules they
    mean."""
    endings = () if isinstance(targets, str) else tuple(f".{target}" for target in targets)
    matching = [
        (name, module)
        for name, module in model.named_modules()
        if (re.fullmatch(targets, name) if isinstance(targets, str) else f".{name}".endswith(endings))
    ]
    found = [name for name, module in matching if is_swapped(module) and not any(True for _ in module.parameters())]
    return found, len(matching)


def _warn_unless_named_base_has(spec: AdaNormSpec, model: nn.Module | None, config: Any) -> None:
    name = config.base_model_name_or_path
    _, saved = _saved_spec(name, config.revision)
    if saved is not None and (saved == spec if model is None else describes(saved, model)):
        return
    warnings.warn(
        "this adapter is saved without its base, whose norms were swapped in memory: "
        + (f"the base that it names, {name!r}, does not have these norms" if name else "it names no base")
        + ". Save the patched base with save_pretrained, load it from there and train the adapter on that. Where "
        "hf_adanorm is not imported, nothing will stop this adapter from running on stock norms",
        stacklevel=4,
    )


def _saved_spec(name: str | None, revision: str | None) -> tuple[bool, AdaNormSpec | None]:
    """Return whether config.json of the base that an adapter names (a folder, or a repository in the local cache) can
    be read, and the spec in it."""
    with suppress(OSError):  # not there: then it cannot be vouched for
        if name and (path := cached_file(name, "config.json", revision=revision, local_files_only=True)):
            return spec_in_file(Path(path))
    return False, None
