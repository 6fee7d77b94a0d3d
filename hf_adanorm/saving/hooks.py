"""The places where transformers learns about swapped norms; `import hf_adanorm` sets them up (install.py).

1. `PreTrainedModel.post_init`, the end of every model's construction and before any weight loads: the spec in
   `config.adanorm` is applied first. So stock `from_pretrained`, `from_config`, `pipeline` and `Trainer` build the
   patched architecture.
2. `PreTrainedConfig.to_json_file`, which writes every config.json: it gets `auto_map` entries, and
   `modeling_adanorm.py` is written beside it. So `trust_remote_code=True` works without hf_adanorm. Saving an
   unpatched model removes both.
3. `PreTrainedModel.save_pretrained` and the upload that ends a push: a patched model without a model card gets one.
   An existing card stays unchanged, except for a section that describes other norms.
4. Methods of `Trainer`, once it is imported. The card that it writes gets the section, and the pushes of checkpoints
   the files of 2. Resuming from a checkpoint with other norms warns.
5. Four methods of PEFT, once it is imported: see adapters.py.

A config or model without a spec passes through unchanged; `uninstall()` removes the wrappers (see saving/wrapping.py).
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from inspect import BoundArguments
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.utils import CONFIG_NAME

from hf_adanorm import modeling_adanorm
from hf_adanorm.holder import held
from hf_adanorm.modeling_adanorm import NOTICE, apply_spec, is_swapped, notice_hook
from hf_adanorm.norms import classes_from_folder, find_classes
from hf_adanorm.norms import remember as remember_class
from hf_adanorm.replaced import remember
from hf_adanorm.spec import AdaNormSpec

from . import card, travel
from .files import write_file
from .marks import folded_norms
from .spec import all_configs, differences, has_spec, in_words, refresh_specs, refuse_loose_norms, spec_in_file
from .travel import own_file


def post_init(original: Callable[..., Any], model: PreTrainedModel, bound: BoundArguments) -> Any:
    if (data := getattr(model.config, "adanorm", None)) is not None:
        classes = find_classes(AdaNormSpec.from_dict(data).classes)
        for cls in classes.values():
            remember_class(cls)
        apply_spec(model, data, held(classes), replaced=remember)
    return original(model)


def serve(format: int, stock: type[PreTrainedModel], others: Mapping[str, Any]) -> dict[str, Any] | None:  # noqa: A002
    """Return the methods of a model class in the code of a saved model, which hands over to the stock class, as the
    hooks of this package apply the spec. Return None for a later format. `others` is what `holder.held` returned."""
    if format > modeling_adanorm.FORMAT:
        return None
    classes = {name: build.args[0] for name, build in others.items()}

    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        with classes_from_folder(classes):
            return stock.from_pretrained(*args, **kwargs)

    def _from_config(cls: type, *args: Any, **kwargs: Any) -> Any:
        with classes_from_folder(classes):
            return stock._from_config(*args, **kwargs)  # type: ignore[no-untyped-call]

    def register_for_auto_class(cls: type, auto_class: Any = "AutoModel") -> None:
        """Do nothing: it would make transformers take the class for foreign code."""

    methods = (from_pretrained, _from_config, register_for_auto_class)
    return {method.__name__: classmethod(method) for method in methods}


def to_json_file(original: Callable[..., Any], config: PreTrainedConfig, bound: BoundArguments) -> Any:
    """Write config.json. Beside that of a patched model write the code that loads it; beside another remove ours."""
    path, saving = Path(bound.arguments["json_file_path"]), _SAVING.get()
    if not has_spec(config):
        result = original(config)
        if path.name == CONFIG_NAME:
            with _in_second_place(path.parent):
                if travel.remove_code(path.parent):
                    card.renew_card(path.parent, {})
        return result
    classes = _classes_of(config)
    own = copy.deepcopy(config)  # auto_map belongs to the folder, not to the model in memory
    with _in_second_place(path.parent):
        module = travel.write_code(path.parent, classes)
        own.auto_map = {**(getattr(config, "auto_map", None) or {}), **_auto_map(config, module)}
    result = original(own)
    if saving is not None and saving.config is config:
        saving.saved = own
        with suppress(OSError, ValueError):  # said when the card's turn comes
            saving.user_card = card.read_card(path.parent / card.CARD_NAME)
    return result


def _classes_of(config: PreTrainedConfig) -> dict[str, type]:
    """Return the author's norms that the config and those nested in it name. Raise ValueError if one cannot travel."""
    specs = [AdaNormSpec.from_dict(data) for part in all_configs(config) if (data := getattr(part, "adanorm", None))]
    return travel.check_classes({name: entry for spec in specs for name, entry in spec.classes.items()})


