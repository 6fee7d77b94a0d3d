"""The options that all recipes share, and how they are read.

A recipe declares one flat, keyword-only dataclass that inherits from the groups here. Every field becomes a flag of
the same name. Any other flag is a setting of the norm. `--config FILE.yaml` sets any of them, and flags override the
file. Paths in a config file (options ending in `_file`, the file of a norm) are relative to that file, paths on the
command line to the current directory.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import re
import sys
import types
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from common import require
from common.endings import EXIT_CODES, USE_EXIT_CODES, OptionError, is_first_on_machine, plain_warnings
from hf_adanorm.norms import BUILT_IN, STOCK, check_settings, did_you_mean, parse_value, resolve_norm, settings_of

T = TypeVar("T")

Change = Literal["results", "onward", "nothing"]


def option(default: Any, help: str, *, changes: Change = "results", within: str = "") -> Any:  # noqa: A002
    """Declare a dataclass field with its default and the text that `--help` shows.

    Args:
        changes: what another value changes. "results": weights or scores; a resumed run and all runs of a comparison
            need the same value. "onward": later steps; a resumed run may change it, the runs of a comparison must
            agree. "nothing": neither.
        within: the interval that a number must be in, such as "[0, 1)" or "(0, inf)".
    """
    metadata = {"help": help, "changes": changes, "within": within}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def positive(text: str) -> int:
    """Return a number of at least 1. Raises ValueError, which argparse reports."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def saved_model_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that all scripts share that apply a saved model."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=USE_EXIT_CODES
    )
    parser.add_argument("--model", required=True, help="folder or Hub name of the saved model")
    parser.add_argument("--batch_size", type=positive, default=32)
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], default="no")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="execute the Python files in the model's folder"
    )
    parser.add_argument("--quiet", action="store_true", help="print no result")
    return parser


def options_that_change(options_class: type[Any], *changes: Change) -> frozenset[str]:
    """Return the names of the options whose value changes one of these; see `option`."""
    fields = dataclasses.fields(options_class)
    return frozenset(item.name for item in fields if item.metadata["changes"] in changes)


def check_ranges(options: Any) -> None:
    """Raise OptionError for a number outside the interval of its option."""
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


@dataclass(kw_only=True)
class PatchOptions:
    """What `patch_model` is asked to do; `norm="layernorm"` is the unpatched control."""

    norm: str = option(
        "adanorm",
        f"norm to train with: {', '.join(BUILT_IN)}, FILE.py:CLASS or PACKAGE.MODULE:CLASS; layernorm trains the "
        "unpatched control. --SETTING VALUE sets a setting of the norm, such as --k 0.05 (see hf-adanorm norms)",
    )
    norm_settings: dict[str, Any] = option(
        {}, "settings of the norm, as {k: 0.05}, or of one norm, as {adanorm: {C: 2}}"
    )
    norm_schedule: list[str] = option(
        [],
        "change settings over steps, each as SETTING:SHAPE:FROM:TO[:OVER], such as k:linear:0:0.1:0.3; SHAPE is "
        "linear or cosine, OVER a share of all steps (0.3) or a number of steps (300), by default all",
    )
    eps: float | None = option(None, "added to the variance; by default what the replaced norm uses")
    include: list[str] | str | None = option(
        None, "swap only norms whose name ends so; re: starts a regular expression"
    )
    exclude: list[str] | str | None = option(None, "leave these norms as they are; written like include")
    layers: list[int] | None = option(None, "swap only norms in these layers, counted from 0, negative from the end")
    targets: Literal["auto", "layernorm", "rmsnorm", "all"] = option(
        "auto", "kind of norm to swap; auto: those on the residual stream"
    )
    affine: Literal["drop", "fold"] = option("drop", "what becomes of trained gains and biases")
    unfoldable: Literal["keep", "approximate", "calibrate", "raise"] = option(
        "keep", "with affine fold: what to do with a norm that something else reads too"
    )
    tied: Literal["keep", "untie"] = option("keep", "with affine fold: what to do with a norm whose head is tied")
    tolerance: float | None = option(None, "with affine fold: largest relative change of an output", within="[0, inf)")
    calibrate_k: bool = option(False, "AdaNorm: choose for each norm the largest k, up to --k, that a batch allows")


