"""The command line: `hf-adanorm inspect | norms | patch | fold | unpatch | run`.

An error is one line on stderr and exit code 2. `--json` prints one JSON object on stdout. Tokens come from `hf auth
login` or HF_TOKEN; no option takes one.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect as inspection
import json
import os
import re
import shlex
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from .norms import did_you_mean, norm_names, parse_value, resolve_norm, settings_of
from .options import CHOICES, HELP

# -------------------------------------------------------------------------------------------------------- the commands


def inspect(args: Namespace) -> None:
    """List every norm of a model and whether patch would swap it.

    It reads the config alone, and no weights. For the folder of a patched model, it also checks the code in it, which
    trust_remote_code=True executes.
    """
    from . import AdaNormSpec, inspect_model
    from .conversion import Source, empty_model, load_config
    from .saving import inspect_code

    config = load_config(Source(args.name, args.revision, args.architecture, args.trust_remote_code))
    data, folder = getattr(config, "adanorm", None), Path(args.name)
    spec = AdaNormSpec.from_dict(data) if data else None
    code = inspect_code(folder, spec) if folder.is_dir() else None
    try:
        report = inspect_model(empty_model(config), **_chosen(args, _SELECTION))
        text, found = str(report), report.to_dict()
    except ValueError:
        if spec is None or not spec.classes:
            raise
        # The classes are in the folder's code, which inspect does not run: the spec alone says what is swapped.
        text, found = "norms of the folder's own code, which inspect does not run:", {"adanorm": data}
        text += "".join(f"\n{group.norm} {group.settings}: {', '.join(group.modules)}" for group in spec.groups)
    if args.json:
        print(json.dumps({"model": args.name, "code": code and dataclasses.asdict(code), **found}))
    else:
        print("\n".join([text, *(_describe(code) if code is not None else ())]))


def norms(args: Namespace) -> None:
    """List the norms and their settings."""
    found = {}
    for name in args.norm or norm_names():
        cls, given = resolve_norm(name)
        found[name] = (cls, {**settings_of(cls), **given})
    required = inspection.Parameter.empty
    if args.json:
        plain = {name: {k: None if v is required else v for k, v in own.items()} for name, (_, own) in found.items()}
        print(json.dumps(plain))
        return
    for name, (cls, settings) in found.items():
        about = next((line.strip() for line in (cls.__doc__ or "").splitlines() if line.strip()), cls.__name__)
        print(f"{name}\n    {about}")
        for key, value in settings.items():
            also = f", {_option('no_' + key)}" if isinstance(value, bool) else ""
            print(f"    {_option(key)}{also}  ({'required' if value is required else f'default: {value}'})")


def patch(args: Namespace) -> None:
    """Swap the norms of a model and save it.

    Everything that belongs to the model is saved with it, in the dtype of the checkpoint. --SETTING VALUE sets a
    setting of the norm, such as --k 0.05; `hf-adanorm norms` lists the settings of each norm.
    """
    from . import Fold, inspect_model, patch_model

    cls, settings = resolve_norm(args.norm)
    settings |= {key.removeprefix(_SETTING): value for key, value in vars(args).items() if key.startswith(_SETTING)}
    how = Fold(**_chosen(args, _FOLD))
    if args.affine == "drop" and how != Fold():
        raise ValueError("--unfoldable, --tied and --tolerance go with --affine fold, got --affine drop")
    options = {**settings, **_chosen(args, ("eps", "centered", *_SELECTION))}

    def check(empty: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patch_model(empty, cls, **options)  # a fold runs the model, which a meta model cannot do

    def change(model: Any) -> tuple[str, dict[str, Any]]:
        patch_model(model, cls, **options, affine=how if args.affine == "fold" else "drop")
        swapped = inspect_model(model).num_swapped
        return f"{swapped} norms swapped for {args.norm}", {"norm": args.norm, "swapped": swapped}

    _convert(args, check, change, folds=args.affine == "fold")


def fold(args: Namespace) -> None:
    """Fold gains and biases into the layers that read them, and save.

    Where no bias had to be added, the result is a plain stock model, which every engine loads.
    """
    from . import fold_affine

    def change(model: Any) -> tuple[str, dict[str, Any]]:
        report = fold_affine(model, **_chosen(args, _FOLD))
        counts = {action: len(report.names(action)) for action in ("folded", "approximated", "kept")}
        more = {"untied": report.untied, "difference": report.difference, "stock": report.is_stock}
        return str(report), counts | more

    _convert(args, None, change, folds=True)


def unpatch(args: Namespace) -> None:
    """Put the stock norms back and save the model.

    A saved model does not contain the gains and biases from before the patch: they start from 1 and 0.
    """
    from . import is_patched, unpatch_model

    def check(empty: Any) -> None:
        if not is_patched(empty):
            raise ValueError(f"{args.name} has no swapped norms: there is nothing to undo")

    def change(model: Any) -> tuple[str, dict[str, Any]]:
        unpatch_model(model)
        return "stock norms", {}

    _convert(args, check, change)


def run(args: Namespace) -> Callable[[], Any]:
    """Run the command of another package with hf_adanorm imported.

    The command then loads patched models, for example: hf-adanorm run transformers serve my-model. It runs in this
    process. Forked workers inherit the import. Launchers such as torchrun start new processes, which do not: write
    `import hf_adanorm` in the script that they run.
    """
    found = {entry.name: entry for entry in metadata.entry_points(group="console_scripts")}
    tool = args.tool
    if tool not in found:
        raise ValueError(f"{tool!r} is not a command of an installed Python package{did_you_mean(tool, found)}")

    def start() -> Any:
        importlib.import_module("hf_adanorm")
        sys.argv = [tool, *args.arguments]
        return found[tool].load()()

    return start


# --------------------------------------------------------------------------------------------------------- the options


class _Parser(argparse.ArgumentParser):
    """A parser that raises ValueError, where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


