"""Write down what is swapped in a model: `config.adanorm` of the model and of the models nested in it.

The spec is resolved (names, no patterns). `*` stands for one number and is written only where every index is swapped,
so that a config with another number of layers still means the whole stack.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from collections.abc import Iterator
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


def all_configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Yield `config` and every config nested in it (encoder and decoder, text and vision, ...)."""
    seen: set[int] = set()
    waiting = [config]
    while waiting:
        current = waiting.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        waiting.extend(value for value in vars(current).values() if isinstance(value, PreTrainedConfig))


def configs_of(model: nn.Module) -> list[PreTrainedConfig]:
    found: dict[int, PreTrainedConfig] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, PreTrainedConfig):
                found.update((id(config), config) for config in all_configs(value))
    return list(found.values())


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
    tower, then saves and loads like the whole. The configs become the model's own."""
    own_configs(model)
    owners: dict[int, list[PreTrainedModel]] = {}
    for module in model.modules():  # parents come first: the first owner of a config is its outermost
        if isinstance(module, PreTrainedModel):
            outer = owners.setdefault(id(module.config), [])
            if not any(module is inner for owner in outer for inner in owner.modules()):
                outer.append(module)
    resolved = [(models, [resolved_spec(part) for part in models]) for models in owners.values()]
    if not any(is_swapped(module) for module in model.modules()):
        clear_specs(model)
    for models, specs in resolved:
        if specs[0] is None:
            models[0].config.__dict__.pop("adanorm", None)
        elif all(spec == specs[0] for spec in specs):
            models[0].config.adanorm = specs[0].to_dict()


def refresh_specs(model: PreTrainedModel) -> None:
    """Update `config.adanorm` to the norms of `model`. It can be out of date if a part was patched or unpatched by
    itself, or if a norm was swapped by hand."""
    data = getattr(model.config, "adanorm", None)
    if data is None and not any(is_swapped(module) for module in model.modules()):
        return
    if data is None or not describes(AdaNormSpec.from_dict(data), model):
        write_specs(model)


def clear_specs(model: nn.Module) -> None:
    """Remove `config.adanorm` and our `auto_map` entries from every config of the model."""
    for config in configs_of(model):
        config.__dict__.pop("adanorm", None)
        auto_map = getattr(config, "auto_map", None) or {}
        kept = {key: ref for key, ref in auto_map.items() if not own_file(ref)}
        if kept:
            config.auto_map = kept
        else:
            config.__dict__.pop("auto_map", None)


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


def spec_in_file(path: Path) -> tuple[bool, AdaNormSpec | None]:
    """Return whether a config.json or adapter_config.json can be read, and the spec in it."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        data = data.get("adanorm") or (data.get("auto_mapping") or {}).get("adanorm")
        return True, None if data is None else AdaNormSpec.from_dict(data)
    except (OSError, ValueError, TypeError, AttributeError):
        return False, None


def describes(spec: AdaNormSpec, model: nn.Module) -> bool:
    """Tell whether `spec` builds the norms that `model` has, except for names of another head."""
    return not differences(spec, model)


def differences(spec: AdaNormSpec, model: nn.Module) -> list[tuple[str, str, Any, Any]]:
    """Return how `model` differs from one built with `spec`, as (kind, name of the module, wanted, here). The kind is
    "norm", with its settings, "bias" or "eps" of a fold. None stands for what one side does not have."""
    wanted, actual = _settings_by_name(spec, model), resolved_spec(model)
    here = {} if actual is None else _settings_by_name(actual, model)
    keys = dict.fromkeys([*wanted, *here])
    return [(*key, wanted.get(key), here.get(key)) for key in keys if wanted.get(key) != here.get(key)]


def in_words(differing: list[tuple[str, str, Any, Any]], model: nn.Module) -> str:
    """Describe `differences` in sentences, with every setting that differs on both sides."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for kind, name, wanted, here in differing:
        grouped.setdefault((_side(kind, wanted, here), _side(kind, here, wanted)), []).append(name)
    parts = []
    for (wanted, here), names in list(grouped.items())[:3]:
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        parts.append(f"it needs {wanted} at {', '.join(names[:2])}{more}; this {type(model).__name__} has {here}")
    return ". ".join(part[0].upper() + part[1:] for part in parts)


