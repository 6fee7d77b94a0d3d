"""The options that all recipes share, and how they are read.

A recipe declares one flat, keyword-only dataclass that inherits from the groups here. Every field becomes a flag of
the same name; `--config FILE.yaml` sets any of them, and flags given on the command line win over the file. Paths in a
config file (options ending in `_file`) are relative to that file, paths on the command line to the current directory.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib.util
import json
import math
import os
import re
import runpy
import sys
import types
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

T = TypeVar("T")

# The package's options without the package, which would import torch.
_STATED = runpy.run_path(str(Path(importlib.util.find_spec("hf_adanorm").origin).with_name("options.py")))
NORMS, PATCH_OPTIONS = _STATED["norms"](), _STATED["patch_options"]()


def leave(code: int) -> NoReturn:
    """End the process with `code`; `launch/keep_code.py` is told, where that started it: launchers turn it into 1."""
    if note := os.environ.get("HF_ADANORM_EXIT_CODE"):
        Path(note).write_text(str(code), encoding="utf-8")
    sys.exit(code)


class OptionError(ValueError):
    """An option, or a combination of options, cannot be used. The message names it and the nearest fix."""


class DataError(ValueError):
    """The data cannot be used. The message names the file or split, what is wrong and the nearest fix."""


Change = Literal["results", "onward", "nothing"]


def option(default: Any, help: str, *, changes: Change = "results", within: str = "") -> Any:  # noqa: A002
    """A dataclass field with a default, the text that `--help` shows, the interval that a number must be in, such as
    "[0, 1)" or "(0, inf)", and what another value of it changes.

    "results": weights or scores; it must be the same when a run is resumed and in all runs of a comparison. "onward":
    what happens from then on; a resumed run may go on with another value, the runs of a comparison must agree.
    "nothing": where a run writes and how it is watched.
    """
    metadata = {"help": help, "changes": changes, "within": within}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def positive(text: str) -> int:
    """A number of a command line that must be at least 1. Raises ValueError, as argparse takes it."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def options_that_change(options_class: type[Any], *changes: Change) -> frozenset[str]:
    """The names of the options of which another value changes one of these."""
    fields = dataclasses.fields(options_class)
    return frozenset(item.name for item in fields if item.metadata["changes"] in changes)


def check_ranges(options: Any) -> None:
    """Raise OptionError for a number that is not within the interval of its option."""
    for item in dataclasses.fields(options):
        within, value = item.metadata["within"], getattr(options, item.name)
        if not within or value is None:
            continue
        low, high = (float(end) for end in within[1:-1].split(","))
        above = low < value if within[0] == "(" else low <= value
        below = value < high if within[-1] == ")" else value <= high
        if not (above and below):
            least = "positive" if within == "(0, inf)" else f"at least {low:g}"
            raise OptionError(f"--{item.name} must be {least if math.isinf(high) else f'in {within}'}, got {value}")


def check_trackers(names: Iterable[str]) -> None:
    """Raise OptionError for a tracker that accelerate does not know. It is read off its source text: accelerate would
    import torch."""
    package = Path(importlib.util.find_spec("accelerate").origin).parent
    kinds = (package / "utils" / "dataclasses.py").read_text(encoding="utf-8").partition("class LoggerType(")[2]
    known = re.findall(r'^    [A-Z_]+ = "(\w+)"$', kinds.partition("\nclass ")[0], re.MULTILINE)
    for name in names:
        if name not in known:
            raise OptionError(f"--report_to {name}: expected {', '.join(known)}{did_you_mean(name, known)}")