@dataclass(kw_only=True)
class OptimizationOptions:
    """Optimizer, schedule and length of the training."""

    learning_rate: float = option(5e-4, "peak learning rate", within="(0, inf)")
    lr_schedule: Literal["linear", "cosine", "constant", "inverse_sqrt"] = option("linear", "shape after the warm-up")
    warmup_steps: int = option(0, "warm-up in optimizer steps; wins over warmup_ratio", within="[0, inf)")
    warmup_ratio: float = option(0.0, "warm-up as a share of all steps", within="[0, 1]")
    warmup_init_lr: float = option(0.0, "learning rate at the first warm-up step", within="[0, inf)")
    min_lr: float = option(0.0, "learning rate at the end of a linear or cosine schedule", within="[0, inf)")
    weight_decay: float = option(0.0, "AdamW weight decay; not applied to biases and norms", within="[0, inf)")
    adam_beta1: float = option(0.9, "Adam beta 1", within="[0, 1)")
    adam_beta2: float = option(0.999, "Adam beta 2", within="[0, 1)")
    adam_epsilon: float = option(1e-8, "Adam epsilon", within="[0, inf)")
    fused_adam: bool | None = option(None, "AdamW's update as one kernel, on a GPU; by default torch decides")
    max_grad_norm: float = option(1.0, "clip the gradient to this norm; 0 clips nothing", within="[0, inf)")
    gradient_accumulation_steps: int = option(1, "micro-batches in one optimizer step", within="(0, inf)")
    num_epochs: int = option(3, "passes over the training data", within="(0, inf)")
    max_steps: int | None = option(None, "number of optimizer steps; wins over num_epochs", within="(0, inf)")
    on_nonfinite: Literal["stop", "skip"] = option(
        "stop", "what to do with a step whose loss or gradient is NaN or infinite", changes="onward"
    )
    on_spike: Literal["report", "stop", "skip"] = option(
        "report", "what to do with a step whose loss or gradient is a spike", changes="onward"
    )
    spike_sigmas: float = option(
        6.0,
        "standard deviations above the mean of the last 128 steps that make a spike",
        changes="onward",
        within="(0, inf)",
    )


