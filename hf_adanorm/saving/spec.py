"""Write down what is swapped in a model: `config.adanorm` of the model and of the models nested in it.

The spec lists modules by name. `*` replaces a number only where every index is swapped, so that a config with another
number of layers still means the whole stack.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_adanorm._tables import number_template
from hf_adanorm.modeling_adanorm import (
    ADDED_BIAS,
    ADJUSTED_EPS,
    SwappedNorm,
    find_modules,
    is_name,
    is_swapped,
    renamings,
    source_settings,
)
from hf_adanorm.norms import digest, files_of, known_classes
from hf_adanorm.replaced import GIVEN_EPS, source_of
from hf_adanorm.spec import AdaNormSpec, NormGroup

from .travel import own_file


def swapped_norms(model: nn.Module) -> list[tuple[str, SwappedNorm]]:
    """Return name and module of every swapped norm, in the order of `named_modules`."""
    return [(name, module) for name, module in model.named_modules() if is_swapped(module)]


def has_spec(config: PreTrainedConfig) -> bool:
    """Tell whether the config, or one nested in it, has a spec."""
    return any(getattr(part, "adanorm", None) is not None for part in all_configs(config))


def all_configs(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """Return `config` and every config nested in it (encoder and decoder, text and vision, ...)."""
    found = [config]
    for current in found:  # which grows
        nested = [value for value in vars(current).values() if isinstance(value, PreTrainedConfig)]
        found += [value for value in nested if not any(value is known for known in found)]
    return found


def configs_of(model: nn.Module) -> list[PreTrainedConfig]:
    values = {id(value): value for module in model.modules() for value in vars(module).values()}
    outer = [value for value in values.values() if isinstance(value, PreTrainedConfig)]
    return list({id(config): config for value in outer for config in all_configs(value)}.values())


def own_configs(model: nn.Module) -> None:
    """Give the model deep copies of its configs, shared within the model as before (one memo). Models that were built
    from the same config object would otherwise change with this one."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for key, value in list(vars(module).items()):
            if isinstance(value, PreTrainedConfig):
                module.__dict__[key] = copy.deepcopy(value, memo)


def write_specs(model: nn.Module) -> None:
    """Set `config.adanorm` of the model and of every nested model with its own config. A part, such as the vision
    tower, then saves and loads like the whole. The configs become the model's own, without our `auto_map` entries."""
    own_configs(model)
    specs: dict[int, AdaNormSpec | None] = {}
    for part in model.modules():  # parents come first: a config belongs to the outermost model that has it
        if isinstance(part, PreTrainedModel) and id(part.config) not in specs:
            specs[id(part.config)] = resolved_spec(part)
    for config in configs_of(model):
        auto_map = vars(config).pop("auto_map", None) or {}
        if kept := {key: reference for key, reference in auto_map.items() if not own_file(reference)}:
            config.auto_map = kept
        vars(config).pop("adanorm", None)
        if (spec := specs.get(id(config))) is not None:
            config.adanorm = spec.to_dict()


def refresh_specs(model: PreTrainedModel) -> None:
    """Update `config.adanorm` to the norms of `model`. It can be out of date if a part was patched or unpatched by
    itself, or if a norm was swapped by hand."""
    data = getattr(model.config, "adanorm", None)
    if differences(AdaNormSpec() if data is None else AdaNormSpec.from_dict(data), model):
        write_specs(model)


def plain_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield `model.named_modules()` with the names that they have without PEFT and other wrappers. Skip the layers and
    copies of adapters."""
    seen: set[int] = set()
    wrapped = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")

    def walk(name: str, module: nn.Module) -> Iterator[tuple[str, Any]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        if type(module).__module__.startswith("peft."):
            for key in ("original_module", "base_layer"):
                if (inner := module._modules.get(key)) is not None:
                    yield from walk(name, inner)
            return
        yield name, module
        for key, child in module._modules.items():
            if child is not None:
                yield from walk(name if key in wrapped else f"{name}.{key}" if name else key, child)

    return walk("", model)


def spec_in_file(path: Path) -> AdaNormSpec | None:
    """Return the spec in a config.json or adapter_config.json, an empty one for stock norms; None if it cannot be
    read."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        data = data.get("adanorm") or (data.get("auto_mapping") or {}).get("adanorm")
        return AdaNormSpec() if data is None else AdaNormSpec.from_dict(data)
    except (OSError, ValueError, TypeError, AttributeError):
        return None