_SETTING = "setting: "  # begins the names of parsed settings, so that they differ from those of options
_OPTIONS: dict[str, dict[str, Any]] = {
    "norm": {"default": "adanorm", "help": "one that `hf-adanorm norms` lists (default: adanorm), or FILE.py:CLASS"},
    "eps": {"type": float, "help": HELP["eps"]},
    "centered": {"action": argparse.BooleanOptionalAction, "help": HELP["centered"]},
    "include": {"action": "append", "metavar": "PATTERN", "help": HELP["include"]},
    "exclude": {"action": "append", "metavar": "PATTERN", "help": HELP["exclude"]},
    "layers": {"action": "append", "type": int, "metavar": "N", "help": HELP["layers"]},
    "targets": {"default": "auto", "choices": CHOICES["targets"], "help": HELP["targets"]},
    "affine": {"default": "drop", "choices": CHOICES["affine"], "help": HELP["affine"]},
    # A fold by calibration needs data, which only the Python interface takes.
    "unfoldable": {"default": "keep", "choices": ("keep", "approximate", "raise"), "help": HELP["unfoldable"]},
    "tied": {"default": "keep", "choices": CHOICES["tied"], "help": HELP["tied"]},
    "tolerance": {"type": float, "help": HELP["tolerance"]},
    "revision": {"help": "a branch, tag or commit of the repository"},
    "architecture": {"metavar": "CLASS", "help": "the transformers class to load; by default that of the config"},
    "trust-remote-code": {"action": "store_true", "help": "run the author's files in the checkpoint, such as norms"},
    "push-to-hub": {"metavar": "ID", "help": "push the result to this repository"},
    "private": {"action": "store_true", "help": "make that repository private if it is new"},
    "json": {"action": "store_true", "help": "print one JSON object"},
}
_SOURCE = ("revision", "architecture", "trust-remote-code")
_SELECTION = ("include", "exclude", "layers", "targets")
_FOLD, _PUSH = ("unfoldable", "tied", "tolerance"), ("push-to-hub", "private")
_COMMANDS: dict[Callable[[Namespace], Any], tuple[str, ...]] = {
    inspect: (*_SELECTION, *_SOURCE, "json"),
    norms: ("json",),
    patch: ("norm", "eps", "centered", *_SELECTION, "affine", *_FOLD, *_SOURCE, *_PUSH, "json"),
    fold: (*_FOLD, *_SOURCE, *_PUSH, "json"),
    unpatch: (*_SOURCE, *_PUSH, "json"),
    run: (),
}


