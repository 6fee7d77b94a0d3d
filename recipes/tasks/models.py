"""Makes models: fresh ones from `model_config`, checked field by field, and pretrained ones."""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from common.options import OptionError
from hf_adanorm.norms import did_you_mean


def check_model_source(options: Any) -> None:
    """Raise OptionError unless the model is either pretrained or fresh."""
    if bool(options.model_name_or_path) == bool(options.model_config):
        raise OptionError("give either --model_name_or_path or model_config (with a model_type), not both or none")


def label_mappings(names: Sequence[str]) -> dict[str, Any]:
    """Return the fields of a model's config that describe the classes."""
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
    }


def fresh_config(options: Any, **values: Any) -> PreTrainedConfig:
    """Return the config of a fresh model: `values`, then `model_config`, which must name a model_type.

    Raises OptionError for an unknown model_type or field, and for a field that contradicts `values`.
    """
    sizes = dict(options.model_config)
    model_type = sizes.pop("model_type", None)
    if model_type is None:
        raise OptionError("model_config needs a model_type, for instance bert")
    if model_type not in CONFIG_MAPPING:
        hint = did_you_mean(model_type, CONFIG_MAPPING)
        raise OptionError(f"model_config: transformers has no model_type {model_type!r}{hint}")
    try:
        config = AutoConfig.for_model(model_type, **{**values, **sizes})
    except Exception as error:  # transformers has its own classes of errors
        raise OptionError(f"model_config of {model_type}: {' '.join(str(error).split())}") from error
    known = _fields(model_type) | values.keys()
    for name, value in sizes.items():
        if len(known) > len(values) and name not in known and not _has_effect(config, name, {**values, **sizes}):
            hint = did_you_mean(name, sorted(known))
            raise OptionError(f"model_config: {model_type} has no field {name!r}{hint}")
        if isinstance(value, int) and value < 0 and re.search(r"^(num|n)_|_(size|dim|layers)$", name):
            raise OptionError(f"model_config: {name} must not be negative, got {value}")
        if name == "pad_token_id" and values.get(name) not in (None, value):
            raise OptionError(f"model_config: {name} is {values[name]} in the tokenizer, not {value}: leave it out")
    if sizes.get("vocab_size", math.inf) < values.get("vocab_size", 0):
        raise OptionError(
            f"model_config: vocab_size {sizes['vocab_size']} is less than the tokenizer's {values['vocab_size']}: "
            "leave it out"
        )
    return config


def _fields(model_type: str) -> set[str]:
    """Return the fields of a config of this type, or none if it has no defaults."""
    try:
        config = AutoConfig.for_model(model_type)
    except Exception:  # any error: the config needs arguments
        return set()
    # Some are properties, and the attention is chosen by a name that no attribute has.
    return {*vars(config), *dir(type(config)), *config.attribute_map, "attn_implementation", "torch_dtype"}


def _has_effect(config: PreTrainedConfig, name: str, given: dict[str, Any]) -> bool:
    """Return whether an undeclared field changes others (`rope_theta`), or the model reads it (`position_buckets`)."""
    without = AutoConfig.for_model(config.model_type, **{key: value for key, value in given.items() if key != name})
    fields = {key: value for key, value in config.to_dict().items() if key != name}
    if fields != without.to_dict():
        return True
    code = Path(inspect.getfile(type(config)))
    modeling = code.with_name(code.name.replace("configuration_", "modeling_"))
    return modeling.is_file() and re.search(rf"\b{re.escape(name)}\b", modeling.read_text("utf-8")) is not None


def build_fresh(auto_class: Any, config: PreTrainedConfig) -> PreTrainedModel:
    """Return a fresh model. Raises OptionError, with the model's own message, if it cannot be built."""
    try:
        return auto_class.from_config(config)
    except OptionError:
        raise
    except Exception as error:  # models raise errors of many types
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise OptionError(f"model_config: no {config.model_type} can be built from it: {said}") from error


def load_pretrained(auto_class: Any, name: str, **options: Any) -> Any:
    """Return what `auto_class` loads by `name`. Raises OptionError naming the option if it cannot be loaded."""
    try:
        return auto_class.from_pretrained(name, **options)
    except Exception as error:  # transformers raises errors of many types
        said = [] if isinstance(error, OSError) else [type(error).__name__]
        said += str(error).strip().splitlines()[:1]
        raise OptionError(f"--model_name_or_path {name}: {': '.join(said) or type(error).__name__}") from error


def load_model(auto_class: Any, name: str, **options: Any) -> PreTrainedModel:
    """Return the model that `auto_class` loads by `name`. Raises OptionError, also for weights of other shapes."""
    loading = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = load_pretrained(auto_class, name, **loading, **options)
    for weight, saved, wanted in sorted(info["mismatched_keys"]):
        hint = ": it was trained for other classes" if "id2label" in options else ""
        raise OptionError(
            f"--model_name_or_path {name}: its {weight} has the shape {tuple(saved)}, not {tuple(wanted)}{hint}"
        )
    return model


def load_classifier(auto_class: Any, name: str, names: Sequence[str]) -> PreTrainedModel:
    """Return a pretrained model for these classes. Raises OptionError if it has them in another order."""
    known = [label for _, label in sorted(load_pretrained(AutoConfig, name).id2label.items())]
    if known != list(names) and sorted(known) == sorted(names):
        raise OptionError(
            f"--model_name_or_path {name}: its classes are, in order, {', '.join(known)}; those of the data are "
            f"{', '.join(names)}: give the model's order by --label_names"
        )
    return load_model(auto_class, name, **label_mappings(names))


@torch.no_grad()
def try_out(model: PreTrainedModel, name: str, **inputs: Any) -> Any:
    """Return a model's outputs for `inputs`, in eval mode. Raises OptionError if it cannot take what `name` says."""
    copied = copy.deepcopy(model).eval()  # a short text changes BigBird permanently
    try:
        if copied.config._attn_implementation not in (None, "eager", "sdpa"):  # flash attention asks for a GPU
            copied.set_attn_implementation("eager")
        return copied(**inputs)
    except Exception as error:  # models raise errors of many types
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        hint = "; if it needs a pad_token_id, give one, 0 for bytes" if "NoneType" in said else ""
        raise OptionError(f"{model.config.model_type} cannot be given {name}: {said}{hint}") from error


def check_positions(model: PreTrainedModel, length: int, option_name: str) -> None:
    """Raise OptionError naming the option when a model has fewer positions than `length`."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is None or positions <= 0:  # -1: unlimited
        return
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions -= module.padding_idx + 1  # as RoBERTa counts, the first position comes after that of padding
    if positions < length:
        raise OptionError(f"--{option_name} {length} is beyond the model's {positions} positions")