Differences = dict[str, tuple[dict[str, Any], dict[str, Any]]]
"""By the name of a module: what is wanted and what is here, each {} for a stock module."""


def differences(spec: AdaNormSpec, model: nn.Module, ignored: Collection[str] = ()) -> Differences:
    """Return how `model` differs from one built with `spec`, except in the `ignored` settings. Names of another head
    do not count."""
    wanted, actual = _settings_by_name(spec, model, ignored), resolved_spec(model)
    here = {} if actual is None else _settings_by_name(actual, model, ignored)
    sides = {name: (wanted.get(name, {}), here.get(name, {})) for name in {**wanted, **here}}
    return {name: (one, other) for name, (one, other) in sides.items() if one != other}


def in_words(differing: Differences, model: nn.Module) -> str:
    """Describe `differences`: how many there are, and all settings that differ in the first."""

    def side(own: dict[str, Any], other: dict[str, Any]) -> str:
        settings = [f"{key}={value}" for key, value in own.items() if key not in other or other[key] != value]
        return ", ".join(settings) or "its stock module"

    name, (wanted, here) = next(iter(differing.items()))
    more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
    return f"{name}{more} needs {side(wanted, here)}; this {type(model).__name__} has {side(here, wanted)}"


def _settings_by_name(spec: AdaNormSpec, model: nn.Module, ignored: Collection[str]) -> dict[str, dict[str, Any]]:
    named = find_modules(model, spec.names(), plain_modules(model))
    found: dict[str, dict[str, Any]] = {name: {"bias": True} for pattern in spec.biases for name in named[pattern]}
    found |= {name: {"eps": value} for pattern, value in spec.eps.items() for name in named[pattern]}
    for group in spec.groups:
        for name, module in (pair for pattern in group.modules for pair in named[pattern].items()):
            # The shape and the layout follow from the architecture, whether or not they are spelled out.
            found[name] = {
                "norm": group.norm,
                **{key: value for key, value in group.settings.items() if key not in ignored},
                "eps": source_settings(source_of(module) or module).get("eps") if group.eps is None else group.eps,
                "centered": group.centered is not False,
                "output_dtype": group.output_dtype,
            }
    return found


def resolved_spec(model: nn.Module) -> AdaNormSpec | None:
    """Describe the swapped norms of `model`, and the biases and eps that folds left. Return None if there are none.

    Raises:
        ValueError: two classes share a name.
    """
    groups: dict[NormGroup, list[str]] = {}
    classes: dict[str, dict[str, Any]] = {}
    modules = dict(plain_modules(model))
    for name, module in modules.items():
        if not is_swapped(module):
            continue
        group = NormGroup(norm=module.norm_name, modules=(), settings=module.settings(), **_layout(module))
        groups.setdefault(group, []).append(name)
        if module.inner is not module:
            entry = _class_entry(cast(Any, type(module.inner)))
            if classes.setdefault(module.norm_name, entry) != entry:
                raise ValueError(f"two classes are called {module.norm_name!r}: give one a name with register_norm")
    biases, eps = left_by_folds(model)
    if not groups and not biases and not eps:
        return None
    spelled = spec_names(model, modules)
    by_template: dict[str, set[str]] = {}
    for name in spelled.values():
        by_template.setdefault(number_template(name), set()).add(name)

    def patterns(names: list[str]) -> tuple[str, ...]:
        """Return the names in a spec, with `*` for numbers where every module of such a name is meant."""
        chosen = {spelled[name] for name in names}
        templates = dict.fromkeys(number_template(spelled[name]) for name in names)
        found = find_modules(model, templates, modules.items())
        # "*" may match nothing, as a renaming may ask for a certain number (RF-DETR).
        short = [
            template
            for template in templates
            if by_template[template] <= chosen and found[template] and found[template].keys() <= set(names)
        ]
        reached = {name for template in short for name in found[template]}
        return (*short, *(spelled[name] for name in names if name not in reached))

    named = tuple(dataclasses.replace(group, modules=patterns(names)) for group, names in groups.items())
    adjusted = {spelled[name]: value for name, value in eps.items()}
    return AdaNormSpec(groups=named, biases=patterns(biases), eps=adjusted, classes=classes)


