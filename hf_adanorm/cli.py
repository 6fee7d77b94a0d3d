"""The command line: `hf-adanorm inspect | patch | unpatch | fold | card`.

An error is one line on stderr and exit code 2. `--json` prints one JSON object on stdout instead of text for people.
Tokens come from `hf auth login` or HF_TOKEN, as everywhere in huggingface_hub; no option takes one.
"""

from __future__ import annotations

import importlib
import json
import re
import secrets
import shlex
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
except ImportError:  # the library itself needs torch and transformers only
    sys.exit("error: the command line needs typer and rich: pip install typer rich")

from .options import norms, patch_options
from .saving import TEMPORARY, leads_outside

PATCH_OPTIONS = patch_options()

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

Name = Annotated[str, typer.Argument(metavar="NAME_OR_PATH", help="A model's id on the Hub, or its folder.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write: a new or an empty one.")]
Revision = Annotated[str | None, typer.Option(help="A branch, tag or commit of the repository.")]
Include = Annotated[
    list[str] | None, typer.Option(help=f"{PATCH_OPTIONS['include'].help}; may be given several times.")
]
Exclude = Annotated[list[str] | None, typer.Option(help="leave these norms as they are; written like --include.")]
Layers = Annotated[list[int] | None, typer.Option(help="Only norms of this layer, negative from the end.")]
Targets = Annotated[str, typer.Option(help=PATCH_OPTIONS["targets"].help)]
OnTied = Annotated[str, typer.Option(help=PATCH_OPTIONS["on_tied"].help)]
GgufFile = Annotated[str | None, typer.Option(metavar="FILE", help="The GGUF file there that holds the model.")]
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
    """Swap the LayerNorms of transformers models for AdaNorm and its relatives."""


@app.command(short_help="List every norm and what would become of it.")
def inspect(
    name: Name,
    revision: Revision = None,
    include: Include = None,
    exclude: Exclude = None,
    layers: Layers = None,
    targets: Targets = PATCH_OPTIONS["targets"].default,
    gguf_file: GgufFile = None,
    as_json: Json = False,
) -> None:
    """List every norm of a model and what would become of it, from its config alone: no weights are downloaded."""
    from . import inspect_model

    report = inspect_model(
        _empty_model(_load_config(name, revision, gguf_file)),
        include=include or None,
        exclude=exclude or None,
        layers=layers or None,
        targets=targets,  # type: ignore[arg-type]
    )
    _print_json({"model": name, **report.to_dict()}) if as_json else print(report)


@app.command(short_help="Swap the norms and save the model.")
def patch(
    name: Name,
    out: Out,
    norm: Annotated[str, typer.Option(help=PATCH_OPTIONS["norm"].help)] = PATCH_OPTIONS["norm"].default,
    C: Annotated[float, typer.Option("--C", help=PATCH_OPTIONS["C"].help)] = PATCH_OPTIONS["C"].default,
    k: Annotated[float, typer.Option("--k", help=PATCH_OPTIONS["k"].help)] = PATCH_OPTIONS["k"].default,
    detach_mean: Annotated[bool, typer.Option(help=PATCH_OPTIONS["detach_mean"].help)] = PATCH_OPTIONS[
        "detach_mean"
    ].default,
    detach_variance: Annotated[bool, typer.Option(help=PATCH_OPTIONS["detach_variance"].help)] = PATCH_OPTIONS[
        "detach_variance"
    ].default,
    eps: Annotated[float | None, typer.Option(help=PATCH_OPTIONS["eps"].help)] = None,
    centered: Annotated[bool | None, typer.Option(help=PATCH_OPTIONS["centered"].help)] = None,
    revision: Revision = None,
    include: Include = None,
    exclude: Exclude = None,
    layers: Layers = None,
    targets: Targets = PATCH_OPTIONS["targets"].default,
    affine: Annotated[str, typer.Option(help=PATCH_OPTIONS["affine"].help)] = PATCH_OPTIONS["affine"].default,
    on_unfoldable: Annotated[str, typer.Option(help=PATCH_OPTIONS["on_unfoldable"].help)] = PATCH_OPTIONS[
        "on_unfoldable"
    ].default,
    on_tied: OnTied = "keep",
    gguf_file: GgufFile = None,
    push_to_hub: PushToHub = None,
    private: Private = False,
    as_json: Json = False,
) -> None:
    """Swap the norms of a model and save it, with its tokenizer or processor, in the dtype of its checkpoint."""
    from . import patch_model

    if on_unfoldable == "calibrate":
        raise ValueError(
            "--on-unfoldable calibrate fits to real data, which a command line does not take: call patch_model(model, "
            'affine="fold", on_unfoldable="calibrate", fold_inputs=batch) in Python, or give "approximate" here'
        )
    _check_push(push_to_hub)
    config = _load_config(name, revision, gguf_file)
    given = {"C": C, "k": k, "detach_mean": detach_mean, "detach_variance": detach_variance}
    known = norms()[norm].settings if norm in norms() else {}
    options: dict[str, Any] = {
        **{key: value for key, value in given.items() if key in known or value != PATCH_OPTIONS[key].default},
        "eps": eps,
        "centered": centered,
        "include": include or None,
        "exclude": exclude or None,
        "layers": layers or None,
        "targets": targets,
        "affine": affine,
        "on_unfoldable": on_unfoldable,
        "on_tied": on_tied,
    }
    with _new_folder(out) as folder:
        # A wrong option is found before the weights are downloaded. Folding runs the model: not on the meta device.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patch_model(
                _empty_model(config), norm, **{**options, "affine": "drop", "on_unfoldable": "keep", "on_tied": "keep"}
            )
        model = _load_model(name, config, revision, gguf_file)
        patch_model(model, norm, **options)
        num_swapped = sum(getattr(type(module), "is_adanorm_module", False) for module in model.modules())
        with_processor = _save(model, name, revision, gguf_file, folder)
    url = _push(out, push_to_hub, private) if push_to_hub else None
    if as_json:
        _print_json({"model": name, "out": str(out), "norm": norm, "swapped": num_swapped, "pushed": url})
        return
    print(
        f"{out}: {type(model).__name__} with {num_swapped} swapped norms{'' if with_processor else ', no tokenizer'}"
    )
    if url:
        print(f"pushed: {url}")


