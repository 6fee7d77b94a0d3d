"""The command line: `hf-adanorm inspect | norms | patch | fold | unpatch | card | run`.

An error is one line on stderr and exit code 2. `--json` prints one JSON object on stdout. Tokens come from `hf auth
login` or HF_TOKEN; no option takes one.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import json
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, cast

try:
    import typer
except ImportError:  # the library itself needs torch and transformers only
    sys.exit("error: the command line needs typer and rich: pip install typer rich")

from .norms import norm_names, parse_value, resolve_norm, settings_of, title_of
from .options import HELP

# Programs that start new processes, which do not import what this process imported.
LAUNCHERS = ("accelerate", "torchrun", "deepspeed", "ray", "horovodrun")

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)

Name = Annotated[str, typer.Argument(metavar="NAME_OR_PATH", help="A model's id on the Hub, or its folder.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write: a new or an empty one.")]
Revision = Annotated[str | None, typer.Option(help="A branch, tag or commit of the repository.")]
Architecture = Annotated[
    str | None, typer.Option(metavar="CLASS", help="The transformers class to load; by default that of the config.")
]
Include = Annotated[list[str] | None, typer.Option(help=f"{HELP['include']}. Repeat it for several patterns.")]
Exclude = Annotated[list[str] | None, typer.Option(help="Leave these norms unchanged; written like --include.")]
Layers = Annotated[list[int] | None, typer.Option(help="Only norms of this layer, negative from the end; repeatable.")]
Targets = Annotated[str, typer.Option(help=f"{HELP['targets']}: auto, layernorm, rmsnorm or all.")]
Unfoldable = Annotated[
    str, typer.Option(help="What to do with a norm that does not fold exactly: keep, approximate or raise.")
]
Tied = Annotated[str, typer.Option(help="A head that is tied to an embedding: keep, or untie it to fold into a copy.")]
Tolerance = Annotated[
    float | None, typer.Option(help="Largest change of an output by a fold, relative to its largest value.")
]
GgufFile = Annotated[str | None, typer.Option(metavar="FILE", help="The GGUF file in NAME_OR_PATH to load.")]
PushToHub = Annotated[str | None, typer.Option(metavar="ID", help="Push the result to this repository.")]
Private = Annotated[bool, typer.Option(help="Make that repository private if it is new.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            print(f"hf-adanorm {metadata.version('hf-adanorm')}")
        except metadata.PackageNotFoundError:  # run from a folder, not installed
            print(f"hf-adanorm {importlib.import_module('hf_adanorm').__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Swap the norms of transformers models for AdaNorm, its relatives, or a norm of your own."""


@app.command(short_help="List every norm of a model and whether patch would swap it.")
def inspect(
    name: Name,
    revision: Revision = None,
    architecture: Architecture = None,
    include: Include = None,
    exclude: Exclude = None,
    layers: Layers = None,
    targets: Targets = "auto",
    gguf_file: GgufFile = None,
    as_json: Json = False,
) -> None:
    """List every norm of a model and whether patch would swap it, from the config alone: no weights are loaded.

    For the folder of a patched model, check the loader modeling_adanorm.py that lies in it, too.
    """
    from . import AdaNormSpec, inspect_model
    from .conversion import Source, empty_model, load_config
    from .saving import inspect_code

    source = Source(name=name, revision=revision, gguf_file=gguf_file, architecture=architecture)
    config = load_config(source)
    report = inspect_model(
        empty_model(config),
        include=include or None,
        exclude=exclude or None,
        layers=layers or None,
        targets=targets,  # type: ignore[arg-type]
    )
    spec = getattr(config, "adanorm", None)
    code = inspect_code(Path(name), spec and AdaNormSpec.from_dict(spec)) if Path(name).is_dir() else None
    if as_json:
        _print_json({"model": name, "code": code and dataclasses.asdict(code), **report.to_dict()})
        return
    print(report)
    if code is not None:
        print("".join(f"{line}\n" for line in _describe(code)), end="")


@app.command(short_help="List the norms and their settings.")
def norms(
    norm: Annotated[list[str] | None, typer.Argument(metavar="[NORM]...", help="Such as my_norms.py:Derf.")] = None,
    as_json: Json = False,
) -> None:
    """List the norms that patch knows with their settings and defaults, or those of the norms given."""
    found = {}
    for each in norm or norm_names():
        cls, given = resolve_norm(each)
        found[each] = (cls, {**settings_of(cls), **given})
    if as_json:
        _print_json({each: settings for each, (_, settings) in found.items()})
        return
    for each, (cls, settings) in found.items():
        about = next((line.strip() for line in (cls.__doc__ or "").splitlines() if line.strip()), title_of(each))
        options = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in settings.items())
        print(f"{each}\n    {about}\n    {options or 'no settings'}")