def parse(argv: list[str]) -> Namespace:
    """Return the parsed command line, with the function to call as `function`.

    Raises:
        ValueError: what the command line gets wrong, in one line.
    """
    parser = _Parser(prog="hf-adanorm", description="Swap the norms of transformers models.", allow_abbrev=False)
    version = metadata.version("hf-adanorm") if "--version" in argv else ""  # it may run without being installed
    parser.add_argument("--version", action="version", version=f"hf-adanorm {version}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    made = {}
    for function, options in _COMMANDS.items():
        text = inspection.getdoc(function) or ""
        about: dict[str, Any] = {"help": text.partition("\n")[0], "description": text}
        command = commands.add_parser(function.__name__, **about, allow_abbrev=False)
        command.set_defaults(function=function)
        if function is norms:
            command.add_argument("norm", nargs="*", metavar="NORM", help="such as my_norms.py:Derf; by default all")
        elif function is run:
            command.add_argument("tool", metavar="TOOL", help="a command of an installed package")
            command.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGS", help="its arguments")
        else:
            command.add_argument("name", metavar="NAME_OR_PATH", help="a model's id on the Hub, or its folder")
        if function in (patch, fold, unpatch):
            command.add_argument("out", metavar="OUT", type=Path, help="the folder to write: a new or an empty one")
        for option in options:
            command.add_argument(f"--{option}", **_OPTIONS[option])
        made[function.__name__] = command
    if not argv:
        parser.print_help(sys.stderr)
        sys.exit(2)
    if argv[0] == "patch" and not {"-h", "--help"} & set(argv):
        _add_settings(made["patch"], argv)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        name = args.function.__name__
        known = [*made[name]._option_string_actions]
        wrong = next((word.partition("=")[0] for word in unknown if word.startswith("-")), unknown[0])
        of = f" or a setting of {args.norm}" if args.function is patch else ""
        raise ValueError(f"{wrong} is not an option of hf-adanorm {name}{of}{did_you_mean(wrong, known)}")
    return args


def _add_settings(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    """Add an option for each setting of the norm that the command line names."""
    first = _Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--norm", **_OPTIONS["norm"])
    cls, _ = resolve_norm(first.parse_known_args(argv)[0].norm)
    for key, default in settings_of(cls).items():
        if _option(key) not in parser._option_string_actions:
            is_flag = isinstance(default, bool)
            kind: Any = {"action": argparse.BooleanOptionalAction} if is_flag else {"type": parse_value}
            parser.add_argument(_option(key), dest=_SETTING + key, default=argparse.SUPPRESS, **kind)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def main(argv: list[str] | None = None) -> None:
    """Run a command and end with SystemExit: 0, 2 after an error, or 1 if nobody reads the output any more."""
    show_warning, warnings.showwarning = warnings.showwarning, _show_warning
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        start = args.function(args)
        sys.stdout.flush()
    except BrokenPipeError:  # who reads the output, such as head, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the last flush would fail
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        message = "; ".join([_as_options(str(error)) or type(error).__name__, *getattr(error, "__notes__", ())])
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)
    finally:
        warnings.showwarning = show_warning
    code = start() if start is not None else 0  # another program: its errors and exit codes are its own
    sys.exit(code if isinstance(code, int) else 0)


# --------------------------------------------------------------------------------------------------------- small parts


def _chosen(args: Namespace, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names}


def _describe(code: Any) -> Iterator[str]:
    """Describe the code in a model's folder, which trust_remote_code=True executes, in lines."""
    loader = f"the loader of hf_adanorm {importlib.import_module('hf_adanorm').__version__}"
    if code.loader == "ours":
        yield f"modeling_adanorm.py: {loader}, unmodified"
    elif code.loader == "modified":
        yield f"modeling_adanorm.py: NOT {loader}: read it before you load it (SHA-256 {code.loader_sha256})"
    if code.entry == "modified":
        yield "the entry file that config.json names was changed by hand: read it before you load it"
    for file, sha in code.files.items():
        saved = {None: "not part of the model", sha: "as saved"}.get(
            code.expected.get(file), "CHANGED since it was saved"
        )
        yield f"{file}: code of the model's author, {saved} (SHA-256 {sha})"


def _convert(
    args: Namespace,
    check: Callable[[Any], None] | None,
    change: Callable[[Any], tuple[str, dict[str, Any]]],
    *,
    folds: bool = False,
) -> None:
    """Load a model, change it, save it with all that belongs to it, push it if asked, and print what was done.

    Args:
        check: raises for a wrong option; gets the model without weights, before they are loaded.
        change: changes the model, and returns what it did as text and as data.
        folds: refuse weights that the model does not use, which a fold would leave wrong.
    """
    from . import conversion, write_model_card

    conversion.check_push(args.push_to_hub)
    source = conversion.Source(args.name, args.revision, args.architecture, args.trust_remote_code)
    config = conversion.load_config(source)
    with conversion.new_folder(args.out) as folder:
        if check is not None:
            check(conversion.empty_model(config))
        model = conversion.load_model(source, config, folds=folds)
        text, data = change(model)
        left = [name for name in conversion.save_model(model, source, folder) if not (folder / name).exists()]
        base = source.name if not Path(source.name).exists() else None
        write_model_card(folder, base_model=base, command=shlex.join(["hf-adanorm", *sys.argv[1:]]))
    url = conversion.push_folder(args.out, args.push_to_hub, args.private) if args.push_to_hub else None
    name = type(model).__name__
    if args.json:
        print(json.dumps({"out": str(args.out), "class": name, **data, "not_copied": left, "pushed": url}))
        return
    print(f"{args.out}: {name}, {text}")
    if left:
        print(f"not copied: {', '.join(left)}")
    if url:
        print(f"pushed: {url}")


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {' '.join(_as_options(str(message)).split())}", file=sys.stderr)


def _as_options(message: str) -> str:
    """Write the arguments that a message of the library names, such as targets="all", as options."""
    names = "|".join(("norm", *HELP))
    message = message.replace("trust_remote_code=True", "--trust-remote-code")
    return re.sub(rf"""\b({names})=(["']?)([\w.-]*\w)\2""", lambda m: f"{_option(m[1])} {m[3]}", message)


if __name__ == "__main__":
    main()