def _auto_map(config: PreTrainedConfig, module: str) -> dict[str, str]:
    """Return one entry for every Auto class that knows this config, except for entries that point elsewhere. A config
    from outside transformers gets none: such models need the package to load."""
    if not type(config).__module__.startswith("transformers."):
        return {}
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
        entries[auto_class.__name__] = f"{module}.{name}"
    return entries


def _is_free(reference: Any) -> bool:
    return reference is None or bool(own_file(reference))


# ---------------------------------------------------------------------------------------------------- the model card


@dataclass
class _Saving:
    """A call of `model.save_pretrained` that is under way."""

    config: PreTrainedConfig
    saved: PreTrainedConfig | None = None  # what config.json holds, once this process has written it
    user_card: str | None = None  # the folder's card before the call
    notes: list[str] = field(default_factory=list)  # what went wrong without stopping it


_SAVING: ContextVar[_Saving | None] = ContextVar("hf_adanorm_saving", default=None)


@contextmanager
def _in_second_place(folder: Path) -> Iterator[None]:
    """Turn an error inside the block into a warning, given once the weights are written: it must not stop a save."""
    try:
        yield
    except Exception as error:
        why = str(error) or type(error).__name__
        note = f"what hf_adanorm adds to {folder} is not complete, all else is saved: {why}"
        if (saving := _SAVING.get()) is not None:
            saving.notes.append(note)
        else:
            warnings.warn(note, stacklevel=6)


def save_pretrained(original: Callable[..., Any], model: PreTrainedModel, bound: BoundArguments) -> Any:
    folder, saving = Path(bound.arguments["save_directory"]), _Saving(model.config)
    token = _SAVING.set(saving)
    try:
        refuse_loose_norms(model)
        with _in_second_place(folder):
            refresh_specs(model)
            saving.config = model.config
        if has_spec(model.config):
            _classes_of(model.config)
        if folded_norms(model) and not getattr(model.config, "tie_word_embeddings", True):
            _separate_shared(model)
        if (state_dict := bound.arguments.get("state_dict")) is not None:
            bound.arguments["state_dict"] = state_dict = dict(state_dict)
            notice_hook(model, state_dict)
        with _noticed(model) if has_spec(model.config) else nullcontext():
            result = original(model)
        if saving.saved is not None:
            with _in_second_place(folder):
                _keep_out_of_the_index(folder)
                config = saving.saved
                card.renew_card(folder, config.to_dict(), base_model=card.base_model_of(config))
    finally:
        _SAVING.reset(token)
    for note in saving.notes:
        warnings.warn(note, stacklevel=3)
    return result


@contextmanager
def _noticed(model: PreTrainedModel) -> Iterator[None]:
    """While `model` is being saved, its state dict has the notice."""
    hook = model.register_state_dict_post_hook(notice_hook)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        hook.remove()


def adjust_missing_and_unexpected_keys(original: Callable[..., Any], model: Any, bound: BoundArguments) -> Any:
    """Refuse the weights of a patched model for a model without swapped norms. transformers would name shapes, and the
    notice in the checkpoint would ask for the package, which is imported."""
    # A model that was saved without the package has its settings in the config alone.
    settings = {f"{name}._extra_state" for name, module in model.named_modules() if is_swapped(module)}
    info = bound.arguments.get("loading_info")
    if info is None:  # transformers 5.0 passes sets of keys, and returns them
        missing, unexpected = original(model)
        return missing - settings, unexpected
    noticed = any(key.endswith(NOTICE) for key in info.unexpected_keys)
    if noticed and info.mismatched_keys and not any(is_swapped(module) for module in model.modules()):
        for keys in (info.missing_keys, info.unexpected_keys, info.mismatched_keys):
            keys.clear()  # or transformers' report of them follows, with an error of its own
        raise ValueError(
            f"the checkpoint has swapped norms, but the config given for this {type(model).__name__} has none: leave "
            "out the argument config, or load the config from the folder of the checkpoint"
        )
    info.missing_keys -= settings
    return original(model)


