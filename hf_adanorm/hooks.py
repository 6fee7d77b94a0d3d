"""The places where transformers learns about swapped norms; `install()` sets them up on `import hf_adanorm`.

1. `PreTrainedModel.post_init`, the end of every model's construction and before any weight loads: the spec in
   `config.adanorm` is applied first. So stock `from_pretrained`, `from_config`, `pipeline` and `Trainer` build the
   patched architecture.
2. `PreTrainedConfig.to_json_file`, which every way of saving a config ends in (`save_pretrained`, `push_to_hub`,
   Trainer checkpoints): config.json gets `auto_map` entries, and `modeling_adanorm.py` is written beside it, so that
   `trust_remote_code=True` works where hf_adanorm is not installed. An unpatched model takes both away again.

3. `PreTrainedModel.save_pretrained` and the upload that ends a push: the folder or the repository of a patched model
   gets a model card where it has none. A card that is there is left alone; only the empty form that transformers puts
   in its place does not count as one.
4. Two methods of `Trainer`, once it is in use: the card that it writes gets our section, and the pushes of its
   checkpoints the file of 2, as both would do without.
5. Three methods of PEFT, once it is imported: see adapters.py.

A config or model without a spec passes through unchanged. All wrappers call whatever they found in place, so they
compose with other libraries that wrap the same methods; `uninstall()` removes them.
"""

from __future__ import annotations

import copy
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from . import modeling_adanorm
from .modeling_adanorm import AdaNormSpec, apply_spec, is_own_reference

FILE_NAME = "modeling_adanorm.py"
_MARK = "_hf_adanorm_original"


def install() -> None:
    """Wrap the methods; does nothing when they are wrapped already."""
    wrap_method(PreTrainedModel, "post_init", _post_init)
    wrap_method(PreTrainedConfig, "to_json_file", _to_json_file)
    wrap_method(PreTrainedModel, "save_pretrained", _save_pretrained)
    wrap_method(PreTrainedModel, "_upload_modified_files", _upload_modified_files)
    from . import adapters

    adapters.install()


def uninstall() -> None:
    """Take the wrappers off. Where another library has wrapped on top of ours, ours becomes a plain pass-through."""
    from . import adapters

    adapters.uninstall()
    for owner, name in list(_ACTIVE):
        _ACTIVE.discard((owner, name))
        current = owner.__dict__[name]
        if hasattr(current, _MARK):
            setattr(owner, name, getattr(current, _MARK))


_ACTIVE: set[tuple[type, str]] = set()


def wrap_method(owner: type, name: str, around: Callable[..., Any]) -> None:
    """Make `owner.name(...)` call `around(original, self, ...)`, until `uninstall`; nothing if it does already."""
    if (owner, name) in _ACTIVE:
        return
    _ACTIVE.add((owner, name))
    original = getattr(owner, name)

    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (owner, name) not in _ACTIVE:
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
    if not has_spec(config):
        result = original(config, json_file_path, *args, **kw)
        _remove_own_file(path.parent)
        return result
    own = copy.deepcopy(config)  # auto_map belongs to the folder, not to the model in memory
    own.auto_map = {**(getattr(config, "auto_map", None) or {}), **_auto_map(config)}
    _write_own_file(path.parent)
    result = original(own, json_file_path, *args, **kw)
    saving = _SAVING.get()
    if saving is not None and saving.config is config:
        _write_card(path.parent, own, saving)
    _wrap_trainer()
    return result


def has_spec(config: PreTrainedConfig) -> bool:
    """Whether the config, or one nested in it, says that norms are swapped."""
    return any(getattr(part, "adanorm", None) is not None for part in all_configs(config))


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
    try:
        temporary.write_bytes(source)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _remove_own_file(folder: Path) -> None:
    target = folder / FILE_NAME
    if target.is_file() and _first_line(target) == _first_line(Path(modeling_adanorm.__file__)):  # a file of ours
        target.unlink()
        _remove_card_section(folder)