@dataclass(kw_only=True)
class PatchOptions:
    """What `patch_model` is asked to do; `norm="layernorm"` is the unpatched control."""

    norm: Literal[(*NORMS, "layernorm")] = option(
        PATCH_OPTIONS["norm"].default, "norm to train with; layernorm leaves the model as it is (the control)"
    )
    C: float = option(*PATCH_OPTIONS["C"][:2])
    k: float = option(*PATCH_OPTIONS["k"][:2])
    detach_mean: bool = option(*PATCH_OPTIONS["detach_mean"][:2])
    detach_variance: bool = option(*PATCH_OPTIONS["detach_variance"][:2])
    eps: float | None = option(*PATCH_OPTIONS["eps"][:2])
    include: list[str] | str | None = option(*PATCH_OPTIONS["include"][:2])
    exclude: list[str] | str | None = option(*PATCH_OPTIONS["exclude"][:2])
    layers: list[int] | None = option(*PATCH_OPTIONS["layers"][:2])
    targets: Literal[PATCH_OPTIONS["targets"].choices] = option(*PATCH_OPTIONS["targets"][:2])
    affine: Literal[PATCH_OPTIONS["affine"].choices] = option(*PATCH_OPTIONS["affine"][:2])
    on_unfoldable: Literal[PATCH_OPTIONS["on_unfoldable"].choices] = option(*PATCH_OPTIONS["on_unfoldable"][:2])
    on_tied: Literal[PATCH_OPTIONS["on_tied"].choices] = option(*PATCH_OPTIONS["on_tied"][:2])
    calibrate_k: bool = option(
        False, "AdaNorm: a k for each norm, at most --k, that its outliers allow on a batch of training data"
    )


@dataclass(kw_only=True)
class OptimizationOptions:
    """Optimiser, schedule and length of the training."""

    learning_rate: float = option(5e-4, "peak learning rate", within="(0, inf)")
    lr_schedule: Literal["linear", "cosine", "constant", "inverse_sqrt"] = option(
        "linear", "how the learning rate moves after the warm-up"
    )
    warmup_steps: int = option(
        0, "optimiser steps over which the learning rate rises; wins over warmup_ratio", within="[0, inf)"
    )
    warmup_ratio: float = option(0.0, "warm-up as a share of all steps", within="[0, 1]")
    warmup_init_lr: float = option(0.0, "learning rate at the first warm-up step", within="[0, inf)")
    min_lr: float = option(0.0, "learning rate at the end of a linear or cosine schedule", within="[0, inf)")
    weight_decay: float = option(0.0, "AdamW weight decay; not applied to biases and norms", within="[0, inf)")
    adam_beta1: float = option(0.9, "Adam beta 1", within="[0, 1)")
    adam_beta2: float = option(0.999, "Adam beta 2", within="[0, 1)")
    adam_epsilon: float = option(1e-8, "Adam epsilon", within="[0, inf)")
    fused_adam: bool | None = option(None, "AdamW's update as one kernel, on a GPU; by default torch decides")
    max_grad_norm: float = option(1.0, "clip the gradient to this norm; 0 clips nothing", within="[0, inf)")
    gradient_accumulation_steps: int = option(1, "micro-batches in one optimiser step", within="(0, inf)")
    num_epochs: int = option(3, "passes over the training data", within="(0, inf)")
    max_steps: int | None = option(
        None, "stop after this many optimiser steps; wins over num_epochs", within="(0, inf)"
    )
    on_nonfinite: Literal["stop", "skip"] = option(
        "stop",
        "what to do when the loss or its gradient is NaN or infinite: stop, or leave that step out",
        changes="onward",
    )
    on_spike: Literal["report", "stop", "skip"] = option(
        "report",
        "what to do when the loss or its gradient is a spike: say so and go on, stop, or leave that step out",
        changes="onward",
    )
    spike_sigmas: float = option(
        6.0,
        "a spike is so many standard deviations above the mean of the last 128 steps",
        changes="onward",
        within="(0, inf)",
    )