@app.command(short_help="Put the stock norms back and save the model.")
def unpatch(name: Name, out: Out, revision: Revision = None, as_json: Json = False) -> None:
    """Put the stock norms back into a patched model and save it, with its tokenizer or processor.

    A saved model does not hold the gains and biases that were there before the patch: they come back as 1 and 0.
    """
    from . import is_patched, unpatch_model

    config = _load_config(name, revision)
    if not is_patched(_empty_model(config)):
        raise ValueError(f"{name} holds no swapped norm: there is nothing to take back")
    with _new_folder(out) as folder:
        model = _load_model(name, config, revision, None)
        unpatch_model(model)
        with_processor = _save(model, name, revision, None, folder)
    if as_json:
        _print_json({"model": name, "out": str(out)})
    else:
        print(f"{out}: {type(model).__name__} with its stock norms{'' if with_processor else ', no tokenizer'}")


@app.command(short_help="Fold gains and biases into the layers that read them, and save.")
def fold(
    name: Name,
    out: Out,
    revision: Revision = None,
    on_unfoldable: Annotated[str, typer.Option(help='"keep", "approximate" or "raise".')] = "keep",
    on_tied: OnTied = "keep",
    gguf_file: GgufFile = None,
    push_to_hub: PushToHub = None,
    private: Private = False,
    as_json: Json = False,
) -> None:
    """Fold the gains and biases of a model's norms into the layers that read them, and save it as its own class. Where
    no bias had to be added, the result is a plain stock model for whatever loads its kind."""
    from . import fold_affine

    _check_push(push_to_hub)
    config = _load_config(name, revision, gguf_file)
    with _new_folder(out) as folder:
        model = _load_model(name, config, revision, gguf_file)
        report = fold_affine(model, on_unfoldable=on_unfoldable, on_tied=on_tied)  # type: ignore[arg-type]
        _save(model, name, revision, gguf_file, folder)
    url = _push(out, push_to_hub, private) if push_to_hub else None
    if as_json:
        counts = {action: len(report.names(action)) for action in ("folded", "approximated", "kept")}
        more = {"untied": report.untied, "difference": report.difference, "stock": report.is_stock}
        _print_json({"model": name, "out": str(out), **counts, **more, "pushed": url})
        return
    print(report)
    if url:
        print(f"pushed: {url}")


@app.command(short_help="Write or refresh the model card of a patched model.")
def card(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The folder of a patched model.")],
    model_id: Annotated[str | None, typer.Option(help="Its name on the Hub.")] = None,
    base_model: Annotated[str | None, typer.Option(help="The model that was patched, by id.")] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="A data set's id; may be given several times.")] = None,
    dataset_name: Annotated[str | None, typer.Option(help="A readable name for the data of the results.")] = None,
    dataset_split: Annotated[str | None, typer.Option(help='Such as "test".')] = None,
    result: Annotated[list[str] | None, typer.Option(metavar="METRIC=VALUE", help="A result.")] = None,
    command: Annotated[str | None, typer.Option(help="The command line that made the model.")] = None,
    license: Annotated[str | None, typer.Option(help="The model's license; by default the base model's.")] = None,  # noqa: A002
    tag: Annotated[list[str] | None, typer.Option(help="A further tag.")] = None,
    as_json: Json = False,
) -> None:
    """Write the model card of a saved patched model, or refresh our section of the card that is there."""
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


