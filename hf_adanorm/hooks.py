"""The two places where transformers learns about swapped norms; `install()` sets them up on `import hf_adanorm`.

1. `PreTrainedModel.post_init`, the end of every model's construction and before any weight loads: the spec in
   `config.adanorm` is applied first. So stock `from_pretrained`, `from_config`, `pipeline` and `Trainer` build the
   patched architecture.
2. `PreTrainedConfig.to_json_file`, which every way of saving a config ends in (`save_pretrained`, `push_to_hub`,
   Trainer checkpoints): config.json gets `auto_map` entries, and `modeling_adanorm.py` is written beside it, so that
   `trust_remote_code=True` works where hf_adanorm is not installed. An unpatched model takes both away again.

A config or model without a spec passes through unchanged. Both wrappers call whatever they found in place, so they
compose with other libraries that wrap the same methods; `uninstall()` removes them.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from . import modeling_adanorm
from .modeling_adanorm import AdaNormSpec, apply_spec, is_own_reference

FILE_NAME = "modeling_adanorm.py"
_MARK = "_hf_adanorm_original"


def install() -> None:
    """Wrap the two methods; does nothing when they are wrapped already."""
    _wrap(PreTrainedModel, "post_init", _post_init)
    _wrap(PreTrainedConfig, "to_json_file", _to_json_file)


def uninstall() -> None:
    """Take the wrappers off. Where another library has wrapped on top of ours, ours becomes a plain pass-through."""
    for owner, name in ((PreTrainedModel, "post_init"), (PreTrainedConfig, "to_json_file")):
        _ACTIVE.discard(name)
        current = owner.__dict__[name]
        if hasattr(current, _MARK):
            setattr(owner, name, getattr(current, _MARK))


_ACTIVE: set[str] = set()


def _wrap(owner: type, name: str, around: Callable[..., Any]) -> None:
    if name in _ACTIVE:
        return
    _ACTIVE.add(name)
    original = getattr(owner, name)

    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if name not in _ACTIVE:
            return original(self, *args, **kwargs)
        return around(original, self, *args, **kwargs)

    for key in ("__module__", "__name__", "__qualname__", "__doc__"):
        setattr(wrapper, key, getattr(original, key))
    wrapper.__wrapped__ = original  # type: ignore[attr-defined]
    setattr(wrapper, _MARK, original)
    setattr(owner, name, wrapper)


def _post_init(original: Callable[..., Any], model: PreTrainedModel) -> Any:
    if (data := getattr(model.config, "adanorm", None)) is not None:
        apply_spec(model, AdaNormSpec.from_dict(data))
    return original(model)


def _to_json_file(
    original: Callable[..., Any],
    config: PreTrainedConfig,
    json_file_path: str | os.PathLike[str],
    *args: Any,
    **kw: Any,
) -> Any:
    path = Path(json_file_path)
    if not any(getattr(part, "adanorm", None) is not None for part in all_configs(config)):
        result = original(config, json_file_path, *args, **kw)
        _remove_own_file(path.parent)
        return result
    config = copy.deepcopy(config)  # auto_map belongs to the folder, not to the model in memory
    config.auto_map = {**(getattr(config, "auto_map", None) or {}), **_auto_map(config)}
    _write_own_file(path.parent)
    return original(config, json_file_path, *args, **kw)


def all_configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """`config` and every config nested in it (encoder and decoder, text and vision, ...)."""
    seen: set[int] = set()
    waiting = [config]
    while waiting:
        current = waiting.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        waiting.extend(value for value in vars(current).values() if isinstance(value, PreTrainedConfig))


def _auto_map(config: PreTrainedConfig) -> dict[str, str]:
    """One entry for every Auto class that knows this config. Entries that point elsewhere are left alone, and so are
    configs from outside transformers: such models need the package to load."""
    if not type(config).__module__.startswith("transformers."):
        return {}
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    present = getattr(config, "auto_map", None) or {}
    entries = {}
    for auto_class in vars(modeling_auto).values():
        mapping = getattr(auto_class, "_model_mapping", None)
        if not (isinstance(auto_class, type) and issubclass(auto_class, _BaseAutoModelClass)) or mapping is None:
            continue
        model_type = mapping._reverse_config_mapping.get(type(config).__name__)
        names = mapping._model_mapping.get(model_type)
        if not names or not _is_free(present.get(auto_class.__name__)):
            continue
        names = names if isinstance(names, (tuple, list)) else (names,)
        architectures = config.architectures or ()
        name = next((name for name in names if name in architectures), names[0])
        entries[auto_class.__name__] = f"{modeling_adanorm.__name__.rpartition('.')[2]}.{name}"
    return entries


def _is_free(reference: Any) -> bool:
    return reference is None or (isinstance(reference, str) and is_own_reference(reference))


def _write_own_file(folder: Path) -> None:
    source = Path(modeling_adanorm.__file__).read_bytes()
    target = folder / FILE_NAME
    temporary = folder / f".{FILE_NAME}.{os.getpid()}.tmp"
    temporary.write_bytes(source)
    os.replace(temporary, target)


def _remove_own_file(folder: Path) -> None:
    target = folder / FILE_NAME
    if target.is_file() and _first_line(target) == _first_line(Path(modeling_adanorm.__file__)):  # a file of ours
        target.unlink()


def _first_line(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.readline()