def _side(kind: str, value: Any, other: Any) -> str:
    """Describe one side of a difference, with every setting that differs."""
    if kind != "norm":
        return f"the {kind} of a fold" + (f", {value:g}" if kind == "eps" else "") if value else f"its stock {kind}"
    if value is None:
        return "its stock norms"
    settings, others = _flat(value), {} if other is None or other.norm != value.norm else _flat(other)
    if others:
        settings = {key: settings.get(key) for key in {**settings, **others} if settings.get(key) != others.get(key)}
    return ", ".join([value.norm, *(f"{key}={value}" for key, value in settings.items())])


def _flat(group: NormGroup) -> dict[str, Any]:
    data = group.to_dict()
    return {
        **data.pop("settings", {}),
        **{key: value for key, value in data.items() if key not in ("norm", "modules")},
    }


def _settings_by_name(spec: AdaNormSpec, model: nn.Module) -> dict[tuple[str, str], Any]:
    named = find_modules(model, spec.names(), plain_modules(model))
    found: dict[tuple[str, str], Any] = {}
    for group in spec.groups:
        for name, module in (pair for pattern in group.modules for pair in named[pattern].items()):
            source = source_of(module) or module
            eps = source_settings(source).get("eps") if group.eps is None else group.eps
            # The shape and the layout follow from the architecture, whether or not they are spelled out.
            found["norm", name] = dataclasses.replace(
                group,
                modules=(),
                eps=eps,
                centered=group.centered is not False,
                normalized_shape=None,
                channels_first=None,
            )
    found |= {("bias", name): True for pattern in spec.biases for name in named[pattern]}
    return found | {("eps", name): value for pattern, value in spec.eps.items() for name in named[pattern]}


def resolved_spec(model: nn.Module) -> AdaNormSpec | None:
    """Return the spec of what is swapped in `model`, with one group per set of settings."""
    groups: dict[NormGroup, list[str]] = {}
    classes: dict[str, dict[str, Any]] = {}
    modules = dict(plain_modules(model))
    for name, module in modules.items():
        if not is_swapped(module):
            continue
        group = NormGroup(
            norm=module.norm_name,
            modules=(),
            settings=module.settings(),
            centered=None if module.centered else False,
            **_overrides(module),
        )
        if (entry := entry_of(module)) is not None and classes.setdefault(module.norm_name, entry) != entry:
            raise ValueError(f"two classes of this model are called {module.norm_name!r}: name one with register_norm")
        groups.setdefault(group, []).append(name)
    biases, eps = left_by_folds(modules)
    if not groups and not biases and not eps:
        return None
    spelled = spec_names(model, modules)
    by_template: dict[str, set[str]] = {}
    for name in spelled.values():
        by_template.setdefault(number_template(name), set()).add(name)

    def patterns(names: list[str]) -> tuple[str, ...]:
        starred = _with_stars([spelled[name] for name in names], by_template)
        found = find_modules(model, starred, modules.items())
        # A renaming may ask for a certain number, which "*" does not match (RF-DETR).
        short = [pattern for pattern in starred if found[pattern] and found[pattern].keys() <= set(names)]
        reached = {name for pattern in short for name in found[pattern]}
        return (*short, *(spelled[name] for name in names if name not in reached))

    return AdaNormSpec(
        groups=tuple(dataclasses.replace(group, modules=patterns(names)) for group, names in groups.items()),
        biases=patterns(biases),
        eps={spelled[name]: value for name, value in eps.items()},
        classes=classes,
    )


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