def main(argv: list[str] | None = None) -> None:
    """The entry point; ends with SystemExit: 0, or 2 after an error."""
    warnings.showwarning = _show_warning
    try:
        # Exceptions arrive here as they are, those of the argument parser included.
        code = app(args=argv, standalone_mode=False, prog_name="hf-adanorm")
    except KeyboardInterrupt:
        code = 130
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        code = _fail(_in_our_words(str(error)) or type(error).__name__)
    except Exception as error:
        if not hasattr(error, "format_message"):  # not the argument parser's: a bug, whose traceback is wanted
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message(), file=sys.stderr)
            sys.exit(2)
        code = _fail(error.format_message())
    sys.exit(code if isinstance(code, int) else 0)


# ------------------------------------------------------------------------------------------------------- small parts


def _fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {' '.join(_in_our_words(str(message)).split())}", file=sys.stderr)


def _in_our_words(message: str) -> str:
    """A message of the library with the options of this command line in the place of Python's arguments."""
    names = (
        "C|k|norm|eps|centered|affine|on_unfoldable|on_tied|include|exclude|layers|targets|detach_mean|detach_variance"
    )
    value = r"""(?:"([\w.-]+)"|'([\w.-]+)'|([\w.-]+\w))"""

    def option(match: re.Match[str]) -> str:
        given = next((group for group in match.groups()[1:] if group), "")
        return f"--{match[1].replace('_', '-')} {given}".rstrip()

    message = re.sub(rf"\b({names})={value}", option, message)
    return re.sub(rf"(?<![\w-])({names})(?= (?:must|are both|holds?)\b)", option, message)


def _load_config(name: str, revision: str | None, gguf_file: str | None = None) -> PreTrainedConfig:
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils import logging as hub_logging
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        disable_progress_bars()
    folder = Path(name)
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    if folder.is_dir() or is_path:
        if not folder.is_dir():
            raise FileNotFoundError(f"{name}: no such folder")
        wanted = gguf_file or "config.json"
        if not (folder / wanted).is_file():
            found = sorted(file.name for file in folder.glob("*.gguf"))
            hint = f"; it holds {', '.join(found)}: give --gguf-file {found[0]}" if found else ""
            raise FileNotFoundError(f"{name} is no folder with a {wanted}{hint}")
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, **({"gguf_file": gguf_file} if gguf_file else {}))
    except OSError as error:
        if folder.is_dir():
            raise
        raise OSError(f"{name}: no such folder, and no such model could be had from the Hub: {error}") from None
    if gguf_file:
        names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
        config.architectures = config.architectures or ([names] if isinstance(names, str) else None)
    return config  # type: ignore[no-any-return]


def _load_model(name: str, config: PreTrainedConfig, revision: str | None, gguf_file: str | None) -> PreTrainedModel:
    """With its weights, in the dtype of its checkpoint; those of a GGUF file are unpacked, to float32."""
    import torch
    import transformers

    if not gguf_file:
        return _model_class(config).from_pretrained(  # type: ignore[no-any-return]
            name, config=config, revision=revision, dtype="auto"
        )
    how = getattr(transformers, "GgufConfig", None)  # of newer releases, which could leave the weights packed
    model = _model_class(config).from_pretrained(
        name,
        revision=revision,
        gguf_file=gguf_file,
        dtype=torch.float32,
        **({"quantization_config": how(dequantize=True)} if how is not None else {}),
    )
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(model)  # or transformers would refuse to save it
    return model  # type: ignore[no-any-return]


def _save(model: PreTrainedModel, name: str, revision: str | None, gguf_file: str | None, folder: Path) -> bool:
    """Save the model with its tokenizer or processor. Whether there was one."""
    if gguf_file:
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(name, revision=revision, gguf_file=gguf_file).save_pretrained(folder)
    found = bool(gguf_file) or _copy_processor(name, revision, folder)
    model.save_pretrained(folder)
    return found


def _model_class(config: PreTrainedConfig) -> Any:
    """The class that the config names, so that the head stays; the Auto class of the bare model otherwise."""
    import transformers

    name = (config.architectures or [""])[0]
    found = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if is_model else transformers.AutoModel