@dataclass(kw_only=True)
class RunOptions:
    """Where a run writes, what it can be resumed from, how it is launched and watched."""

    output_dir: str = option(
        "outputs/run", "folder for checkpoints, the best model and results.json", changes="nothing"
    )
    overwrite_output_dir: bool = option(
        False, "start afresh instead of resuming what output_dir holds", changes="nothing"
    )
    seed: int = option(1, "seed of initialisation, dropout and the order of the data", within="[0, 4294967295]")
    eval_steps: int | None = option(
        None, "evaluate every so many steps; by default after every epoch", within="(0, inf)"
    )
    early_stopping_patience: int | None = option(
        None, "stop after so many evaluations in a row without a better score", within="(0, inf)"
    )
    checkpointing_steps: int | None = option(
        None,
        "save a checkpoint every so many steps; by default after every evaluation",
        changes="onward",
        within="(0, inf)",
    )
    save_total_limit: int = option(
        1, "how many of the newest checkpoints to keep", changes="nothing", within="(0, inf)"
    )
    logging_steps: int = option(50, "log the training loss every so many steps", changes="nothing", within="(0, inf)")
    report_to: list[str] = option([], "trackers, by accelerate's names, for instance [tensorboard]", changes="nothing")
    watch_norms: int | None = option(
        None,
        "write to the trackers, every so many steps, what each norm does to activations and gradients",
        changes="nothing",
        within="(0, inf)",
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        None, "precision of the forward pass; by default what accelerate is configured to"
    )
    compile: bool = option(False, "run the model through torch.compile")
    progress_bar: bool = option(True, "show a progress bar on the main process", changes="nothing")
    dataloader_workers: int = option(
        0,
        "worker processes that collate batches; the result does not depend on it",
        changes="nothing",
        within="[0, inf)",
    )
    push_to_hub: bool = option(False, "push the best model, with its card and results, to the Hub", changes="nothing")
    hub_model_id: str | None = option(None, "the repository to push to, such as me/my-model", changes="nothing")
    hub_private: bool = option(False, "make that repository private if it is new", changes="nothing")


class _Parser(ArgumentParser):
    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        if message:
            print(message, end="", file=sys.stderr)
        leave(status)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """jsonargparse's types and defaults, the description as it is laid out."""


def build_parser(options_class: type[Any], description: str | None = None) -> ArgumentParser:
    """A parser with one flag for each field of `options_class`, and `--config`."""
    usage = "%(prog)s [--config FILE] [--OPTION VALUE ...]"
    parser = _Parser(usage=usage, description=description, formatter_class=_HelpFormatter)
    parser.add_argument("--config", type=str | None, default=None, help="YAML file that sets any of the options below")
    hints = typing.get_type_hints(options_class)
    groups = {}
    for base in options_class.__mro__:
        if dataclasses.is_dataclass(base) and vars(base).get("__annotations__"):
            group = parser.add_argument_group(base.__name__.removesuffix("Options").lower())
            groups.update(dict.fromkeys(vars(base)["__annotations__"], group))
    for item in dataclasses.fields(options_class):
        if item.default is not dataclasses.MISSING:
            default = item.default
        elif item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        else:
            raise TypeError(f"{options_class.__name__}.{item.name} needs a default")
        groups[item.name].add_argument(
            f"--{item.name}", type=hints[item.name], default=default, help=item.metadata["help"]
        )
    return parser


class _Loader(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := sorted({key for key in keys if isinstance(key, str) and keys.count(key) > 1}):
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} stands there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_config(
    path: str | Path, names: Collection[str] | None = None, elsewhere: Mapping[str, str] | None = None
) -> Any:
    """The options of a YAML file by name, its relative `*_file` paths resolved against the file's folder.

    Raises OptionError for a file that is missing, is not a YAML mapping or holds an option that is none of `names`
    (by default, any name will do); `elsewhere` tells which script has it.
    """
    path = Path(path)
    if not path.is_file():
        raise OptionError(f"--config {path}: {'a folder, not a file' if path.is_dir() else 'no such file'}")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise OptionError(f"--config {path}: not a YAML file: {' '.join(str(error).split())}") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise OptionError(
            f"--config {path}: expected a mapping of option names to values, got {type(values).__name__}"
        )
    for key in values:
        if names is not None and key not in names:
            script = (elsewhere or {}).get(key)
            hint = f": it is one of recipes/{script}" if script else did_you_mean(key, names)
            raise OptionError(f"--config {path}: unknown option {key!r}{hint}")
    if values.get("mixed_precision") is False:
        values["mixed_precision"] = "no"  # for YAML, an unquoted no is false
    for key, value in values.items():
        if str(key).endswith("_file") and isinstance(value, str) and not Path(value).is_absolute():
            values[key] = str((path.parent / value).resolve())
    return values