def spec_names(model: nn.Module, modules: dict[str, Any]) -> dict[str, str]:
    """Return what a spec calls the named modules: their names in the keys of checkpoints, relative to the base model.
    "^" marks those outside of it. Where loading would not find exactly that module, it is the module's own name."""
    prefix, inside, outside = renamings(model)
    own, keys = {}, {}
    for name in modules:
        mark = "" if name.startswith(prefix) else "^"
        own[name] = key = name.removeprefix(prefix)
        for renaming in reversed(outside if mark else inside):
            key = renaming.reverse_transform().rename_source_key(f"{key}.weight")[0].removesuffix(".weight")
        own[name], keys[name] = mark + own[name], mark + (key if is_name(key) else own[name])
    found = find_modules(model, keys.values(), modules.items())
    return {name: key if [*found[key]] == [name] else own[name] for name, key in keys.items()}


def left_by_folds(model: nn.Module) -> tuple[list[str], dict[str, float]]:
    """Return the linear layers that a fold gave a bias, and the stock norms whose eps it adjusted, with that eps.

    Both the marks of modules and the model's config count: a module may be replaced later, such as by quantization,
    and its mark is lost with it.
    """
    modules = dict(plain_modules(model))
    biases = {name for name, module in modules.items() if ADDED_BIAS in module.__dict__}
    eps = {name: 0.0 for name, module in modules.items() if ADJUSTED_EPS in module.__dict__}
    if (data := getattr(getattr(model, "config", None), "adanorm", None)) is not None:
        spec = AdaNormSpec.from_dict(data)
        named = find_modules(model, [*spec.biases, *spec.eps], modules.items())
        biases |= {name for pattern in spec.biases for name in named[pattern]}
        eps |= {name: value for pattern, value in spec.eps.items() for name in named[pattern]}
    layers = [name for name, layer in modules.items() if name in biases and getattr(layer, "bias", None) is not None]
    norms = {name: norm for name, norm in modules.items() if name in eps and not is_swapped(norm)}
    return layers, {name: source_settings(norm).get("eps", eps[name]) for name, norm in norms.items()}


@functools.cache  # as the files were when the class was first swapped in
def _class_entry(cls: Any) -> dict[str, Any]:
    files = files_of(cls)
    file = files[0].name if files else cls.__module__
    return {"class": cls.__name__, "file": file, "files": {path.name: digest(path) for path in files}}


def _layout(module: SwappedNorm) -> dict[str, Any]:
    """Return the layout as far as loading cannot read it off the stock norm: all, for a norm put in by hand."""
    source = source_of(module)
    readable = {} if source is None else source_settings(source)
    if GIVEN_EPS in module.__dict__ or ADJUSTED_EPS in vars(source or module):  # not the config's
        readable.pop("eps", None)
    own = {key: getattr(module, key) for key in ("eps", "normalized_shape", "channels_first")}
    changed = {key: value for key, value in own.items() if readable.get(key) != value}
    return {**changed, "centered": None if module.centered else False, "output_dtype": module.output_dtype}


def refuse_loose_norms(model: nn.Module) -> None:
    """Raise ValueError for a norm of a registered class that was put into the model by hand, which no spec names."""
    held = {id(module.inner) for _, module in swapped_norms(model)}
    for name, module in model.named_modules():
        if type(module) in known_classes() and id(module) not in held:
            raise ValueError(
                f"{name} is a {type(module).__name__} that was put in by hand, and the saved model would load without "
                f"it: use patch_model(model, {type(module).__name__}, include={name!r})"
            )