def _empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model on the meta device: every module, no memory for weights."""
    import torch

    model_class = _model_class(config)
    with torch.device("meta"):
        build = model_class.from_config if hasattr(model_class, "from_config") else model_class._from_config
        return build(config)  # type: ignore[no-any-return]


# What a tokenizer or a processor is made of, by names or patterns; copied as it is, code excepted.
_PROCESSOR_FILES = (
    *("tokenizer*", "vocab*", "merges*", "special_tokens_map.json", "added_tokens.json"),
    *("*.model", "*.tiktoken", "*.spm", "*preprocessor_config.json", "processor_config.json"),
    *("audio_tokenizer_config.json", "chat_template*", "additional_chat_templates/*"),
    # Of some tokenizers: PhoBERT, LUKE, ProphetNet, BARTpho, RoCBert, Whisper, Marian, MyT5, GPT-NeoX-Japanese
    *("bpe.codes", "entity_vocab.json", "prophetnet.tokenizer", "dict.txt", "word_shape.json"),
    *("word_pronunciation.json", "normalizer.json", "target_vocab.json", "byte_maps.json", "emoji.json"),
    # Of some processors: Wav2Vec2 with a language model, Bark
    *("alphabet.json", "language_model/*"),
    *("speaker_embeddings*", "speaker_embeddings/*", "speaker_embeddings/*/*"),
)


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder that takes the place of `out` once it is complete, and leaves nothing after an error."""
    target = out.resolve()  # a link to an empty folder means that folder
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{out} exists and is not an empty folder: give a new one")
    if target.is_mount():
        raise FileExistsError(f"{out} is a mount point, which nothing can be renamed to: give a new folder in it")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f"{TEMPORARY}{target.name}-{secrets.token_hex(8)}"
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _copy_processor(name: str, revision: str | None, folder: Path) -> bool:
    """Copy the files of the tokenizer or processor into `folder`. Whether there were any."""
    from huggingface_hub import snapshot_download

    if Path(name).is_dir():
        source = Path(name)
    else:
        patterns = [*_PROCESSOR_FILES, "README.md"]  # the card, for the license
        source = Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=["*.py"]))
    files = {file for pattern in _PROCESSOR_FILES for file in source.glob(pattern) if file.suffix != ".py"}
    outside = sorted(str(file) for file in files if leads_outside(file, source))
    if outside:
        warnings.warn(f"not copied, as these links lead out of the folder: {', '.join(outside)}", stacklevel=2)
    files = {file for file in files if file.is_file() and not leads_outside(file, source)}
    for file in files:
        copy = folder / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    return bool(files)


def _check_push(repo_id: str | None) -> None:
    """Before the work, what would stop the push after it."""
    from huggingface_hub.errors import LocalTokenNotFoundError
    from huggingface_hub.utils import build_hf_headers, validate_repo_id

    if repo_id is not None:
        validate_repo_id(repo_id)
        try:
            build_hf_headers(token=True)
        except LocalTokenNotFoundError as error:
            raise ValueError("--push-to-hub needs a token: hf auth login, or HF_TOKEN") from error


def _push(folder: Path, repo_id: str, private: bool) -> str:
    from huggingface_hub import HfApi

    from .saving import CARD_NAME, write_model_card

    api = HfApi(library_name="hf_adanorm")
    try:
        # No wish is not the same as "public": an organisation may make new repositories private.
        repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        filters: dict[str, Any] = {}
        if api.file_exists(repo_id, CARD_NAME):
            filters = _take_over_card(Path(api.hf_hub_download(repo_id, CARD_NAME)), folder, repo_id)
        elif (folder / CARD_NAME).exists():  # not beside a stock model
            write_model_card(folder, model_id=repo_id)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload model", **filters)
    except Exception as error:  # of whichever kind: the network's have little in common
        again = shlex.join(["hf", "upload", repo_id, str(folder), *["--private"] * bool(private)])
        told = f"{error}; {folder} is complete, and `{again}` pushes it"
        raise OSError(told) from error
    return f"{api.endpoint}/{repo_id}"


def _take_over_card(theirs: Path, folder: Path, repo_id: str) -> dict[str, Any]:
    """The repository's card in the place of the folder's, with a section of ours that is true of the folder's model.
    What the upload leaves out or deletes: a card that cannot be read, scores of another model."""
    from .saving import CARD_NAME, read_card, read_config, renewed_card, write_file

    try:
        text = renewed_card(read_card(theirs), read_config(folder), model_id=repo_id)
    except ValueError as error:
        warnings.warn(f"the card of {repo_id} stays as it is: {error}", stacklevel=2)
        return {"ignore_patterns": CARD_NAME}
    write_file(folder / CARD_NAME, text or "")
    return {}


def _results(pairs: list[str]) -> dict[str, float] | None:
    results = {}
    for pair in pairs:
        metric, _, value = pair.partition("=")
        try:
            results[metric] = float(value)
        except ValueError:
            raise ValueError(f"--result {pair!r} is not of the form METRIC=VALUE, such as accuracy=0.77") from None
    return results or None


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value))


if __name__ == "__main__":
    main()