@dataclass(kw_only=True)
class RunOptions:
    """Where a run writes, what it can be resumed from, how it is launched and watched."""

    output_dir: str = option("outputs/run", "folder for checkpoints, best model and results.json", changes="nothing")
    overwrite_output_dir: bool = option(False, "start afresh, delete the run in output_dir", changes="nothing")
    seed: int = option(1, "seed of initialization, dropout and the order of the data", within="[0, 4294967295]")
    eval_steps: int | None = option(None, "evaluate every N steps; by default after every epoch", within="(0, inf)")
    early_stopping_patience: int | None = option(
        None, "stop after N evaluations in a row without a better score", within="(0, inf)"
    )
    checkpointing_steps: int | None = option(
        None, "save every N steps; by default after every evaluation", changes="onward", within="(0, inf)"
    )
    save_total_limit: int = option(1, "keep the newest N checkpoints", changes="nothing", within="(0, inf)")
    logging_steps: int = option(50, "log the training loss every N steps", changes="nothing", within="(0, inf)")
    report_to: list[str] = option([], "trackers, by accelerate's names, for instance tensorboard", changes="nothing")
    watch_norms: int | None = option(
        None, "every N steps, log what each norm does to the trackers", changes="nothing", within="(0, inf)"
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(None, "precision; by default accelerate's setting")
    compile: bool = option(False, "run the model through torch.compile")
    dataloader_workers: int = option(0, "processes that collate batches", changes="nothing", within="[0, inf)")
    push_to_hub: bool = option(False, "push the best model, with its card and results, to the Hub", changes="nothing")
    hub_model_id: str | None = option(None, "the repository to push to, such as me/my-model", changes="nothing")
    hub_private: bool = option(False, "make that repository private if it is new", changes="nothing")


# ------------------------------------------------------------------------------------------------------ reading


@functools.cache
def _hints(options_class: type[Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(options_class)
    return {item.name: hints[item.name] for item in dataclasses.fields(options_class)}


def _kinds(hint: Any) -> tuple[Any, ...]:
    """Return the alternatives of a type."""
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list"}
EXPECTED |= {dict: "a mapping", types.NoneType: "null"}


def _expected(hint: Any) -> str:
    said = []
    for kind in _kinds(hint):
        origin = typing.get_origin(kind)
        said += map(str, typing.get_args(kind)) if origin is Literal else [EXPECTED[origin or kind]]
    return ", ".join(said[:-1]) + (" or " if said[:-1] else "") + said[-1]


def _as_kind(value: Any, kind: Any) -> Any:
    """Return a YAML value as one of `kind`. Raises ValueError if it is not."""
    origin = typing.get_origin(kind) or kind
    if origin is Literal and value in typing.get_args(kind):
        return value
    if origin is list and isinstance(value, list):
        (inner,) = typing.get_args(kind)
        if inner is str:  # names may look like numbers
            value = [str(item) if type(item) is int else item for item in value]
        return [_as_kind(item, inner) for item in value]
    if origin is float and not isinstance(value, bool):
        return float(value)  # YAML reads 1e-3, without a point, as text
    if origin in (bool, int, str, dict, types.NoneType) and type(value) is origin:
        return value
    raise ValueError(value)


def convert(name: str, value: Any, hint: Any, *, is_text: bool = False) -> Any:
    """Return a value of a config as the type `hint` of the option `name`; with `is_text`, the text of a flag.

    A single value where a list is expected becomes a list of one. Raises OptionError naming the option and what was
    expected.
    """
    kinds, given = _kinds(hint), value
    is_list = any(typing.get_origin(kind) is list for kind in kinds)
    if is_text:
        if types.NoneType in kinds and value == "null":
            return None
        lists_text = is_list and typing.get_args(next(k for k in kinds if typing.get_origin(k) is list)) == (str,)
        chosen = any(typing.get_origin(kind) is Literal for kind in kinds)
        if not (str in kinds or lists_text or chosen) or (is_list and value.startswith(("[", "- "))):
            value = _from_yaml(name, value)
    if is_list and str not in kinds and not isinstance(value, (list, types.NoneType)):
        value = [value]
    for kind in kinds:
        try:
            return _as_kind(value, kind)
        except (ValueError, TypeError):
            continue
    choices = [choice for kind in kinds if typing.get_origin(kind) is Literal for choice in typing.get_args(kind)]
    raise OptionError(f"--{name}: expected {_expected(hint)}, got {given!r}{did_you_mean(given, choices)}")


def _from_yaml(name: str, text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise OptionError(f"--{name}: {text!r} is not YAML: {' '.join(str(error).split())}") from None


def resolve_settings(options: Any, flags: Mapping[str, Any]) -> None:
    """Split `options.norm` into the norm alone and `options.norm_settings`, the settings of this norm alone.

    Flags take precedence over settings in the norm's text (`adanorm:k=0.05`), these over a config's `norm_settings`.
    The control takes no settings. Raises OptionError for an unknown norm, setting or flag.
    """
    norm, *parts = re.split(r"[:,](?=\w+=)", options.norm)
    given = {
        name: value
        for name, value in options.norm_settings.items()
        if norm != STOCK and not (name in {*BUILT_IN, STOCK} or ":" in name)
    }
    given |= options.norm_settings.get(norm) or {}
    for part in parts:
        name, _, value = part.partition("=")
        given[name] = parse_value(value)
    options.norm, options.norm_settings = norm, {**given, **flags}
    if norm in {*BUILT_IN, STOCK} and not options.norm_settings:
        return  # without importing torch
    try:
        known = {} if norm == STOCK else settings_of(resolve_norm(norm)[0])
        if unknown := [name for name in flags if name not in known]:
            has = f"has the settings {', '.join(known)}" if known else "has no settings"
            near = did_you_mean(f"--{unknown[0]}", [f"--{name}" for name in (*_hints(type(options)), *known)])
            raise OptionError(f"unknown option --{unknown[0]}: {norm} {has}{near}")
        if norm != STOCK:
            check_settings(resolve_norm(norm)[0], options.norm_settings)
    except OptionError:
        raise
    except (ValueError, TypeError, OSError) as error:
        raise OptionError(f"--norm {norm}: {error}") from error


class _Loader(yaml.SafeLoader):
    """YAML in which a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := sorted({key for key in keys if isinstance(key, str) and keys.count(key) > 1}):
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} is repeated", node.start_mark)
        return super().construct_mapping(node, deep)


def read_config(path: str | Path, names: Collection[str] | None = None) -> Any:
    """Return the options of a YAML file by name, with relative `*_file` paths resolved against the file's folder.

    Raises OptionError for a file that is missing, is not a YAML mapping, or contains an option that is not in `names`.
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
        raise OptionError(f"--config {path}: expected a mapping of options to values, got {type(values).__name__}")
    for key in values:
        if names is not None and key not in names:
            raise OptionError(f"--config {path}: unknown option {key!r}{did_you_mean(key, names)}")
    if values.get("mixed_precision") is False:
        values["mixed_precision"] = "no"  # YAML reads an unquoted no as false
    for key, value in values.items():
        if str(key).endswith("_file") and isinstance(value, str) and not Path(value).is_absolute():
            values[key] = str((path.parent / value).resolve())
    norm = values.get("norm")
    if isinstance(norm, str) and ".py:" in norm and not Path(norm).is_absolute():
        values["norm"] = str((path.parent / norm).resolve())
    return values


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        if is_first_on_machine():
            print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def build_parser(options_class: type[Any], description: str | None = None) -> argparse.ArgumentParser:
    """Return a parser with one flag for each field of `options_class`, and `--config`. Flags are read as text."""
    parser = _Parser(
        usage="%(prog)s [--config FILE] [--OPTION VALUE ...]",
        description=description,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file that sets any of the options below")
    groups = {}
    for base in options_class.__mro__:
        if dataclasses.is_dataclass(base) and vars(base).get("__annotations__"):
            group = parser.add_argument_group(base.__name__.removesuffix("Options").lower())
            groups.update(dict.fromkeys(vars(base)["__annotations__"], group))
    defaults = options_class()
    for item in dataclasses.fields(options_class):
        hint, default = _hints(options_class)[item.name], getattr(defaults, item.name)
        said = "" if default in (None, [], {}, "") else f" (default: {yaml.safe_dump(default).splitlines()[0]})"
        is_list = any(typing.get_origin(kind) is list for kind in _kinds(hint))
        groups[item.name].add_argument(
            f"--{item.name}",
            nargs="+" if is_list else None,
            metavar=_metavar(hint),
            help=(item.metadata["help"] + said).replace("%", "%%"),
        )
    return parser


def _metavar(hint: Any) -> str:
    kind = _kinds(hint)[0]
    if typing.get_origin(kind) is Literal:
        return "{" + ",".join(typing.get_args(kind)) + "}"
    return {bool: "true|false", int: "N", float: "X", dict: "YAML"}.get(typing.get_origin(kind) or kind, "TEXT")


def parse_options(options_class: type[T], argv: Sequence[str] | None = None, description: str | None = None) -> T:
    """Read the command line (by default sys.argv) into `options_class`. Bad input ends the process with code 2."""
    plain_warnings()
    parser = build_parser(options_class, description)
    demo = getattr(options_class, "demo", None)
    if argv is None and len(sys.argv) == 1 and demo:
        parser.error(f"there is nothing to train on: try --config recipes/configs/{demo}, or see --help")
    require(*getattr(options_class, "needs", ()))
    hints = _hints(options_class)
    given, rest = parser.parse_known_args(argv)
    flags = vars(given)
    values: dict[str, Any] = {}
    try:
        if config := flags.pop("config", None):
            values = read_config(config, hints)
            values = {name: convert(name, value, hints[name]) for name, value in values.items()}
        for name, value in flags.items():
            texts = value if isinstance(value, list) else [value]
            found = [convert(name, text, hints[name], is_text=True) for text in texts]
            joined = [item for part in found for item in (part if isinstance(part, list) else [part])]
            values[name] = joined if len(found) > 1 else found[0]
        settings = {}
        for name, text in _unknown(rest):
            mapping, dot, key = name.partition(".")
            if not dot:
                settings[name] = parse_value(text)
            elif mapping in hints and dict in map(typing.get_origin, _kinds(hints[mapping])):
                values[mapping] = {**values.get(mapping, {}), key: _from_yaml(name, text)}
            else:
                raise OptionError(
                    f"unknown option --{name}{did_you_mean(f'--{mapping}', [f'--{hint}' for hint in hints])}"
                )
        options = options_class(**values)
        check_ranges(options)
        resolve_settings(options, settings)
    except OptionError as error:
        parser.error(str(error))
    return options


def _unknown(words: Sequence[str]) -> Iterable[tuple[str, str]]:
    """Yield the flags that argparse does not know, with their values. Raises OptionError for anything else."""
    words = list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise OptionError(f"unexpected argument {word!r}")
        name, equals, value = word[2:].partition("=")
        yield name, value if equals else words.pop(0) if words and not words[0].startswith("--") else ""
