"""PEFT adapters remember the norms of the base that they were trained on.

An adapter is saved without its base. If the base was patched in memory, the folder names a base with stock norms:
loading would put the adapter on a model that computes something else, and no tensor would be missing. So, once both
PEFT and hf_adanorm are imported, in whatever order:

1. Attaching an adapter to a base (`get_peft_model`, `PeftModel.from_pretrained`, `load_adapter`, `model.add_adapter`)
   ties its config to that base.
2. Saving the config, which every way of saving an adapter does, puts the spec of the base's norms into
   `auto_mapping` of adapter_config.json, a free-form field of PEFT that loads everywhere. If the base that the file
   names does not have these norms, a warning says so.
3. Attaching a loaded adapter that carries a spec to a base with other norms raises, before anything is attached.

PEFT is never imported from here: a finder on `sys.meta_path` waits for it and leaves once it has come.
"""

from __future__ import annotations

import importlib.abc
import json
import sys
import warnings
import weakref
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from inspect import BoundArguments
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils.hub import cached_file

from hf_adanorm.modeling_adanorm import AdaNormSpec

from .spec import describes, resolved_spec
from .wrapping import wrap_method

KEY = "adanorm"
_BASE = "_adanorm_base"


class _Base:
    """The base that an adapter's config belongs to, held outside the fields that PEFT saves."""

    def __init__(self, model: nn.Module | None, spec: AdaNormSpec | None) -> None:
        self._model = None if model is None else weakref.ref(model)
        self._spec = spec

    @property
    def model(self) -> nn.Module | None:
        return None if self._model is None else self._model()

    @property
    def spec(self) -> AdaNormSpec | None:
        """As the base is now; if it is gone, or in another process, as it was."""
        model = self.model
        return self._spec if model is None else resolved_spec(model)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Base:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _Base, (None, self.spec)


# --------------------------------------------------------------------------------------- the three places in PEFT


def _inject_adapter(original: Callable[..., Any], tuner: Any, bound: BoundArguments) -> Any:
    _attach(tuner.peft_config[bound.arguments["adapter_name"]], bound.arguments["model"])
    return original(tuner)


def _add_adapter(original: Callable[..., Any], peft_model: Any, bound: BoundArguments) -> Any:
    config = bound.arguments["peft_config"]
    if config.is_prompt_learning:  # those inject nothing
        _attach(config, peft_model.base_model)
    return original(peft_model)


def _save_config(original: Callable[..., Any], config: Any, bound: BoundArguments) -> Any:
    base = config.__dict__.get(_BASE)
    if base is None:
        return original(config)
    spec = base.spec
    mapping = dict(bound.kwargs.get("auto_mapping_dict") or config.auto_mapping or {})
    mapping.pop(KEY, None)
    if spec is not None:
        mapping[KEY] = spec.to_dict()
        if config.task_type is None and base.model is not None:  # then PEFT looks for the base's class here
            mapping.setdefault("base_model_class", type(base.model).__name__)
            mapping.setdefault("parent_library", type(base.model).__module__)
        _warn_unless_named_base_has(spec, base.model, config)
    return original(config, auto_mapping_dict=mapping or None)


def _attach(config: Any, model: nn.Module) -> None:
    mapping = dict(config.auto_mapping or {})
    if (data := mapping.pop(KEY, None)) is not None:
        wanted = AdaNormSpec.from_dict(data)
        if not describes(wanted, model):
            raise ValueError(
                f"this adapter was trained on a base with other norms. It needs {_in_words(wanted)}; this "
                f"{type(model).__name__} has {_in_words(resolved_spec(model))}. Load the patched base that it was "
                "trained on, or call patch_model with these settings on the stock base, before attaching it"
            )
        config.auto_mapping = mapping or None  # from here on the base itself says what it has
    config.__dict__[_BASE] = _Base(model, resolved_spec(model))


def _in_words(spec: AdaNormSpec | None) -> str:
    if spec is None:
        return "its stock norms"
    parts = []
    for group in spec.groups:
        settings = {key: value for key, value in group.to_dict().items() if key not in ("norm", "modules")}
        listed = ", ".join([group.norm, *(f"{key}={value}" for key, value in settings.items())])
        more = f" and {len(group.modules) - 2} more" if len(group.modules) > 2 else ""
        parts.append(f"{listed} at {', '.join(group.modules[:2])}{more}")
    return "; ".join(parts) or "its stock norms, with biases or eps changed by a fold"


def _warn_unless_named_base_has(spec: AdaNormSpec, model: nn.Module | None, config: Any) -> None:
    name = config.base_model_name_or_path
    saved = _saved_spec(name, config.revision)
    if saved is not None and (saved == spec if model is None else describes(saved, model)):
        return
    warnings.warn(
        "this adapter is saved without its base, whose norms were swapped in memory: "
        + (f"the base that it names, {name!r}, does not have these norms" if name else "it names no base")
        + ". Save the patched base with save_pretrained, load it from there and train the adapter on that. Where "
        "hf_adanorm is not imported, nothing will stop this adapter from running on stock norms",
        stacklevel=4,
    )


def _saved_spec(name: str | None, revision: str | None) -> AdaNormSpec | None:
    """The spec in config.json of the base that an adapter names, a folder or a repository in the local cache."""
    if not name:
        return None
    try:
        path = cached_file(name, "config.json", revision=revision, local_files_only=True)
        data = json.loads(Path(path).read_text(encoding="utf-8")).get("adanorm") if path else None
        return None if data is None else AdaNormSpec.from_dict(data)
    except (OSError, ValueError, TypeError):  # not there, or not readable: then it cannot be vouched for
        return None


# ------------------------------------------------------------------------------------------- waiting for the import


def install() -> None:
    """Wrap PEFT's methods now, or as soon as it is imported."""
    if hasattr(sys.modules.get("peft"), "PeftModel"):
        _wrap_peft()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def uninstall() -> None:
    """Stop waiting; what is wrapped already, `hooks.uninstall` unwraps."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]


def _wrap_peft() -> None:
    from peft import PeftModel
    from peft.config import PeftConfigMixin
    from peft.tuners.tuners_utils import BaseTuner

    wrap_method(BaseTuner, "inject_adapter", _inject_adapter, "model", "adapter_name")
    wrap_method(PeftModel, "add_adapter", _add_adapter, "peft_config")
    wrap_method(PeftConfigMixin, "save_pretrained", _save_config, "kwargs")


class _Finder(importlib.abc.MetaPathFinder):
    """Finds `peft` as the others do, and calls `_wrap_peft` once its module has run."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != "peft":
            return None
        finders = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in finders)), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                waiting = self in sys.meta_path
                uninstall()
                if waiting:
                    _wrap_peft()

            loader.exec_module = exec_module
        return spec