def did_you_mean(value: object, known: Iterable[str], prefix: str = "") -> str:
    """The nearest of what is known, as the end of a sentence; "" where nothing is near."""
    close = difflib.get_close_matches(str(value), list(known), n=1)
    return f"; did you mean {prefix + close[0] if prefix else repr(close[0])}?" if close else ""


def _scripts_by_option() -> dict[str, str]:
    """Which script each option of the recipes belongs to, as far as their options have been imported."""
    found = {}
    for options_class in RunOptions.__subclasses__():
        script = re.sub("(?<=[a-z])(?=[A-Z])", "_", options_class.__name__.removesuffix("Options")).lower()
        found |= {item.name: f"{script}.py" for item in dataclasses.fields(options_class)}
    return found


def _as_meant(name: str, value: Any, hint: Any) -> Any:
    """A value from a config or, as text, from the command line; one where a list is expected is a list of one.

    Raises OptionError for none of the choices.
    """
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    choices = [choice for kind in kinds if typing.get_origin(kind) is Literal for choice in typing.get_args(kind)]
    if choices and isinstance(value, str) and value not in [*choices, "null"]:
        raise OptionError(f"--{name}: expected {', '.join(choices)}, got {value!r}{did_you_mean(value, choices)}")
    lists = [kind for kind in kinds if typing.get_origin(kind) is list]
    if not lists or str in kinds or isinstance(value, (list, type(None))):
        return value
    if not isinstance(value, str):
        return [value]
    if value.startswith(("[", "- ")) or value == "null":  # a list in YAML, either way
        return value
    return json.dumps([value]) if typing.get_args(lists[0]) == (str,) else f"[{value}]"


def parse_options(options_class: type[T], argv: Sequence[str] | None = None, description: str | None = None) -> T:
    """Read the command line (by default sys.argv) into `options_class`. Bad input ends the process with code 2."""
    parser = build_parser(options_class, description)
    demo = getattr(options_class, "demo", None)
    if argv is None and len(sys.argv) == 1 and demo:
        parser.error(f"there is nothing to train on: try --config recipes/configs/{demo}, or see --help")
    argv = list(sys.argv[1:] if argv is None else argv)
    hints = typing.get_type_hints(options_class)
    names = {item.name for item in dataclasses.fields(options_class)}  # type: ignore[arg-type]
    base = parser.get_defaults()
    try:
        config_path = _last_value(argv, "--config")
        if config_path is not None:
            values = read_config(config_path, names, _scripts_by_option())
            values = {name: _as_meant(name, value, hints[name]) for name, value in values.items()}
            base = parser.parse_object(values, namespace=base)
        for position, argument in enumerate(argv):
            flag, equals, value = argument.partition("=")
            name = flag[2:].split(".", 1)[0].rstrip("+")
            if not argument.startswith("--") or not name or name in {"config", "help"}:
                continue
            if name not in names:
                raise OptionError(f"unknown option --{name}{did_you_mean(name, names, '--')}")
            if equals and flag[2:] in names:
                argv[position] = f"{flag}={_as_meant(name, value, hints[name])}"
            elif flag[2:] in names and position + 1 < len(argv):
                argv[position + 1] = _as_meant(name, argv[position + 1], hints[name])
        parsed: Namespace = parser.parse_args(argv, namespace=base)
        options = options_class(**{name: parsed[name] for name in names})
        check_ranges(options)
        check_trackers(getattr(options, "report_to", ()))
    except OptionError as error:
        parser.error(str(error))
    return options


def _last_value(argv: Sequence[str], flag: str) -> str | None:
    value = None
    for position, argument in enumerate(argv):
        if argument == flag and position + 1 < len(argv):
            value = argv[position + 1]
        elif argument.startswith(flag + "="):
            value = argument.split("=", 1)[1]
    return value