@app.command(short_help="Swap the norms of a model and save it.")
def patch(
    name: Name,
    out: Out,
    norm: Annotated[str, typer.Option(help="A name that `hf-adanorm norms` lists, or FILE.py:CLASS.")] = "adanorm",
    setting: Annotated[list[str] | None, typer.Option(hidden=True)] = None,
    eps: Annotated[float | None, typer.Option(help=HELP["eps"])] = None,
    centered: Annotated[bool | None, typer.Option(help=HELP["centered"])] = None,
    revision: Revision = None,
    architecture: Architecture = None,
    include: Include = None,
    exclude: Exclude = None,
    layers: Layers = None,
    targets: Targets = "auto",
    affine: Annotated[
        str, typer.Option(help="Trained gains and biases: drop, or fold (see hf-adanorm fold).")
    ] = "drop",
    unfoldable: Unfoldable = "keep",
    tied: Tied = "keep",
    tolerance: Tolerance = None,
    gguf_file: GgufFile = None,
    push_to_hub: PushToHub = None,
    private: Private = False,
    as_json: Json = False,
) -> None:
    """Swap the norms of a model and save it, with everything that belongs to it, in the dtype of its checkpoint.

    --SETTING VALUE sets a setting of the norm, such as --k 0.05; `hf-adanorm norms` lists them.
    """
    from . import inspect_model, patch_model
    from .conversion import Source, check_push, empty_model, load_config, load_model, new_folder, refuse_unused

    cls, settings = resolve_norm(norm)
    settings |= _settings(norm, cls, setting or [])
    check_push(push_to_hub)
    source = Source(name=name, revision=revision, gguf_file=gguf_file, architecture=architecture)
    config = load_config(source)
    options: dict[str, Any] = {
        **settings,
        "eps": eps,
        "centered": centered,
        "include": include or None,
        "exclude": exclude or None,
        "layers": layers or None,
        "targets": targets,
    }
    how, wanted = _fold(unfoldable, tied, tolerance), cast("Any", affine)
    if affine != "fold" and how != type(how)():
        raise ValueError(f"--unfoldable, --tied and --tolerance go with --affine fold, got --affine {affine}")
    with new_folder(out) as folder:
        # Find a wrong option before the weights are loaded. A fold runs the model, which a meta model cannot do.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patch_model(empty_model(config), cls, **options, affine="drop" if affine == "fold" else wanted)
        model = load_model(source, config)
        if affine == "fold":
            refuse_unused(source)
        patch_model(model, cls, **options, affine=how if affine == "fold" else wanted)
        num_swapped = inspect_model(model).num_swapped
        left = _save(model, source, folder)
    _finish(
        as_json,
        out,
        model,
        left,
        push_to_hub,
        private,
        f"{num_swapped} norms swapped for {norm}",
        norm=norm,
        swapped=num_swapped,
    )


@app.command(short_help="Fold gains and biases into the layers that read them, and save.")
def fold(
    name: Name,
    out: Out,
    revision: Revision = None,
    architecture: Architecture = None,
    unfoldable: Unfoldable = "keep",
    tied: Tied = "keep",
    tolerance: Tolerance = None,
    gguf_file: GgufFile = None,
    push_to_hub: PushToHub = None,
    private: Private = False,
    as_json: Json = False,
) -> None:
    """Fold the gains and biases of a model's norms into the layers that read them, and save it as its own class.

    Where no bias had to be added, the result is a plain stock model, which every engine loads.
    """
    from . import fold_affine
    from .conversion import Source, check_push, load_config, load_model, new_folder, refuse_unused

    how = _fold(unfoldable, tied, tolerance)
    check_push(push_to_hub)
    source = Source(name=name, revision=revision, gguf_file=gguf_file, architecture=architecture)
    config = load_config(source)
    with new_folder(out) as folder:
        model = load_model(source, config)
        refuse_unused(source)
        report = fold_affine(model, **vars(how))
        left = _save(model, source, folder)
    counts: dict[str, Any] = {action: len(report.names(action)) for action in ("folded", "approximated", "kept")}
    counts |= {"untied": report.untied, "difference": report.difference, "stock": report.is_stock}
    _finish(as_json, out, model, left, push_to_hub, private, str(report), **counts)