def left_by_folds(modules: dict[str, Any]) -> tuple[list[str], dict[str, float]]:
    """Return the linear layers that a fold gave a bias, and the stock norms whose eps it adjusted, with that eps.

    Both the marks of modules and the configs count: a module may be replaced later, such as by quantization, and its
    mark is lost with it.
    """
    biases = {name for name, module in modules.items() if ADDED_BIAS in module.__dict__}
    eps = {name: 0.0 for name, module in modules.items() if ADJUSTED_EPS in module.__dict__}
    seen: set[int] = set()
    for outer, model in modules.items():  # parents come first: a config belongs to the outermost model that has it
        data = getattr(model.config, "adanorm", None) if isinstance(model, PreTrainedModel) else None
        if data is None or id(model.config) in seen:
            continue
        seen.add(id(model.config))
        spec = AdaNormSpec.from_dict(data)
        if not (spec.biases or spec.eps):
            continue
        here = f"{outer}." if outer else ""
        inner = {name.removeprefix(here): module for name, module in modules.items() if name.startswith(here)}
        named = find_modules(model, spec.names(), inner.items())
        biases |= {here + name for pattern in spec.biases for name in named[pattern]}
        eps |= {here + name: value for pattern, value in spec.eps.items() for name in named[pattern]}
    return (
        [name for name, module in modules.items() if name in biases and getattr(module, "bias", None) is not None],
        {
            name: source_settings(module).get("eps", eps[name])
            for name, module in modules.items()
            if name in eps and not is_swapped(module)
        },
    )


def entry_of(module: SwappedNorm) -> dict[str, Any] | None:
    """Return what the spec says of the author's class of a norm; None for a built-in norm."""
    return None if module.inner is module else _class_entry(cast(Any, type(module.inner)))


@functools.cache  # as the files were when the class was first swapped in
def _class_entry(cls: Any) -> dict[str, Any]:
    files = files_of(cls)
    file = files[0].name if files else cls.__module__
    return {"class": cls.__name__, "file": file, "files": {path.name: digest(path) for path in files}}


def _overrides(module: SwappedNorm) -> dict[str, Any]:
    """Return the settings that loading cannot read off the stock norm: all, for a norm that was put in by hand."""
    source = source_of(module)
    readable = {} if source is None else source_settings(source)
    found = {key: getattr(module, key) for key in ("eps", "normalized_shape", "channels_first")}
    found = {key: value for key, value in found.items() if readable.get(key) != value}
    if GIVEN_EPS in module.__dict__ or (source is not None and ADJUSTED_EPS in source.__dict__):  # not the config's
        found["eps"] = module.eps
    return {**found, "output_dtype": module.output_dtype}


def refuse_loose_norms(model: nn.Module) -> None:
    """Raise ValueError for a norm of a registered class that was put into the model by hand, which no spec names."""
    classes = tuple(known_classes())
    held = {id(module.inner) for module in model.modules() if is_swapped(module)}
    for name, module in model.named_modules():
        if classes and type(module) in classes and id(module) not in held:
            raise ValueError(
                f"{name} is a {type(module).__name__} that was put in by hand, and the saved model would load without "
                f"it: use patch_model(model, {type(module).__name__}, include={name!r})"
            )


def _with_stars(names: list[str], by_template: dict[str, set[str]]) -> list[str]:
    """Return the names with `*` for a number wherever the model has no other module of such a name."""
    out: list[str] = []
    grouped: dict[str, list[str]] = {}
    for name in names:
        grouped.setdefault(number_template(name), []).append(name)
    for template, members in grouped.items():
        out += _star(template.split("."), members, by_template[template])
    return out


def _star(pattern: list[str], members: list[str], everything: set[str]) -> list[str]:
    """Return `pattern` if it matches only the members. Otherwise write out its first number, and so on."""
    if len(members) == len(everything):
        return [".".join(pattern)]
    position = pattern.index("*")
    out: list[str] = []
    for number in dict.fromkeys(name.split(".")[position] for name in members):
        fixed = [*pattern[:position], number, *pattern[position + 1 :]]
        mine = [name for name in members if name.split(".")[position] == number]
        rest = {name for name in everything if name.split(".")[position] == number}
        out += _star(fixed, mine, rest)
    return out