def _first_line(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.readline()


# ---------------------------------------------------------------------------------------------------- the model card


@dataclass
class _Saving:
    """A call of `model.save_pretrained` that is under way."""

    config: PreTrainedConfig
    user_card: str | None = None  # the folder's card before the call


_SAVING: ContextVar[_Saving | None] = ContextVar("hf_adanorm_saving", default=None)


def _save_pretrained(original: Callable[..., Any], model: PreTrainedModel, *args: Any, **kw: Any) -> Any:
    from .specs import refresh_specs

    refresh_specs(model)
    if not has_spec(model.config):
        return original(model, *args, **kw)
    token = _SAVING.set(_Saving(model.config))
    try:
        return original(model, *args, **kw)
    finally:
        _SAVING.reset(token)


def _write_card(folder: Path, config: PreTrainedConfig, saving: _Saving) -> None:
    """Called once config.json is written, which only the saving process does."""
    from . import hub

    path = folder / hub.CARD_NAME
    saving.user_card = hub.read_card(path)
    if saving.user_card is None:
        hub.write_text(path, hub.render_card(config.to_dict(), base_model=hub.base_model_of(config)))
    elif hub.describes(saving.user_card, config.to_dict()) is False:
        warnings.warn(
            f"the model card in {folder} describes other norms than the model that is saved there now; "
            f"hf_adanorm.write_model_card({str(folder)!r}) brings its section up to date",
            stacklevel=6,
        )


def _upload_modified_files(
    original: Callable[..., Any],
    model: PreTrainedModel,
    working_dir: str | os.PathLike[str],
    repo_id: str,
    *args: Any,
    **kw: Any,
) -> Any:
    """Just before a push, transformers has put the repository's card, or an empty form, over the folder's."""
    if has_spec(model.config):
        from . import hub

        path = Path(working_dir) / hub.CARD_NAME
        text, saving = hub.read_card(path), _SAVING.get()
        if text is not None and hub.is_placeholder(text):
            tags = hub.card_tags(text)
            if saving is not None and saving.user_card is not None and not hub.is_placeholder(saving.user_card):
                card = hub.with_tags(saving.user_card, tags)
            else:
                base = hub.base_model_of(model.config)
                config = hub.read_config(path.parent)
                card = hub.render_card(
                    config, model_id=repo_id, base_model=base if base != repo_id else None, tags=tags
                )
            hub.write_text(path, card)
    return original(model, working_dir, repo_id, *args, **kw)


def _remove_card_section(folder: Path) -> None:
    from . import hub

    path = folder / hub.CARD_NAME
    text = hub.read_card(path)
    if text is not None and (stripped := hub.without_section(text)) != text:
        hub.write_text(path, stripped)


# ------------------------------------------------------------------------------------------------------- the Trainer


def _wrap_trainer() -> None:
    """`Trainer` is not imported for our sake: by the time that it saves a patched model it is there."""
    module = sys.modules.get("transformers.trainer")
    if module is not None:
        wrap_method(module.Trainer, "create_model_card", _create_model_card)
        wrap_method(module.Trainer, "_push_from_checkpoint", _push_from_checkpoint)


def _create_model_card(original: Callable[..., Any], trainer: Any, *args: Any, **kw: Any) -> Any:
    result = original(trainer, *args, **kw)
    model = trainer.accelerator.unwrap_model(trainer.model)
    # Not for an adapter around a patched base: what it saves is no patched model.
    if trainer.is_world_process_zero() and isinstance(model, PreTrainedModel) and has_spec(model.config):
        from . import hub

        own = copy.deepcopy(model.config)
        own.auto_map = _auto_map(model.config)
        path = Path(trainer.args.output_dir) / hub.CARD_NAME
        model_id = getattr(trainer, "hub_model_id", None)
        hub.write_text(path, hub.render_card(own.to_dict(), existing=hub.read_card(path), model_id=model_id))
    return result


def _push_from_checkpoint(original: Callable[..., Any], trainer: Any, checkpoint_folder: str) -> Any:
    """It copies a list of known files from the checkpoint and uploads the folder."""
    if trainer.is_world_process_zero() and (Path(checkpoint_folder) / FILE_NAME).is_file():
        from . import hub

        output_dir = Path(trainer.args.output_dir)
        _write_own_file(output_dir)
        if not (output_dir / hub.CARD_NAME).exists():
            hub.write_text(output_dir / hub.CARD_NAME, hub.read_card(Path(checkpoint_folder) / hub.CARD_NAME) or "")
    return original(trainer, checkpoint_folder)