@app.command(short_help="Put the stock norms back and save the model.")
def unpatch(name: Name, out: Out, revision: Revision = None, as_json: Json = False) -> None:
    """Put the stock norms back into a patched model and save it.

    A saved model does not contain the gains and biases from before the patch: they start from 1 and 0.
    """
    from . import is_patched, unpatch_model
    from .conversion import Source, empty_model, load_config, load_model, new_folder

    source = Source(name=name, revision=revision)
    config = load_config(source)
    if not is_patched(empty_model(config)):
        raise ValueError(f"{name} has no swapped norms: there is nothing to undo")
    with new_folder(out) as folder:
        model = load_model(source, config)
        unpatch_model(model)
        left = _save(model, source, folder)
    _finish(as_json, out, model, left, None, False, "stock norms")


@app.command(short_help="Write or update the model card of a saved model.")
def card(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The folder of a saved model.")],
    model_id: Annotated[str | None, typer.Option(help="Its name on the Hub.")] = None,
    base_model: Annotated[str | None, typer.Option(help="The id of the model that was patched.")] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="The Hub id of training data; repeatable.")] = None,
    dataset_name: Annotated[str | None, typer.Option(help="A readable name of the data of the results.")] = None,
    dataset_split: Annotated[str | None, typer.Option(help="The split of the results, such as test.")] = None,
    result: Annotated[list[str] | None, typer.Option(metavar="METRIC=VALUE", help="A result; repeatable.")] = None,
    command: Annotated[str | None, typer.Option(help="The command line that made the model.")] = None,
    license: Annotated[str | None, typer.Option(help="The license; by default that of the base model.")] = None,  # noqa: A002
    tag: Annotated[list[str] | None, typer.Option(help="A further tag; repeatable.")] = None,
    as_json: Json = False,
) -> None:
    """Write the model card of a saved model, or update our section of the existing card."""
    from . import write_model_card

    written = write_model_card(
        path,
        model_id=model_id,
        base_model=base_model,
        datasets=dataset,
        dataset_name=dataset_name,
        dataset_split=dataset_split,
        results=_results(result or []),
        command=command,
        license=license,
        tags=tag,
    )
    _print_json({"card": str(written)}) if as_json else print(written)


@app.command(
    short_help="Run another program with hf_adanorm imported.",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
)
def run(
    context: typer.Context,
    tool: Annotated[str, typer.Argument(metavar="TOOL ARGS...", help="A command of an installed package.")],
) -> Callable[[], Any]:
    """Run the command of an installed package in this process, with hf_adanorm imported: it loads patched models.

    For example: hf-adanorm run transformers serve my-model. Forked workers inherit the import. Launchers start new
    processes, which do not: in scripts for them, write `import hf_adanorm`.
    """
    found = {entry.name: entry for entry in metadata.entry_points(group="console_scripts")}
    if tool not in found:
        close = difflib.get_close_matches(tool, found, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"{tool} is not a command of an installed Python package{hint}")
    if tool in LAUNCHERS:
        print(
            f"warning: {tool} starts new processes, which do not import hf_adanorm: import it in your script",
            file=sys.stderr,
        )
    arguments = [tool, *context.args]

    def start() -> Any:
        importlib.import_module("hf_adanorm")
        sys.argv = arguments
        return found[tool].load()()

    return start


def main(argv: list[str] | None = None) -> None:
    """Run a command and end with SystemExit: 0, or 2 after an error."""
    show_warning = warnings.showwarning
    warnings.showwarning = _show_warning
    try:
        # Exceptions arrive here as they are, those of the argument parser included.
        code = app(
            args=_separate_settings(sys.argv[1:] if argv is None else argv),
            standalone_mode=False,
            prog_name="hf-adanorm",
        )
    except KeyboardInterrupt:
        code = 130
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        code = _fail(_as_options(str(error)) or type(error).__name__)
    except Exception as error:
        if not hasattr(error, "format_message"):  # not from the argument parser: a bug, so show its traceback
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message(), file=sys.stderr)
            sys.exit(2)
        code = _fail(error.format_message())
    if callable(code):  # another program: its errors and exit codes are its own
        warnings.showwarning = show_warning
        code = code()
    sys.exit(code if isinstance(code, int) else 0)


# ------------------------------------------------------------------------------------------------------- small parts


def _separate_settings(argv: list[str]) -> list[str]:
    """Turn options of `patch` that are none of its own into settings: --alpha 0.7 becomes --setting alpha=0.7."""
    if argv[:1] != ["patch"]:
        return argv
    known = {"--help", *(name for p in _parameters("patch") for name in (*p.opts, *p.secondary_opts))}
    flags = {
        name for p in _parameters("patch") if getattr(p, "is_flag", False) for name in (*p.opts, *p.secondary_opts)
    }
    out, rest = argv[:1], argv[1:]
    while rest:
        word = rest.pop(0)
        name, sign, value = word.partition("=")
        if not word.startswith("--") or word == "--" or name in known:
            out.append(word)
            if word in known - flags and rest:
                out.append(rest.pop(0))
            continue
        if not sign:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        out += ["--setting", f"{name[2:].replace('-', '_')}={value}"]
    return out