def _separate_shared(model: PreTrainedModel) -> None:
    """Give parameters that share memory, and that the config does not tie, memory of their own. Resizing embeddings
    shares the head's biases again after a fold has untied the head; transformers refuses to save that."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    seen: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, key = name.rpartition(".")
        first = seen.setdefault(id(parameter), name)
        if first != name and name not in tied and first not in tied:
            clone = parameter.detach().clone().requires_grad_(parameter.requires_grad)
            setattr(model.get_submodule(owner), key, nn.Parameter(clone, requires_grad=parameter.requires_grad))


def load_state_dict(original: Callable[..., Any], file: Any, bound: BoundArguments) -> Any:
    """Read a file for accelerate without what it cannot put into a module: the notice, and the settings of swapped
    norms, which the config has as well."""
    state_dict = original(file)
    ours = {f"{key.removesuffix('.weight')}._extra_state" for key, value in state_dict.items() if value.numel() == 1}
    for key in [key for key in state_dict if key.endswith(NOTICE) or key in ours]:
        del state_dict[key]  # deleted in place: what torch.load returns also has the versions of the modules
    return state_dict


def _keep_out_of_the_index(folder: Path) -> None:
    """Remove the notice from the index of a sharded checkpoint: some loaders compare it with the keys of the model.
    The notice itself is read from the shard."""
    for path in folder.glob("*.index.json"):
        index = json.loads(path.read_text(encoding="utf-8"))
        kept = {key: shard for key, shard in index["weight_map"].items() if not key.endswith(NOTICE)}
        if kept != index["weight_map"]:
            write_file(path, json.dumps({**index, "weight_map": kept}, indent=2, sort_keys=True) + "\n")


def upload_modified_files(original: Callable[..., Any], model: PreTrainedModel, bound: BoundArguments) -> Any:
    """Renew the card before a push: transformers has just replaced the folder's by that of the repository, or by an
    empty form."""
    folder, saving, repo_id = Path(bound.arguments["working_dir"]), _SAVING.get(), bound.arguments["repo_id"]
    path = folder / card.CARD_NAME
    with _in_second_place(folder):
        if has_spec(model.config):
            _keep_out_of_the_index(folder)
        if (folder / CONFIG_NAME).is_file() and (text := card.read_card(path)) is not None:  # not an adapter alone
            if card.is_form(text) and saving is not None and saving.user_card is not None:
                write_file(path, card.with_tags_of(text, saving.user_card))
            base = card.base_model_of(model.config)
            base = None if base == repo_id else base
            card.renew_card(folder, card.read_config(folder), model_id=repo_id, base_model=base)
    return original(model)


# ------------------------------------------------------------------------------------------------------- the Trainer


def load_from_checkpoint(original: Callable[..., Any], trainer: Any, bound: BoundArguments) -> Any:
    """Warn if the checkpoint was saved with other norms. The Trainer itself only loads tensors."""
    folder, model = Path(bound.arguments["resume_from_checkpoint"]), trainer.accelerator.unwrap_model(trainer.model)
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    adapter = folder / "adapter_config.json"
    callbacks = [callback for callback in trainer.callback_handler.callbacks if hasattr(callback, "schedule")]
    # A schedule sets its settings before the first step.
    scheduled = {name for callback in callbacks for name in getattr(callback.schedule, "pairs", ())}
    spec = spec_in_file(adapter if adapter.is_file() else folder / CONFIG_NAME)
    if spec is not None and (differing := differences(spec, model, scheduled)):
        message = f"training resumes with other norms than the checkpoint in {folder} was saved with"
        warnings.warn(f"{message}: {in_words(differing, model)}", stacklevel=6)
    return original(trainer)


def get_decay_parameter_names(original: Callable[..., Any], trainer: Any, bound: BoundArguments) -> list[str]:
    """Exclude the parameters of swapped norms from weight decay, as the Trainer does for those of nn.LayerNorm."""
    modules = bound.arguments["model"].named_modules()
    own = {f"{name}.{key}" for name, module in modules if is_swapped(module) for key, _ in module.named_parameters()}
    return [name for name in original(trainer) if name not in own]


def create_model_card(original: Callable[..., Any], trainer: Any, bound: BoundArguments) -> Any:
    result = original(trainer)
    model = trainer.accelerator.unwrap_model(trainer.model)
    folder = Path(trainer.args.output_dir)
    # Not for an adapter around a patched base: what it saves is no patched model.
    if trainer.is_world_process_zero() and isinstance(model, PreTrainedModel) and (folder / CONFIG_NAME).is_file():
        with _in_second_place(folder):
            if has_spec(model.config):
                card.write_model_card(folder, model_id=getattr(trainer, "hub_model_id", None))
    return result


def push_from_checkpoint(original: Callable[..., Any], trainer: Any, bound: BoundArguments) -> Any:
    """Put our code and card into the folder first: the Trainer copies only files that it knows from the checkpoint."""
    checkpoint, folder = Path(bound.arguments["checkpoint_folder"]), Path(trainer.args.output_dir)
    if trainer.is_world_process_zero() and (checkpoint / travel.LOADER).is_file():
        with _in_second_place(folder):
            travel.write_code(folder, _classes_of(trainer.accelerator.unwrap_model(trainer.model).config))
            card.renew_card(folder, card.read_config(checkpoint))
    return original(trainer)