def _parameters(command: str) -> list[Any]:
    return list(typer.main.get_command(app).commands[command].params)  # type: ignore[attr-defined]


def _settings(norm: str, cls: type, pairs: list[str]) -> dict[str, Any]:
    """Return the settings that the command line gives, checked against those of the norm."""
    known = settings_of(cls)
    settings = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        if name.startswith("no_") and name not in known and value == "true":
            name, value = name.removeprefix("no_"), "false"
        if name not in known:
            given = f"--{name.replace('_', '-')}"
            options = [opt for p in _parameters("patch") for opt in p.opts if opt.startswith("--") and not p.hidden]
            close = difflib.get_close_matches(given, [*options, *(f"--{key.replace('_', '-')}" for key in known)], n=1)
            valid = ", ".join(f"--{key.replace('_', '-')}" for key in known) or "none"
            raise ValueError(
                f"{given} is neither an option nor a setting of {norm} (settings: {valid})"
                + (f"; did you mean {close[0]}?" if close else "")
            )
        settings[name] = parse_value(value)
    return settings


def _describe(code: Any) -> Iterator[str]:
    """Describe the code in a model's folder, which trust_remote_code=True executes, in lines."""
    version = importlib.import_module("hf_adanorm").__version__
    if code.loader == "ours":
        yield f"modeling_adanorm.py: the loader of hf_adanorm {version}, unmodified"
    elif code.loader == "modified":
        yield (
            f"modeling_adanorm.py: NOT the loader of hf_adanorm {version}. Another version wrote it, or it was "
            f"changed: read it before you load with trust_remote_code=True (SHA-256 {code.loader_sha256})"
        )
    if code.entry == "modified":
        yield "the entry file that config.json names was changed by hand: read it before you load it"
    for file, sha in code.files.items():
        known = code.expected.get(file)
        state = (
            "not part of the model" if known is None else "as saved" if known == sha else "CHANGED since it was saved"
        )
        yield f"{file}: code of the model's author, {state} (SHA-256 {sha})"


def _fold(unfoldable: str, tied: str, tolerance: float | None) -> Any:
    """Return the options of a fold, checked."""
    from . import Fold

    if unfoldable == "calibrate":
        raise ValueError("--unfoldable calibrate needs data, which only the Python interface takes; use approximate")
    return Fold(unfoldable=unfoldable, tied=tied, tolerance=tolerance)  # type: ignore[arg-type]


def _save(model: Any, source: Any, folder: Path) -> list[str]:
    """Save the model with its card, which shows this command line. Return the files that were not copied."""
    from . import write_model_card
    from .conversion import save_model

    left = save_model(model, source, folder)
    base = source.name if not Path(source.name).exists() else None
    write_model_card(folder, base_model=base, command=shlex.join(["hf-adanorm", *sys.argv[1:]]))
    return left


def _finish(
    as_json: bool,
    out: Path,
    model: Any,
    left: list[str],
    push_to_hub: str | None,
    private: bool,
    text: str,
    **more: Any,
) -> None:
    from .conversion import push_folder

    url = push_folder(out, push_to_hub, private) if push_to_hub else None
    if as_json:
        _print_json({"out": str(out), "class": type(model).__name__, **more, "not_copied": left, "pushed": url})
        return
    print(f"{out}: {type(model).__name__}, {text}")
    if left:
        print(f"not copied: {', '.join(left)}")
    if url:
        print(f"pushed: {url}")


def _results(pairs: list[str]) -> dict[str, float] | None:
    results = {}
    for pair in pairs:
        metric, _, value = pair.partition("=")
        try:
            results[metric] = float(value)
        except ValueError:
            raise ValueError(f"--result {pair!r} is not of the form METRIC=VALUE, such as accuracy=0.77") from None
    return results or None


def _fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {' '.join(_as_options(str(message)).split())}", file=sys.stderr)


def _as_options(message: str) -> str:
    """Write the arguments that a message of the library names, such as targets="all", as options."""
    names = "|".join(p.name for p in _parameters("patch"))
    return re.sub(rf"""\b({names})=(["']?)([\w.-]*\w)\2""", lambda m: f"--{m[1].replace('_', '-')} {m[3]}", message)


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value))


if __name__ == "__main__":
    main()
